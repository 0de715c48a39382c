"""Coordinate ascent on F(T) = sum_p <target_p, T source_p>, one exact group step at a time.

Algorithm 1 of Rinaldi et al. 2025, and Ainsworth et al. 2023 before it:

    T[s] <- the identity for every space s; spaces inside heads: heads as their singular values say
    anchored start: for every s in the order of the run:
        T[s] <- argmax <M, T> over the group of s, M from what both models share and the spaces set before
    repeat, until a sweep changes nothing:
        for every s (those that share heads at once; in the order of the run, or a random one):
            if a map that M depends on moved since s was last tried:
                M <- sum over the tensors p that hold s of <target_p, T source_p> without T[s]       (size, size)
                P <- argmax <M, T> over the group of s: assignment, Procrustes, or heads and then insides of heads
                if F(T with P) > F(T): T[s] <- P

A step is taken only if it raises F, so F never falls. Of several climbs in different orders the best is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import TransfuseError
from ..maps.algebra import Map, Orthogonal, PerHead, Permutation
from ..spaces.layout import forward_position
from .assignment import best_permutation, permutation_score
from .heads import head_blocks, identity_heads, inner_maps, joint_heads, spectral_heads
from .procrustes import best_rotation
from .protocols import CrossMoments
from .solution import Solution

log = logging.getLogger(__name__)

TOLERANCE = 1e-7  # of the size of the products: below it a gain is rounding
# Rotations improve by ever less and never stop; a planted one is found in two sweeps, and a relative gain of this much
# a sweep moves no accuracy.
ENOUGH = 1e-3


@dataclass(frozen=True)
class CoordinateAscent:
    """The solver: how to climb.

    Attributes:
        group: "permutation", or "orthogonal": rotations where the layout allows them, permutations elsewhere.
        heads: "spectral": heads as singular values say, once (eq. 8). "inner-product": re-matched exactly at each step.
            "in-order": never matched. "flat": the layout knows no heads.
        start: "identity" (the paper's) or "anchored": every space is first set from what both models share without
            knowing other maps (embeddings, biases, norms, heads), then from spaces set before it.
        paper_form: spectra and the step inside heads see q, k and v alone, as in eq. 7 to 9; else they see the output
            projection, too, as in the authors' code, and a step inside heads is one of the whole objective.
        max_sweeps: sweeps at most.
        orders: one climb for each: None for the order of the forward pass, else a seed for a random one.
    """

    group: str = "permutation"
    heads: str = "inner-product"
    start: str = "anchored"
    paper_form: bool = False
    max_sweeps: int = 100
    orders: tuple[int | None, ...] = (None,)

    def solve(self, evidence: CrossMoments, *, progress: bool = False) -> Solution:
        """The best of all climbs, by objective; the first of equals."""
        climbs = [Climb(evidence, self, order) for order in self.orders]
        for one in climbs:
            one.run(progress=progress)
        best = max(climbs, key=lambda one: one.objective[-1])
        return Solution(best.maps, best.objective, best.converged, best.spectral)


@dataclass
class Climb:
    """The state of one climb; `run` gives the maps.

    Attributes:
        order: of the steps; see `CoordinateAscent`.
        maps: space -> its present map.
        objective: F at the start and after every sweep.
        converged: whether the last sweep changed nothing.
        spectral: head group -> heads by singular values.
    """

    evidence: CrossMoments
    options: CoordinateAscent
    order: int | None = None
    maps: dict[str, Map] = field(default_factory=dict)
    objective: list[float] = field(default_factory=list)
    converged: bool = False
    spectral: dict[str, Tensor] = field(default_factory=dict)
    _versions: dict[str, int] = field(default_factory=dict)
    _seen: dict[tuple[str, ...], tuple[int, ...]] = field(default_factory=dict)

    def run(self, *, progress: bool = False) -> dict[str, Map]:
        """Climbs until nothing improves; returns the maps of all spaces that move."""
        groups = self.groups()
        self.set_start(groups)
        self.objective.append(self.evidence.value(self.maps))
        bar = tqdm(total=None, desc="matching", unit="step", disable=not progress)
        for _ in range(self.options.max_sweeps):
            moved = False
            for group in groups:
                moved |= self.step(group)
                bar.update()
            gain = self.record()
            if not moved or (self.options.group == "orthogonal" and gain < ENOUGH):
                self.converged = True
                break
        bar.close()
        return self.maps

    def groups(self) -> list[tuple[str, ...]]:
        """Spaces that are set together: those that share heads; every other one alone."""
        moving = [s.name for s in self.evidence.layout.spaces.values() if s.moves and self.evidence.holders(s.name)]
        ordered = sorted(moving, key=forward_position)
        heads = {name: space.heads for name, space in self.evidence.layout.spaces.items()}
        groups = [tuple(found) for _, found in groupby(ordered, key=lambda s: s.split("/")[0] if heads[s] else s)]
        if self.order is not None:
            shuffled = torch.randperm(len(groups), generator=torch.Generator().manual_seed(self.order))
            groups = [groups[i] for i in shuffled.tolist()]
        return groups

    def set_start(self, groups: Iterable[tuple[str, ...]]) -> None:
        """Fills `maps`: heads by spectra, all else the identity; then anchored, if asked for."""
        groups = sorted(groups, key=lambda group: forward_position(group[0]))
        for group in groups:
            self.set_identity(group)
        if self.options.start == "anchored":
            known: frozenset[str] = frozenset()
            for group in groups:
                self.step(group, known=known)
                known |= frozenset(group)

    def set_identity(self, group: tuple[str, ...]) -> None:
        for space in group:
            about = self.evidence.layout.spaces[space]
            if about.heads is None:
                self.maps[space] = Permutation(torch.arange(about.size))
            else:
                heads = None if self.options.heads == "in-order" else self.heads_by_spectra(group, about.heads)
                self.maps[space] = identity_heads(about.heads, about.size // about.heads, heads)
            self._versions[space] = 0

    def heads_by_spectra(self, group: tuple[str, ...], count: int) -> Tensor:
        key = group[0].split("/")[0]
        if key not in self.spectral:
            pairs = [self.evidence.spectra(space, output=not self.options.paper_form) for space in group]
            target, source = ([one for pair in pairs for one in pair[side]] for side in (0, 1))
            self.spectral[key] = spectral_heads(target, source) if target else torch.arange(count)
        return self.spectral[key]

    def step(self, group: tuple[str, ...], known: frozenset[str] | None = None) -> bool:
        """Sets one group of spaces to its best element given all others; whether F rose."""
        if known is None and self.is_unchanged(group):
            return False
        scores = {space: self.evidence.cross(space, self.maps, known=known) for space in group}
        if not any(score.any() for score in scores.values()):
            return False
        proposed = self.propose(group, scores, known)
        if known is None and not self.rises(group, scores, proposed):
            return False
        for space, found in proposed.items():
            self.maps[space] = found
            self._versions[space] += 1
        return True

    def is_unchanged(self, group: tuple[str, ...]) -> bool:
        """Whether no map that this step depends on moved since it was last tried; remembers that it is tried now."""
        needed = {
            s for space in group for name in self.evidence.holders(space) for s in self.evidence.others(name, space)
        }
        versions = tuple(self._versions.get(space, 0) for space in sorted(needed))
        unchanged = self._seen.get(group) == versions
        self._seen[group] = versions
        return unchanged

    def propose(
        self, group: tuple[str, ...], scores: dict[str, Tensor], known: frozenset[str] | None
    ) -> dict[str, Map]:
        first = self.maps[group[0]]
        if not isinstance(first, PerHead):
            return {group[0]: self.best(group[0], scores[group[0]])}
        if self.options.paper_form:
            scores = {space: self.evidence.cross(space, self.maps, known=known, rows=True) for space in group}
        if self.options.heads in ("spectral", "in-order"):
            return {space: inner_maps(one, first.heads.index, self.options.group) for space, one in scores.items()}
        return dict(joint_heads(scores, len(first.inner), self.options.group))

    def best(self, space: str, scores: Tensor) -> Map:
        """The best element for a space without heads."""
        if self.options.group == "orthogonal" and self.evidence.layout.spaces[space].group == "rotation":
            return Orthogonal(best_rotation(scores, keep_ones=True))
        return Permutation(best_permutation(scores))

    def rises(self, group: tuple[str, ...], scores: dict[str, Tensor], proposed: dict[str, Map]) -> bool:
        quadratic = {n for s in group for n in self.evidence.holders(s) if self.evidence.holds_twice(n, s)}
        if quadratic:  # the scores are only its linear part, so the objective itself decides
            names = {name for space in group for name in self.evidence.holders(space)}
            before, after = (self.evidence.value(maps, names) for maps in (self.maps, {**self.maps, **proposed}))
        else:
            before, after = (sum(_score(scores[s], maps[s]) for s in group) for maps in (self.maps, proposed))
        return after - before > TOLERANCE * max(abs(before), abs(after))

    def record(self) -> float:
        """Notes F after a sweep; by how much it rose, relative to what it is.

        Raises:
            TransfuseError: F fell, which the steps rule out.
        """
        value = self.evidence.value(self.maps)
        if value < self.objective[-1] - 1e-4 * abs(self.objective[-1]):
            raise TransfuseError(
                f"the matching objective fell from {self.objective[-1]} to {value}: please report this"
            )
        gain = (value - self.objective[-1]) / max(abs(value), 1e-30)
        self.objective.append(value)
        log.info("sweep %d: objective %.6g", len(self.objective) - 1, value)
        return gain


def _score(scores: Tensor, found: Map) -> float:
    """<scores, T>."""
    flat = found.flat() if isinstance(found, PerHead) else found
    if isinstance(flat, Permutation):
        return permutation_score(scores, flat.index)
    if isinstance(flat, Orthogonal):
        return float((scores * flat.weight.to(scores)).sum())
    assert isinstance(found, PerHead)
    blocks = head_blocks(scores, len(found.inner))
    pairs = enumerate(found.heads.index.tolist())
    return sum(_score(blocks[i, j], found.inner[i]) for i, j in pairs)
