"""Does a change of the code change any result? The same commands with both versions, and every byte compared.

    python benchmarks/same_bytes.py make DIR                     # tiny models and data, once
    python benchmarks/same_bytes.py run DIR -o before.json       # with the old code
    python benchmarks/same_bytes.py run DIR -o after.json        # with the new code, on the same machine
    python benchmarks/same_bytes.py compare before.json after.json

Only the command line is used, in one process, so any two versions that share it can be compared: set PYTHONPATH to the
`src` of each. A run's verdict has three levels: tensors (of every weight and maps file, byte by byte), files (config,
tokenizer, recipe, metadata of maps) and reports (exit codes, result.json, what is printed, number by number). Numbers
that differ by less than 1e-6 of themselves are "digits". Left out: seconds, versions, model cards, figures.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import random
import re
import shlex
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Before the libraries are imported, which read them once.
os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "OMP_NUM_THREADS": "1"})

import numpy
import safetensors
import torch
import transformers
from same_bytes_runs import RUNS

LEVELS = ("tensors", "files", "reports")
DIGITS = 1e-6
SMALL = 0.01  # cosines near zero are sums of what cancels
# Keys of reports that say when, where, with what and under which name in the cache; and files that are made for eyes.
_IGNORED_KEYS = re.compile(
    r"(^|/)(seconds|versions?|transfuse|transfuse_version|cores|machine|command)(/|$)|(^|/)models/\d+/key$"
)
_IGNORED_FILES = re.compile(r"(^|/)(README\.md|.*\.(html|png|svg|pdf))$|^cache/")
_REPORTS = ("result.json", "train.json")
_LOGGED = re.compile(r"^(WARNING|ERROR|INFO) [\w.]+: ")
_SECONDS = re.compile(r"\b\d+(\.\d+)? s\b")

Entries = dict[str, Any]
Result = dict[str, Entries]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("make", help="make the models and data")
    one.add_argument("place", type=Path)
    one = commands.add_parser("run", help="run everything and write the hashes")
    one.add_argument("place", type=Path)
    one.add_argument("-o", "--out", type=Path, required=True)
    one.add_argument("--only", default="", metavar="REGEX", help="only the runs whose name it finds")
    one.add_argument("--keep", type=Path, metavar="DIR", help="leave what was written here, to look at it")
    one = commands.add_parser("compare", help="compare the hashes of two versions")
    one.add_argument("before", type=Path)
    one.add_argument("after", type=Path)
    one.add_argument("--only", default="", metavar="REGEX", help="only the runs whose name it finds")
    one.add_argument("--most", type=int, default=8, help="differences shown of each level of a run (default 8)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if options.command == "make":
        from same_bytes_models import make

        make(options.place.resolve())
    elif options.command == "run":
        run_all(options.place.resolve(), options.out.resolve(), options.only, options.keep)
    else:
        before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
        sys.exit(compare(before, after, options.only, options.most))


# --- run ----------------------------------------------------------------------------------------------------------


def run_all(place: Path, out: Path, only: str, keep: Path | None) -> None:
    """Runs all that `only` finds; the results so far are written after each."""
    import transfuse

    _without_figures()
    print(f"transfuse of {transfuse.__path__[0]}", file=sys.stderr)
    results: dict[str, Result] = {}
    started = time.monotonic()
    for name, lines in RUNS.items():
        if re.search(only, name):
            begun = time.monotonic()
            results[name] = run_one(name, lines, place, keep)
            codes = [value for key, value in results[name]["reports"].items() if key.endswith("exit code")]
            print(f"{name:<32} {time.monotonic() - begun:5.1f} s  exit {codes}", file=sys.stderr, flush=True)
            out.write_text(json.dumps(results, indent=0, sort_keys=True))
    print(f"{len(results)} runs in {time.monotonic() - started:.0f} s", file=sys.stderr)


def _without_figures() -> None:
    """Drawing takes most of a small benchmark's time, and figures are not compared."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    for owner, name in ((FigureCanvasAgg, "print_png"), (FigureCanvasSVG, "print_svg"), (Figure, "savefig")):
        setattr(owner, name, lambda *_, **__: None)
    Figure.draw_without_rendering = lambda *_: None


def run_one(name: str, lines: Sequence[str], place: Path, keep: Path | None) -> Result:
    """The command lines of a run in an empty folder, and what they left there."""
    found: Result = {level: {} for level in LEVELS}
    with _folder(None if keep is None else keep.resolve() / name) as folder:
        places = {str(folder): "RUN", str(folder.resolve()): "RUN", str(place): "MODELS"}
        for number, line in enumerate(lines):
            words = [re.sub(r"^@", f"{place}/", word).rstrip("/") for word in shlex.split(line)]
            for key, value in run_command(words, places).items():
                found["reports"][f"{number + 1} {words[0]}/{key}"] = value
        for path in sorted(folder.rglob("*")):
            file = path.relative_to(folder).as_posix()
            if path.is_file() and not _IGNORED_FILES.search(file):
                add_file(found, path, file, places)
    return found


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    """An empty current folder, for a while."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        folder = kept or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(before)


def run_command(words: list[str], places: Mapping[str, str]) -> Entries:
    """One command in this process: exit code, what it printed, its own warnings."""
    out, err = io.StringIO(), io.StringIO()
    _as_at_start()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code, said = _call(words)
    entries: Entries = {"exit code": code}
    text = _placed(out.getvalue(), places)
    try:
        entries |= {f"json/{key}": value for key, value in flat(json.loads(text)).items()}
    except json.JSONDecodeError:
        entries |= {f"line {i}": _SECONDS.sub("? s", line) for i, line in enumerate(text.splitlines())}
    own = [line for line in err.getvalue().splitlines() if line.startswith("transfuse: ") or _LOGGED.match(line)]
    messages = [_placed(_LOGGED.sub(r"\1: ", line), places) for line in [*own, *said]]
    return entries | {f"message {i}": line for i, line in enumerate(messages)}


def _as_at_start() -> None:
    """Nothing of an earlier command: no logging handler, no global random state, no warning already given."""
    logging.getLogger().handlers.clear()
    warnings.resetwarnings()
    warnings.simplefilter("ignore")
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


def _call(words: list[str]) -> tuple[int, list[str]]:
    """Exit code, and the message of an error that was not printed."""
    import click

    from transfuse.cli.common import app

    try:
        code = app.main(args=words, prog_name="transfuse", standalone_mode=False)
        return (code if isinstance(code, int) else 0), []
    except click.ClickException as error:
        return error.exit_code, [f"usage: {error.format_message()}"]
    except SystemExit as error:
        return (error.code if isinstance(error.code, int) else int(error.code is not None)), []
    except Exception as error:  # a crash is a result, too
        traceback.print_exc(file=sys.__stderr__)
        return 1, [f"crash: {type(error).__name__}: {error}"]


# --- what is compared ---------------------------------------------------------------------------------------------


def add_file(found: Result, path: Path, file: str, places: Mapping[str, str]) -> None:
    """A file under the level where it belongs."""
    if path.suffix == ".safetensors":
        _add_tensors(found, path, file, places)
    elif path.name in _REPORTS:
        content = flat(json.loads(_placed(path.read_text(), places)))
        found["reports"] |= {f"{file}: {key}": value for key, value in content.items()}
    else:
        content = path.read_bytes()
        with contextlib.suppress(UnicodeDecodeError):
            content = _placed(content.decode(), places).encode()
        found["files"][file] = _hash(content)


def _add_tensors(found: Result, path: Path, file: str, places: Mapping[str, str]) -> None:
    """Tensors by name, dtype, shape, bytes, whatever the order in the file; the norm tells how far off a change is."""
    with safetensors.safe_open(path, "pt") as opened:
        for name in sorted(opened.keys()):
            t = opened.get_tensor(name).contiguous()
            raw = t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
            norm = float(t.double().norm()) if t.numel() else 0.0
            found["tensors"][f"{file}: {name}"] = [str(t.dtype), list(t.shape), _hash(raw), norm]
        for key, text in (opened.metadata() or {}).items():
            try:
                content = json.loads(_placed(text, places))
            except json.JSONDecodeError:
                content = _placed(text, places)
            found["files"] |= {f"{file}: metadata {one}": value for one, value in flat({key: content}).items()}


def flat(content: Any, at: str = "") -> Entries:
    """Nested lists and objects as path -> value, without what is ignored."""
    if _IGNORED_KEYS.search(at):
        return {}
    if isinstance(content, dict | list) and content:
        pairs = content.items() if isinstance(content, dict) else enumerate(content)
        found: Entries = {}
        for key, value in pairs:
            found |= flat(value, f"{at}/{key}" if at else str(key))
        return found
    return {at: content}


def _placed(text: str, places: Mapping[str, str]) -> str:
    for path, word in places.items():
        text = text.replace(path, word)
    return text


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# --- compare ------------------------------------------------------------------------------------------------------


def compare(before: Mapping[str, Result], after: Mapping[str, Result], only: str, most: int) -> int:
    """Prints the verdicts; 1 if anything is missing or differs by more than digits."""
    names = [name for name in dict.fromkeys([*before, *after]) if re.search(only, name)]
    verdicts = Counter(_verdict(name, before, after, most) for name in names)
    print(f"{len(names)} runs: " + ", ".join(f"{count} {word}" for word, count in sorted(verdicts.items())))
    return int(set(verdicts) - {"equal", "digits"} != set() or not names)


def _verdict(name: str, before: Mapping[str, Result], after: Mapping[str, Result], most: int) -> str:
    for side, results in (("before", before), ("after", after)):
        if name not in results:
            print(f"MISSING    {name} ({side})")
            return "missing"
    found = {level: differences(before[name][level], after[name][level]) for level in LEVELS}
    words = {word for one in found.values() for word, _ in one}
    worst = "different" if words - {"digits"} else "digits" if words else "equal"
    if words:
        counts = ", ".join(f"{level} {len(one) or 'equal'}" for level, one in found.items())
        print(f"{worst.upper():<10} {name}: {counts}")
        for level, one in found.items():
            for word, text in one[:most]:
                print(f"    {level}: {word}: {text}")
            if len(one) > most:
                print(f"    {level}: and {len(one) - most} more")
    return worst


def differences(before: Entries, after: Entries) -> list[tuple[str, str]]:
    """(kind of difference, what differs) of every key where the two are not the same."""
    found = []
    for key in sorted(before.keys() | after.keys()):
        if key not in after or key not in before:
            found.append(("gone" if key in before else "new", key))
        elif before[key] != after[key] or type(before[key]) is not type(after[key]):
            old, new = _shown(before[key]), _shown(after[key])
            found.append(("digits" if _nearly(before[key], after[key]) else "different", f"{key}: {old} -> {new}"))
    return found


def _nearly(old: Any, new: Any) -> bool:
    return (
        isinstance(old, float) and isinstance(new, float) and abs(old - new) < DIGITS * max(abs(old), abs(new), SMALL)
    )


def _shown(value: Any) -> str:
    """Of a tensor dtype, shape and norm."""
    if isinstance(value, list) and len(value) == 4:
        return f"{value[0]} {value[1]} norm {value[3]!r}"
    text = repr(value)
    return text if len(text) < 160 else text[:157] + "..."


if __name__ == "__main__":
    main()
