"""Several updates made into one: the sum, the mean, TIES and DARE."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..maps.random import tensor_generator
from .objects import Dense, Sum, Update, dense, names_of

# The densities of the papers: TIES keeps the largest 20 %; DARE drops 90 % and loses next to nothing.
DENSITIES = {"sum": 1.0, "mean": 1.0, "ties": 0.2, "dare": 0.1}


@dataclass(frozen=True, eq=False)
class Mean(Update):
    """The sum over the number of updates, tensor by tensor; one that lacks a tensor has no say in it."""

    updates: tuple[Update, ...]

    @property
    def names(self) -> Collection[str]:
        return names_of(self.updates)

    def of(self, name: str) -> Tensor:
        return torch.stack([one.of(name) for one in self.updates if name in one.names]).mean(0)


@dataclass(frozen=True, eq=False)
class Ties(Update):
    """TIES (Yadav et al. 2023, 2306.01708).

    Of each update only the entries of largest magnitude stay, tensor by tensor; each entry takes the sign with the
    larger total magnitude, and is the mean of the entries that have that sign. Where the two signs weigh exactly
    the same it is zero; the authors' code takes the sign that most entries have there.

    Attributes:
        density: share of entries that stay.
    """

    updates: tuple[Update, ...]
    density: float

    @property
    def names(self) -> Collection[str]:
        return names_of(self.updates)

    def of(self, name: str) -> Tensor:
        return _elected(torch.stack([_trim(one.of(name), self.density) for one in self.updates if name in one.names]))


@dataclass(frozen=True, eq=False)
class Dropped(Update):
    """DARE's part of one update (Yu et al. 2024, 2311.03099): a random share of entries stays, times its inverse.

    Attributes:
        density: the share that stays.
        seed: of the draw.
        stream: the number of the update among those that are merged; each has entries to drop of its own.
    """

    update: Update
    density: float
    seed: int
    stream: int

    @property
    def names(self) -> Collection[str]:
        return self.update.names

    def of(self, name: str) -> Tensor:
        x = self.update.of(name)
        generator = tensor_generator(self.seed, f"{self.stream}/{name}")
        kept = torch.rand(x.shape, generator=generator, dtype=torch.float64) < self.density
        return torch.where(kept, x / self.density, torch.zeros_like(x))


def merged(updates: Sequence[Update], *, how: str = "sum", density: float | None = None, seed: int = 0) -> Update:
    """One update out of many.

    Args:
        updates: what is merged.
        how: "sum", "mean", "ties" or "dare" (`Sum`, `Mean`, `Ties`; the sum of what `Dropped` leaves).
        density: share of entries that stay in "ties" and "dare"; None for that of the paper (`DENSITIES`).
        seed: of the entries that "dare" drops.

    Raises:
        InputError: an unknown `how`, a density outside (0, 1], or nothing to merge.
    """
    kept, given = check_merge(how, density, len(updates)), tuple(updates)
    if how == "ties":
        return Ties(given, kept)
    if how == "dare":
        return Sum(tuple(Dropped(one, kept, seed, number) for number, one in enumerate(given)))
    return Mean(given) if how == "mean" else Sum(given)


def merge_deltas(
    deltas: Sequence[Mapping[str, Tensor]], *, how: str = "sum", density: float | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """One task vector out of many that are in memory.

    Args:
        deltas: task vectors by tensor name, in any floating dtype; one that lacks a tensor has no say in it.
        how, density, seed: see `merged`.

    Raises:
        InputError: as `merged`.
    """
    return dict(dense(merged([Dense(one) for one in deltas], how=how, density=density, seed=seed)).tensors)


def check_merge(how: str, density: float | None, count: int) -> float:
    """The density that is used.

    Raises:
        InputError: as `merged`.
    """
    if how not in DENSITIES:
        raise InputError(f"there is no way of merging named {how!r}; known: {', '.join(DENSITIES)}")
    if not count:
        raise InputError("there is nothing to merge: no fine-tune was given")
    if density is None:
        return DENSITIES[how]
    if how in ("sum", "mean") and density != 1:
        raise InputError(f"a density is for ties and dare; {how!r} keeps every entry")
    if not 0 < density <= 1:
        raise InputError(f"density is {density}; a share above 0 and up to 1 is needed")
    return density


def _trim(x: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude (all that are equal to the last of them too); the others are zero."""
    if density == 1 or not x.numel():
        return x
    count = max(1, math.ceil(density * x.numel()))
    threshold = x.abs().flatten().kthvalue(x.numel() - count + 1).values
    return torch.where(x.abs() >= threshold, x, torch.zeros_like(x))


def _elected(trimmed: Tensor) -> Tensor:
    """Elected signs and the mean of what agrees with them, over the first dimension."""
    agrees = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    total = torch.where(agrees, trimmed, torch.zeros_like(trimmed)).sum(0)
    return total / agrees.sum(0).clamp_min(1)
