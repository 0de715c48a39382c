"""Heads by q, k and v alone, as the paper's equations say, or by the output projection, too: which form finds more.

    python benchmarks/transfusion_forms.py

Planted permutations of a random 3-layer, 32-wide ViT (4 heads), target = planted + noise in units of each tensor's own
standard deviation. For every noise and form: the objective reached, relative to that of the planted order and as how
often it is the higher of the two, and the share of units (stream, heads with their insides, MLPs) found.
"""

from __future__ import annotations

import argparse

import torch
from noise import CONFIG, planted_pair, vit_state

import transfuse
from transfuse.evidence.weights import weight_evidence
from transfuse.maps.algebra import Map, PerHead
from transfuse.maps.collection import Maps
from transfuse.models.opening import open_models

NOISES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
FORMS = {"literal": True, "released": False}
EQUAL = 1e-6  # relative: below it two objectives are the same one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=100, help="of each noise")
    parser.add_argument("--method", default="transfusion", help="transfusion or one of its ablations")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=32)
    options = parser.parse_args()
    size = options.layers, options.width
    print("| noise | form | objective | wins | found |\n|---|---|---|---|---|")
    found = {noise: measured(options.method, noise, options.pairs, size) for noise in NOISES}
    for noise, one in found.items():
        show(str(noise), one)
    show("all", torch.cat(list(found.values())))


def show(label: str, found: torch.Tensor) -> None:
    """A row for each form; `found` is (pairs, forms, [objective, share])."""
    objective = found[..., 0]
    for k, form in enumerate(FORMS):
        wins = int((objective[:, k] > objective[:, 1 - k] * (1 + EQUAL)).sum())
        mean, share = found[:, k].mean(0).tolist()
        print(f"| {label} | {form} | {mean:.4f} | {wins} | {share:.3f} |", flush=True)


def measured(method: str, noise: float, pairs: int, size: tuple[int, int]) -> torch.Tensor:
    """(pairs, forms, [objective relative to the planted order's, share of units found])."""
    return torch.tensor([of_pair(method, noise, seed, size) for seed in range(pairs)], dtype=torch.float64)


def of_pair(method: str, noise: float, seed: int, size: tuple[int, int]) -> list[tuple[float, float]]:
    generator = torch.Generator().manual_seed(seed)
    layers, width = size
    source, target, truth = planted_pair(vit_state(generator, layers, width, 2 * width), method, noise, generator)
    form = transfuse.METHODS[method].form
    models = open_models(source, target, config=CONFIG)
    evidence = weight_evidence(models, models.layout.with_ties(streams=form.streams, tie_qkv=form.tie_qkv), "cpu")
    planted = evidence.value({name: truth[name] for name in evidence.layout.spaces if name in truth})
    found = []
    for literal in FORMS.values():
        maps = transfuse.match(source, target, method=method, config=CONFIG, paper_form=literal, null_trials=0)
        found.append((maps.report["objective"][-1] / planted, share_found(maps, truth)))
    return found


def share_found(maps: Maps, truth: dict[str, Map]) -> float:
    """Share of all units that are where they were planted."""
    right = [index(one) == index(truth[name]) for name, one in maps.spaces.items()]
    return float(torch.cat(right).float().mean())


def index(one: Map) -> torch.Tensor:
    return (one.flat() if isinstance(one, PerHead) else one).index


if __name__ == "__main__":
    main()
