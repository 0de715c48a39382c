"""How often the verdict from weights alone is right about what a port then carries: over finished benchmark runs.

    python benchmarks/verdicts.py RESULTS_DIR [...]           # folders that `transfuse bench` wrote
    python benchmarks/verdicts.py RESULTS_DIR [...] --each    # a line for every pair of bases
    python benchmarks/verdicts.py RESULTS_DIR [...] --without cola rte mrpc   # as in docs/benchmarks.md

A cell is a task and a seed. Its gains are shares of the gap: (port - target as it is) / (fine-tune on its own source -
target as it is), at alpha 1, on the test split. Cells with a gap below 10 points have nothing to carry and are left
out; cells of several runs that measured the same are one. A verdict is right where

    same-lineage           naive gains more than half of the gap
    related-coordinates    the method that found it gains more than half
    weak-correspondence    it gains a tenth to a half
    no-correspondence      neither it nor naive gains a tenth
    other-shapes           no method by weights gains a tenth
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from transfuse.bench.recipes.reading import load_recipe
from transfuse.report.records import Alignment, Metric, Ported, Record, Reference, ZeroShot, from_json

LITTLE, MUCH, GAP = 0.1, 0.5, 10.0
NAIVE, FUNCTIONAL = "naive", "functional"
HEAD = ("verdict", "found by", "target", "cells", "cosine", "excess", "naive", "by it", "functional", "right")


@dataclass
class Cell:
    """One task of one pair of bases.

    Attributes:
        gains: method -> share of the gap.
        found: method with a null test -> what it found: verdict, cosine as they are, excess, of the weakest tower.
    """

    target: str
    seed: int
    task: str
    gains: dict[str, float] = field(default_factory=dict)
    found: dict[str, tuple[str, float, float]] = field(default_factory=dict)

    def is_right(self, method: str) -> bool | None:
        """Whether its verdict is, by the rule; None where that method was not run."""
        verdict, naive, own = self.found[method][0], self.gains.get(NAIVE), self.gains.get(method)
        if verdict == "same-lineage":
            return None if naive is None else naive > MUCH
        if own is None:
            return None
        if verdict in ("no-correspondence", "other-shapes"):
            return max(own, naive or 0.0) < LITTLE
        return own > MUCH if verdict == "related-coordinates" else LITTLE <= own <= MUCH


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS_DIR")
    parser.add_argument("--each", action="store_true")
    parser.add_argument("--without", nargs="*", default=[], metavar="TASK", help="Tasks that nothing is drawn from.")
    asked = parser.parse_args()
    cells: dict[tuple, Cell] = {}
    for folder in asked.results:
        read(folder, cells)
    kept = [cell for cell in cells.values() if cell.task not in asked.without]
    rows = each(kept) if asked.each else table(kept)
    print(f"| {' | '.join(HEAD)} |")
    print(f"|{'---|' * 3}{'---:|' * (len(HEAD) - 3)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def read(folder: Path, cells: dict[tuple, Cell]) -> None:
    """Adds what a run measured. What another run measured on the same models adds to the same cells."""
    found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    recipe = load_recipe(folder / "recipe.yaml")
    metrics = {name: Metric(task.primary, task.higher_is_better) for name, task in recipe.tasks.items()}
    kinds = {name: "images" if "image" in task.kind else "text" for name, task in recipe.tasks.items()}
    records = [from_json(one["record"]) for one in found["cells"] if one.get("record")]
    starts, ends = of(records, ZeroShot), of(records, Reference)
    for one in of(records, Ported):
        metric = metrics[one.task]
        start = next(s for s in starts if (s.regime, s.seed, s.task) == (one.regime, one.seed, one.task))
        end = next(e for e in ends if (e.seed, e.task) == (one.seed, one.task))
        low, high, got = (100 * scores[metric.name] for scores in (start.test, end.test, one.at_one))
        if not metric.in_points or high - low < GAP:
            continue
        target = f"{one.regime}, {kinds[one.task]}"
        key = (target, one.seed, one.task, low, high)
        cell = cells.setdefault(key, Cell(target, one.seed, one.task))
        cell.gains[one.method] = (got - low) / (high - low)
        for about in of(records, Alignment):
            if (about.regime, about.seed) == (one.regime, one.seed) and about.null and about.exportable:
                weakest = min(about.null.values(), key=lambda tower: tower["excess"])
                cell.found[about.method] = (about.verdict, weakest["identity"], weakest["excess"])


Kind = TypeVar("Kind", Alignment, ZeroShot, Reference, Ported)


def of(records: Iterable[Record], kind: type[Kind]) -> list[Kind]:
    return [one for one in records if isinstance(one, kind)]


def table(cells: Iterable[Cell]) -> Iterator[tuple[str, ...]]:
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        for method, (verdict, *_) in cell.found.items():
            groups.setdefault((verdict, method, cell.target), []).append(cell)
    totals: dict[str, Counter] = {}
    for (verdict, method, target), inside in sorted(groups.items()):
        judged = Counter(cell.is_right(method) for cell in inside)
        totals.setdefault(verdict, Counter()).update(judged)
        yield verdict, method, target, *_numbers(inside, method), _right(judged)
    for verdict, judged in totals.items():
        yield (f"**{verdict}**", "", "all", str(judged.total()), *[""] * 5, _right(judged))


def each(cells: Iterable[Cell]) -> Iterator[tuple[str, ...]]:
    pairs: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        pairs.setdefault((cell.target, cell.seed), []).append(cell)
    for (target, seed), inside in sorted(pairs.items()):
        for method in sorted(set().union(*(cell.found for cell in inside))):
            with_it = [cell for cell in inside if method in cell.found]
            verdict, judged = with_it[0].found[method][0], Counter(cell.is_right(method) for cell in with_it)
            yield verdict, method, f"{target}, seed {seed}", *_numbers(with_it, method), _right(judged)


def _numbers(cells: list[Cell], method: str) -> tuple[str, ...]:
    said = [f"{fmean(cell.found[method][i] for cell in cells):.2f}" for i in (1, 2)]
    shares = [[cell.gains[one] for cell in cells if one in cell.gains] for one in (NAIVE, method, FUNCTIONAL)]
    return str(len(cells)), *said, *(f"{fmean(one):.0%}" if one else "" for one in shares)


def _right(judged: Counter) -> str:
    count = judged[True] + judged[False]
    return f"{judged[True]} of {count}" if count else "not measured"


if __name__ == "__main__":
    main()
