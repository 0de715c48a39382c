"""The p-values of shared units (docs/methods.md) on the models of a recipe, target by target.

    transfuse bench table1-clip-vitb16-small -o OUT --data-dir DATA --cache CACHE      # makes the models
    python benchmarks/shared_units.py table1-clip-vitb16-small --data-dir DATA --cache CACHE

Beside the targets stand the sources of other seeds: bases that were trained alone. Several seeds: the counts of each,
and the smallest and the largest p-value.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from transfuse.bench.recipes.reading import load_recipe
from transfuse.bench.store import ModelStore
from transfuse.evidence.shared import SharedUnits, shared_units
from transfuse.evidence.weights import WeightEvidence
from transfuse.methods.table import METHODS
from transfuse.models.opening import open_models
from transfuse.options.groups import Match, Run

Pair = tuple[tuple[str, int], tuple[str, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=["tied", "orthogonal"])
    asked = parser.parse_args()
    recipe = load_recipe(Path(asked.recipe) if asked.recipe.endswith(".yaml") else asked.recipe)
    store = ModelStore(recipe, asked.cache, data_dir=asked.data_dir, device="cpu")
    assert recipe.transport is not None
    source, seeds = recipe.transport.source, recipe.seeds
    pairs: dict[str, list[Pair]] = {
        label: [((source, seed), (target, seed)) for seed in seeds]
        for label, target in recipe.transport.targets.items()
    }
    if len(seeds) > 1:
        pairs["the source of another seed"] = [((source, a), (source, b)) for a in seeds for b in seeds if a < b]
    print("| target | stream by | tower | units | by number | p | by reading and writing | p |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for label, inside in pairs.items():
        for method in asked.methods:
            found = [of_pair(store, pair, method) for pair in inside]
            for tower in found[0]:
                cells = _cells([one[tower] for one in found])
                print(f"| {label} | {method} | {tower} | {' | '.join(cells)} |", flush=True)


def of_pair(store: ModelStore, pair: Pair, method: str) -> dict[str, SharedUnits]:
    row, run = METHODS[method], Run()
    models = open_models(*(store.location(name, seed) for name, seed in pair))

    def solve(evidence: WeightEvidence):
        return row.solver.solve(evidence, row.form, Match(), run).maps

    return shared_units(row.evidence.gather(models, row.form, None, run), solve)


def _cells(found: list[SharedUnits]) -> Iterator[str]:
    yield str(found[0].units)
    for what in ("numbered", "paired"):
        yield ", ".join(str(getattr(one, what)) for one in found)
        ends = [f"{end(getattr(one, f'p_{what}') for one in found):.1g}" for end in (min, max)]
        yield " to ".join(dict.fromkeys(ends))


if __name__ == "__main__":
    main()
