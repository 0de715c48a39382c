"""Runs the small recipes one after the other: twins of the TransFusion paper's tables, and those with inputs.

    python benchmarks/paper_tables.py --data-dir DATA -o OUT            # three seeds; resumes where it was stopped
    python benchmarks/paper_tables.py --data-dir DATA -o OUT --quick    # one seed, less data: does everything work
    python benchmarks/paper_tables.py --data-dir DATA -o OUT --docs docs/results   # and put the tables there

Each can be run alone: `transfuse bench NAME -o DIR --data-dir DATA`. DATA holds the folders that the recipes name
(cifar10, eurosat, gtsrb, mnist, sst2, cola, rte, mrpc, agnews, wikitext2); what is not there is taken from the hub.
Results of runs that are in docs/: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

# Those that share models follow each other, so that a stopped run has whole tables.
RECIPES = (
    "table1-clip-vitb16-small",
    "fig4-alpha-small",
    "table3-heads-small",
    "table4-fewshot-small",
    "fig5-lmc-vit-cifar10-small",
    "table2-glue-text-encoder-small",
    "theseus-table-small",
    "auto-small",
    "gradfix-table-small",
    "shapes-small",
    "theseus-table-text-small",
    "shapes-text-small",
)
FIGURES = {
    "table1-clip-vitb16-small": "transport-gains.png",
    "fig4-alpha-small": "alpha-alpha-task.png",
    "table4-fewshot-small": "fewshot-fewshot.png",
    "fig5-lmc-vit-cifar10-small": "interpolation-lines.png",
    "theseus-table-small": "transport-gains.png",
    "auto-small": "transport-gains.png",
    "gradfix-table-small": "fewshot-fewshot.png",
    "shapes-small": "transport-gains.png",
    "theseus-table-text-small": "transport-gains.png",
    "shapes-text-small": "transport-gains.png",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--docs", type=Path, help="Put the tables and one figure of each recipe here, too.")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=RECIPES, metavar="RECIPE")
    options, rest = parser.parse_known_args()  # the rest (--cache, --workers, ...) goes to transfuse bench
    failed = []
    for name in options.only:
        began, out = time.monotonic(), options.out / name
        command = ["transfuse", "bench", name, "-o", str(out), "--data-dir", str(options.data_dir), *rest]
        command += ["--quick"] if options.quick else []
        code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
        print(f"{name}: {time.monotonic() - began:.0f} s, exit code {code}, {out / 'report.html'}", flush=True)
        failed += [name] if code else []
        if options.docs is not None and not code:
            options.docs.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(out / "tables.md", options.docs / f"{name}.md")
            if name in FIGURES:
                shutil.copyfile(out / "figures" / FIGURES[name], options.docs / f"{name}.png")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
