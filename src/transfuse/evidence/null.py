"""The null test: whether an alignment is more than what matching reaches where nothing is shared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..maps.collection import Maps
from ..maps.random import tensor_generator
from ..maps.transport import part_slices
from ..models.products import Products, cosine
from .shared import SharedUnits, shared_units
from .weights import Reader, Solve, WeightEvidence, by_part, keeping, layers_by_tower


@dataclass(frozen=True)
class NullTest:
    """Whether the alignment found is more than fitting noise.

    The same matching runs against shuffled targets: whatever similarity it reaches there comes from the freedom of the
    maps alone. Two shuffles, since one is not strict enough: trained weights concentrate in some rows and columns,
    which alone lets matching reach more than on shuffled entries, also where nothing is shared (docs/methods.md).
    All similarities are cosines over the matrices of the layers: embeddings of one vocabulary agree in models whose
    layers share nothing.

    Attributes:
        identity: of source and target as they are.
        matched: after matching.
        entries: after matching against targets whose entries are shuffled inside every tensor.
        orders: after matching against targets whose rows and columns are re-ordered, in every tensor by itself: its
            norms and spectrum stay, what tensors agree on is gone.
        excess: by how much matched exceeds the larger mean of the two, as a share of what that leaves to 1 (not their
            ratio: rotations reach twice as much by chance as permutations, so that it would hide what they find).
        z: matched minus that mean, in standard deviations of that shuffle (0.005 at least).
        layers: mean over all shuffled targets, by part of the model.
        shared: p-values: whether units are shared at all. None where there are no MLPs, and in old maps files.
    """

    identity: float
    matched: float
    entries: tuple[float, ...]
    orders: tuple[float, ...]
    excess: float
    z: float
    layers: Mapping[str, float] = field(default_factory=dict)
    shared: SharedUnits | None = None

    @property
    def verdict(self) -> str:
        """ "related-coordinates", "weak-correspondence" or "no-correspondence"."""
        if self.excess <= WEAK or self.z <= MIN_Z:
            return "no-correspondence"
        return "related-coordinates" if self.excess > STRONG else "weak-correspondence"


# Measured in docs/benchmarks.md ("Null test").
WEAK, STRONG, MIN_Z, MIN_SPREAD = 0.05, 0.25, 3.0, 0.005


def null_test(
    evidence: WeightEvidence,
    before: Mapping[str, Products],
    after: Mapping[str, Products],
    solve: Solve,
    *,
    trials: int = 3,
    seed: int = 0,
) -> dict[str, NullTest]:
    """Compares the alignment that maps reach with what matching reaches against shuffled targets.

    Args:
        evidence: what was matched, in the form in which it was.
        before, after: its products as the bases are, and with the maps that `solve` found.
        solve: the matching that was done, which is done again on every shuffled target.
        trials: targets of each shuffle.
        seed: of the first of them; the others count on from it.

    Returns:
        One test for each tower ("model" where there is one).
    """
    towers = layers_by_tower(evidence)
    parts = {tower: by_part(names) for tower, names in towers.items()}

    def reached(target: Reader) -> dict[str, Products]:
        shuffled = evidence.against(keeping(target))  # shuffling costs more than reading
        return shuffled.products(solve(shuffled))

    def cosines(found: Mapping[str, Products], tower: str) -> float:
        return cosine(found[name] for name in towers[tower])

    read, seeds = evidence.target, range(seed, seed + trials)
    entries = [reached(_entries_shuffled(read, seed)) for seed in seeds]
    orders = [reached(_orders_shuffled(read, evidence, seed)) for seed in seeds]
    shared = shared_units(evidence, solve, seed=seed)
    return {
        tower: _null_test(
            cosines(before, tower),
            cosines(after, tower),
            tuple(cosines(one, tower) for one in entries),
            tuple(cosines(one, tower) for one in orders),
            {part: _mean(cosine(one[n] for n in names) for one in entries + orders) for part, names in inside.items()},
            shared.get(tower),
        )
        for tower, inside in parts.items()
    }


def _null_test(
    identity: float,
    matched: float,
    entries: tuple[float, ...],
    orders: tuple[float, ...],
    layers: Mapping[str, float],
    shared: SharedUnits | None,
) -> NullTest:
    stricter = torch.tensor(max(entries, orders, key=sum), dtype=torch.float64)
    mean = float(stricter.mean())
    spread = max(float(stricter.std()) if len(stricter) > 1 else 0.0, MIN_SPREAD)
    excess = (matched - mean) / max(1 - mean, 1e-12)
    return NullTest(identity, matched, entries, orders, excess, (matched - mean) / spread, layers, shared)


def _mean(values: Iterable[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).mean())


def _entries_shuffled(read: Reader, seed: int) -> Reader:
    def shuffled(name: str) -> Tensor:
        tensor = read(name)
        return tensor.flatten()[torch.randperm(tensor.numel(), generator=tensor_generator(seed, name))].view(
            tensor.shape
        )

    return shuffled


def _orders_shuffled(read: Reader, evidence: WeightEvidence, seed: int) -> Reader:
    def shuffled(name: str) -> Tensor:
        tensor, generator = read(name), tensor_generator(seed, name)
        for dim, axis in enumerate(evidence.layout.params[name].dims or ()):
            slices = part_slices(axis, tensor.shape[dim], evidence.sizes)  # q, k and v of a fused tensor stay apart
            order = torch.cat([start + torch.randperm(length, generator=generator) for _, start, length in slices])
            tensor = tensor.index_select(dim, order)
        return tensor

    return shuffled


def stored_null(maps: Maps) -> dict[str, NullTest] | None:
    """The null test that was run when the maps were made, if it was."""
    found = maps.report.get("null")
    if not found:
        return None
    return {tower: _stored(one) for tower, one in found.items()}


def _stored(found: Mapping[str, Any]) -> NullTest:
    lists = {key: tuple(found[key]) for key in ("entries", "orders")}
    shared = found.get("shared")
    return NullTest(**{**found, **lists, "shared": SharedUnits(**shared) if shared else None})
