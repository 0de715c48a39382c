"""Weighted ridge regressions from running sums: what a module should give, from what it gets.

Rows come in batches and in halves; nothing but cross-moments is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..evidence.activations import zeros


@dataclass
class Fit:
    """Running sums of one weighted least-squares problem: rows h (in) and z (out).

    Attributes:
        weight: sum of the weights of the rows.
        h, z: weighted sums.
        gram, cross: weighted sums of h h^T and z h^T.
    """

    weight: float = 0.0
    h: Tensor = field(default_factory=lambda: torch.zeros(0))
    z: Tensor = field(default_factory=lambda: torch.zeros(0))
    gram: Tensor = field(default_factory=lambda: torch.zeros(0))
    cross: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, h: Tensor, z: Tensor, weights: Tensor) -> None:
        """Adds rows: (n, in), (n, out), (n,) of one dtype; products in it, sums in float64."""
        scaled = h * weights[:, None]
        self.weight += float(weights.sum(dtype=torch.float64))
        if not self.gram.numel():
            self.h, self.z, self.gram, self.cross = zeros(h, 1), zeros(z, 1), zeros(h, 1, h), zeros(z, 1, h)
        self.h += scaled.sum(0)
        self.z += weights @ z
        self.gram += scaled.T @ h
        self.cross += z.T @ scaled

    def __add__(self, other: Fit) -> Fit:
        """The sums over the rows of both."""
        sums = self.h + other.h, self.z + other.z, self.gram + other.gram, self.cross + other.cross
        return Fit(self.weight + other.weight, *sums)

    def times(self, share: float) -> Fit:
        """The sums with all weights so many times as large."""
        sums = (share * one for one in (self.h, self.z, self.gram, self.cross))
        return Fit(share * self.weight, *sums)

    def centred(self, *, bias: bool) -> tuple[Tensor, Tensor]:
        """Means of h h^T and z h^T over all rows, what a bias takes care of taken off."""
        gram, cross = self.gram / self.weight, self.cross / self.weight
        if not bias:
            return gram, cross
        mean_h, mean_z = self.h / self.weight, self.z / self.weight
        return gram - torch.outer(mean_h, mean_h), cross - torch.outer(mean_z, mean_h)

    def solve(self, prior: Tensor, ridge: float, *, bias: bool) -> tuple[Tensor, Tensor | None]:
        """The weight (out, in) and bias (out,) that fit best.

        Args:
            prior: (out, in), what is kept where the inputs say nothing.
            ridge: pull toward it, as a share of the mean square of h.
            bias: whether there is one; it is not held back.
        """
        gram, cross = self.centred(bias=bias)
        weight = _Ridges(gram, cross, prior.to(gram)).solve(ridge)
        return weight, (self.z - weight @ self.h) / self.weight if bias else None


class _Ridges:
    """One ridge regression for any strength of the pull: one decomposition serves them all."""

    def __init__(self, gram: Tensor, cross: Tensor, prior: Tensor):
        values, self.vectors = torch.linalg.eigh(gram)
        self.values = values.clamp_min(0)
        self.unit = float(gram.diagonal().mean())
        self.prior = prior
        # What the prior leaves to fit. Where the inputs say nothing that is rounding alone, which a weak pull blows up.
        silent = self.values <= self.values.max() * len(gram) * torch.finfo(gram.dtype).eps
        self.missed = ((cross - prior @ gram) @ self.vectors).masked_fill(silent, 0)

    def solve(self, ridge: float) -> Tensor:
        pull = max(ridge, _FLOOR) * self.unit + torch.finfo(self.values.dtype).tiny
        return self.prior + (self.missed / (self.values + pull)) @ self.vectors.T


_FLOOR = 1e-10  # with a weaker pull rounding would rule where the inputs say nothing
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def chosen_ridge(halves: Sequence[Fit], prior: Tensor, *, bias: bool) -> float:
    """The pull that predicts best what it was not fitted on: each half of the inputs by the fit to the other."""
    sums = [one.centred(bias=bias) for one in halves]
    fits = [_Ridges(gram, cross, prior.to(gram)) for gram, cross in sums]

    def error(ridge: float) -> float:
        total = 0.0
        for one, (gram, cross) in zip(fits, reversed(sums), strict=True):
            weight = one.solve(ridge)
            total += float(((weight @ gram) * weight).sum() - 2 * (weight * cross).sum())
        return total

    return min(RIDGES, key=error)
