"""Coordinate ascent on F(T) = sum_p <target_p, T source_p>, one exact group step at a time.

Algorithm 1 of Rinaldi et al. 2025, and Ainsworth et al. 2023 before it:

    T[s] <- the identity for every space s; spaces inside heads: heads as their singular values say
    anchored start: for every s in the order of the run:
        T[s] <- argmax <M, T> over the group of s, M from what both models share and the spaces set before
    repeat, until a sweep changes nothing:
        for every s (those that share heads at once; in the order of the run):
            if a map that M depends on moved since s was last tried:
                M <- sum over the tensors p that hold s of <target_p, T source_p> without T[s]       (size, size)
                P <- argmax <M, T> over the group of s: assignment, Procrustes, or heads and then insides of heads
                if F(T with P) > F(T): T[s] <- P

A step is taken only if it raises F, so F never falls in a climb. Restarts are an iterated local search (Lourenço et al.
2003): each climbs from the best maps so far, a random part of them drawn anew, and sweeps in another order every time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import TransfuseError
from ..maps.algebra import Map, Orthogonal, PerHead, Permutation
from ..maps.random import random_maps, tensor_generator
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
DRAWN = 1 / 3  # of the maps, on average, a restart draws anew; between 0.2 and 0.5 it matters little


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
        restarts: further climbs.
        seed: of restarts, each of which has a generator of its own.
    """

    group: str = "permutation"
    heads: str = "inner-product"
    start: str = "anchored"
    paper_form: bool = False
    max_sweeps: int = 100
    restarts: int = 0
    seed: int = 0

    def solve(self, evidence: CrossMoments, *, progress: bool = False) -> Solution:
        """The best of all climbs, by objective; the first of equals."""
        best = first = Climb(evidence, self)
        first.run(progress=progress)
        for number in range(self.restarts):
            one = Climb(evidence, self, tensor_generator(self.seed, f"restart {number}"), best.maps)
            one.run(progress=progress)
            best = max(best, one, key=lambda climb: climb.objective[-1])
        return Solution(best.maps, best.objective, best.converged, first.spectral)


@dataclass
class Climb:
    """The state of one climb; `run` gives the maps.

    Attributes:
        generator: of a restart; without one the first climb, in the order of the forward pass.
        origin: maps that a restart sets out from.
        maps: space -> its present map.
        objective: F at the start and after every sweep.
        converged: whether the last sweep changed nothing.
        spectral: head group -> heads by singular values.
    """

    evidence: CrossMoments
    options: CoordinateAscent
    generator: torch.Generator | None = None
    origin: Mapping[str, Map] = field(default_factory=dict)
    maps: dict[str, Map] = field(default_factory=dict)
    objective: list[float] = field(default_factory=list)
    converged: bool = False
    spectral: dict[str, Tensor] = field(default_factory=dict)
    _versions: dict[str, int] = field(default_factory=dict)
    _seen: dict[tuple[str, ...], tuple[int, ...]] = field(default_factory=dict)

    def run(self, *, progress: bool = False) -> dict[str, Map]:
        """Climbs until nothing improves; returns the maps of all spaces that move."""
        groups = self.groups()
        if self.generator is None:
            self.set_start(groups)
        else:
            self.set_restart(groups, self.generator)
        self.objective.append(self.evidence.value(self.maps))
        bar = tqdm(total=None, desc="matching", unit="step", disable=not progress)
        for _ in range(self.options.max_sweeps):
            moved = False
            for group in self.shuffled(groups):
                moved |= self.step(group)
                bar.update()
            gain = self.record()
            if not moved or (self.options.group == "orthogonal" and gain < ENOUGH):
                self.converged = True
                break
        bar.close()
        return self.maps

    def groups(self) -> list[tuple[str, ...]]:
        """Spaces that are set together, in the order of the forward pass: those that share heads, every other alone."""
        moving = [s.name for s in self.evidence.layout.spaces.values() if s.moves and self.evidence.holders(s.name)]
        ordered = sorted(moving, key=forward_position)
        heads = {name: space.heads for name, space in self.evidence.layout.spaces.items()}
        return [tuple(found) for _, found in groupby(ordered, key=lambda s: s.split("/")[0] if heads[s] else s)]

    def shuffled(self, groups: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
        """The order of one sweep: in restarts another one every time."""
        if self.generator is None:
            return groups
        return [groups[i] for i in torch.randperm(len(groups), generator=self.generator).tolist()]

    def set_start(self, groups: Iterable[tuple[str, ...]]) -> None:
        """Fills `maps`: heads by spectra, all else the identity; then anchored, if asked for."""
        for group in groups:
            self.set_identity(group)
        if self.options.start == "anchored":
            known: frozenset[str] = frozenset()
            for group in groups:
                self.step(group, known=known)
                known |= frozenset(group)

    def set_restart(self, groups: Iterable[tuple[str, ...]], generator: torch.Generator) -> None:
        """Fills `maps`: those of `origin`, some drawn anew; heads that are never matched keep their order."""
        self.maps = dict(self.origin)
        self._versions = dict.fromkeys(self.maps, 0)
        kind = "rotation" if self.options.group == "orthogonal" else "permutation"
        drawn = random_maps(self.evidence.layout, generator, group=kind)
        for group in groups:
            if float(torch.rand((), generator=generator)) >= DRAWN:
                continue
            for space in group:
                found, old = drawn[space], self.maps[space]
                if self.options.heads == "in-order" and isinstance(found, PerHead) and isinstance(old, PerHead):
                    found = PerHead(old.heads, found.inner)
                self.maps[space] = found

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
