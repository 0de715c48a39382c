"""A naive port beside the plain script that does the same sum: CPU time, wall time and memory, as medians.

    python benchmarks/naive_port.py --gb 1 --runs 3

Models of random weights are made in a temporary folder (needs four times --gb for each form): float32 in one file,
bfloat16 in four. Runs alternate. `cp` of target and `sync` beside them say what the disk alone takes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROLES = ("source", "tuned", "target")
SHARDS = {"float32": 1, "bfloat16": 4}
ROWS, COLUMNS = 4096, 1024
# Tensor by tensor out of mapped files, one shard of the output in memory.
SCRIPT = """
import sys
from pathlib import Path
from safetensors import safe_open
from safetensors.torch import save_file
source, tuned, target, out = map(Path, sys.argv[1:])
out.mkdir()
for file in sorted(target.glob("*.safetensors")):
    new = {}
    with (
        safe_open(source / file.name, "pt") as old,
        safe_open(tuned / file.name, "pt") as trained,
        safe_open(target / file.name, "pt") as base,
    ):
        for name in base.keys():
            new[name] = base.get_tensor(name) + trained.get_tensor(name) - old.get_tensor(name)
    save_file(new, out / file.name, metadata={"format": "pt"})
"""
PORT = "from transfuse.cli import main; main()"


def make(folder: Path, gb: float, form: str) -> None:
    """Three models that differ by a little noise. In a process of its own: a child's peak begins at its parent's."""
    import torch
    from safetensors.torch import save_file

    dtype, shards = getattr(torch, form), SHARDS[form]
    count = max(shards, int(gb * 2**30 / (dtype.itemsize * ROWS * COLUMNS)))
    for number, role in enumerate(ROLES):
        (folder / role).mkdir(parents=True)
        base, noise = (torch.Generator().manual_seed(seed) for seed in (0, number))
        weight_map = {}
        for shard in range(shards):
            file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            held = {}
            for i in range(shard * count // shards, (shard + 1) * count // shards):
                drawn = torch.randn(ROWS, COLUMNS, generator=base)
                held[f"layer.{i}.weight"] = drawn.add_(torch.randn(ROWS, COLUMNS, generator=noise), alpha=0.01).to(
                    dtype
                )
            save_file(held, folder / role / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(held, file)
        if shards > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / role / "model.safetensors.index.json").write_text(json.dumps(index))


def measured(command: list[str], out: Path) -> tuple[float, float, float]:
    """(CPU s, wall s, peak MB) of a command that makes `out`, which is deleted.

    Raises:
        SystemExit: it fails.
    """
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[:3]} failed")
    shutil.rmtree(out)
    return used.ru_utime + used.ru_stime, wall, used.ru_maxrss / 1024


def compare(folder: Path, runs: int) -> dict[str, list[tuple[float, float, float]]]:
    """What each way takes, run by run."""
    places, out = [str(folder / role) for role in ROLES], folder / "out"
    commands = {
        "script": [sys.executable, "-c", SCRIPT, *places, str(out)],
        "transfuse": [sys.executable, "-c", PORT, "port", *places, "-o", str(out), "--method", "naive", "--quiet"],
        "cp + sync": ["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', places[2], str(out)],
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            found[name].append(measured(command, out))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="A naive port beside a plain script.")
    parser.add_argument("--gb", type=float, default=1.0, help="size of each model (default 1)")
    parser.add_argument("--runs", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--form", choices=SHARDS, action="append", help="default: both")
    options = parser.parse_args()
    for form in options.form or SHARDS:
        with tempfile.TemporaryDirectory() as place:
            making = multiprocessing.get_context("spawn").Process(target=make, args=(Path(place), options.gb, form))
            making.start()
            making.join()
            found = compare(Path(place), options.runs)
        medians = {name: [median(column) for column in zip(*rows, strict=True)] for name, rows in found.items()}
        print(f"{form}, {options.gb:g} GB, medians of {options.runs} runs")
        for name, (cpu, wall, peak) in medians.items():
            print(f"  {name:10} CPU {cpu:6.2f} s  wall {wall:6.2f} s  peak {peak:7.0f} MB")
        cpu, wall, peak = (a / b for a, b in zip(medians["transfuse"], medians["script"], strict=True))
        print(f"  transfuse over script: CPU {cpu:.2f}, wall {wall:.2f}, peak {peak:.2f}")


if __name__ == "__main__":
    main()
