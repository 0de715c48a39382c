"""The exact orthogonal step: a singular value decomposition (Schönemann 1966)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..maps.random import ones_complement


def best_rotation(scores: Tensor, *, keep_ones: bool = False) -> Tensor:
    """The orthogonal matrix T with the largest <scores, T>.

    Args:
        scores: (n, m); entry (i, j) is the inner product of target unit i with source unit j.
        keep_ones: only matrices that keep the vector of ones, as LayerNorm, which removes the mean, allows; n = m.

    Returns:
        float64 (n, m) on the CPU: its shorter side is orthonormal where n and m differ. Directions on which the scores
        say nothing stay where they are.
    """
    scores = scores.cpu().double()
    size = len(scores)
    if not keep_ones:
        return _polar(scores)
    basis = ones_complement(size)
    return (1 / size + basis @ _polar(basis.T @ scores @ basis) @ basis.T).contiguous()


# From here on a decomposition in float64 takes minutes, and one in float32 is as good for what is measured.
_LARGE = 1024


def _polar(scores: Tensor) -> Tensor:
    # A trace of the identity decides where the scores have no rank, and makes the result the same on every run.
    scores = scores + 1e-9 * torch.linalg.matrix_norm(scores, 2) * torch.eye(*scores.shape, dtype=scores.dtype)
    exact = min(scores.shape) <= _LARGE
    left, _, right = torch.linalg.svd(scores if exact else scores.float(), full_matrices=False)
    found = (left @ right).double()
    return (found if exact else _orthonormal(found)).contiguous()


def _orthonormal(x: Tensor) -> Tensor:
    """The same with its shorter side orthonormal to float64, by Newton-Schulz steps; it is so to float32."""
    for _ in range(2):
        x = 1.5 * x - 0.5 * (x @ (x.T @ x) if x.shape[0] >= x.shape[1] else (x @ x.T) @ x)
    return x
