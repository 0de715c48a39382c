"""Whether two bases share units at all: p-values of the hidden units of their MLPs (Zhu et al. 2025, 2502.12292).

Units are matched one to one (their algorithm 2), and units that are matched in two ways alike are counted. Matches that
have nothing to do with each other differ by a random permutation, and agree in one unit of a layer on average, however
many it has. The paper takes Spearman's correlation of unit numbers and Fisher's method in place of the count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..maps.random import tensor_generator
from ..maps.transport import SpaceMaps
from ..spaces.layout import tower_of
from .weights import Solve, WeightEvidence

_MLP = re.compile(r"(^|\.)mlp\.\d+$")
SMALLEST = 1e-300  # a p-value below it is said to be this
_MOST = 170  # of 1 / k! the last that float64 holds


@dataclass(frozen=True)
class SharedUnits:
    """How many hidden units of MLPs two bases share, over all layers of a tower.

    `numbered` asks whether units that are alike have one number. Its p-value is exact if the bases were trained apart
    and target's training treats the hidden units of a layer alike: they are drawn from one distribution and no step
    goes by their number. Then every numbering of them was as likely, whatever the data were (the paper's constrained
    setting).

    `paired` asks whether units that read alike also write alike, so it sees units that have other numbers. No test that
    is exact like the first one can: to it a base whose units were re-ordered at random is one that was trained apart.
    This one takes what a unit reads and what it writes to be matched independently where nothing is shared, which is so
    in weights as they are drawn. Trained ones can learn alike from alike data, which is found, too (the paper's other
    setting).

    Attributes:
        layers: how many matches would agree by chance: one a layer.
        units: of all layers.
        numbered: target's units whose match in source, both bases as they are, has the same number.
        p_numbered: chance of as many or more.
        paired: target's units whose match by what they read is their match by what they write, on a stream that was
            mapped without any MLP.
        p_paired: chance of as many or more.
    """

    layers: int
    units: int
    numbered: int
    p_numbered: float
    paired: int
    p_paired: float


def shared_units(evidence: WeightEvidence, solve: Solve, *, seed: int = 0) -> dict[str, SharedUnits]:
    """Counts the units that two bases share.

    Args:
        evidence: of the bases, in any form.
        solve: the matching, which is done on all tensors but those of MLPs, for the stream.
        seed: of how equal matches (units that are zero) are decided.

    Returns:
        Of each tower that has MLPs ("model" where there is one).
    """
    spaces = [space for space in evidence.layout.spaces if _MLP.search(space) and _is_between(evidence, space)]
    if not spaces:
        return {}
    rest = [name for name in evidence.names if not evidence.layout.params[name].spaces & set(spaces)]
    maps = solve(evidence.only(rest))
    towers: dict[str, list[tuple[int, int, int]]] = {}
    for space in spaces:
        found = (evidence.sizes[space], *_counted(evidence, space, maps, seed))
        towers.setdefault(tower_of(space) or "model", []).append(found)
    return {tower: _summed(layers) for tower, layers in towers.items()}


def by_chance(sizes: Sequence[int], count: int) -> float:
    """The probability that random permutations of `sizes` units keep `count` or more in place, all together.

    Exact up to float64 (Montmort's count of derangements, convolved), but `SMALLEST` at least.
    """
    numbers = np.arange(_MOST + 1)
    inverse = np.array([1 / math.factorial(k) for k in numbers.tolist()])
    moved = np.cumsum((-1.0) ** numbers * inverse)  # n! times it: permutations of n that keep none in place
    total = np.ones(1)
    for size in sizes:
        kept = numbers[: size + 1]
        total = np.convolve(total, inverse[kept] * moved[np.minimum(size - kept, _MOST)])
    return float(np.clip(total[count:].sum(), SMALLEST, 1.0))


def _summed(layers: Sequence[tuple[int, int, int]]) -> SharedUnits:
    sizes, numbered, paired = zip(*layers, strict=True)
    counts = (sum(numbered), sum(paired))
    chances = [by_chance(sizes, count) for count in counts]
    return SharedUnits(len(sizes), sum(sizes), counts[0], chances[0], counts[1], chances[1])


def _is_between(evidence: WeightEvidence, space: str) -> bool:
    """Whether both bases have what its units read by and what they write by."""
    ends = [
        dim in axes.inputs
        for axes in (evidence.layout.params[name] for name in evidence.holders(space))
        for dim, axis in enumerate(axes.dims or ())
        if len(axes.dims or ()) > 1 and any(part.space == space for part in axis.parts)
    ]
    return len(set(ends)) == 2


def _counted(evidence: WeightEvidence, space: str, maps: SpaceMaps, seed: int) -> tuple[int, int]:
    """Units of one space that keep their number, and that are matched alike by both of their ends."""
    size = evidence.sizes[space]
    as_is, reads, writes = (_Cosines(size, evidence.device) for _ in range(3))
    for name in evidence.holders(space):
        for is_input, target, (plain, moved) in evidence.rows(name, space, {}, maps):
            as_is.add(target, plain)
            (writes if is_input else reads).add(target, moved)
    numbers, *ends = (
        _matched(one.values(), tensor_generator(seed, f"{space} {what}"))
        for one, what in ((as_is, "as is"), (reads, "reads"), (writes, "writes"))
    )
    return int((numbers == torch.arange(size)).sum()), int((ends[0] == ends[1]).sum())


class _Cosines:
    """Cosines of target's units with source's, over several tensors: (size, size) float64."""

    def __init__(self, size: int, device: torch.device):
        self.products = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.squares = [torch.zeros(size, dtype=torch.float64, device=device) for _ in range(2)]

    def add(self, target: Tensor, source: Tensor) -> None:
        self.products += target @ source.T
        for total, rows in zip(self.squares, (target, source), strict=True):
            total += rows.double().square().sum(1)

    def values(self) -> Tensor:
        """Without them the units that are large in both bases would find each other by their size alone."""
        left, right = (total.sqrt().clamp_min(1e-30) for total in self.squares)
        return self.products / left[:, None] / right


def _matched(cosines: Tensor, generator: torch.Generator) -> Tensor:
    """The source unit of every target unit. Target's go in a random order: of equal matches any is as likely."""
    order = torch.randperm(len(cosines), generator=generator)
    _, columns = linear_sum_assignment(cosines.cpu()[order].numpy(), maximize=True)
    found = torch.empty_like(order)
    found[order] = torch.from_numpy(columns).to(order)
    return found
