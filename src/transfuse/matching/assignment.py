"""The exact permutation step: a linear assignment problem."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def best_permutation(scores: Tensor) -> Tensor:
    """The permutation with the largest sum of scores (Ainsworth et al. 2023, eq. 4).

    Args:
        scores: (n, n); entry (i, j) speaks for source unit j being target unit i.

    Returns:
        int64 (n,) on the CPU: the source unit of every target unit.
    """
    _, columns = linear_sum_assignment(scores.cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).long()


def permutation_score(scores: Tensor, index: Tensor) -> float:
    """Sum of the scores that a permutation picks."""
    return float(scores.gather(1, index.to(scores.device)[:, None]).sum())
