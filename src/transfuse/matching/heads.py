"""The two-level step for attention heads: which head is which, then which unit inside it is which.

Several spaces can share the heads of a layer (q and k one, v and o the other); they take the same head permutation,
each with inner permutations of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..maps import PerHead, Permutation
from .assignment import best_permutation, permutation_score


def spectral_heads(target: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
    """Matches heads by their singular values (Rinaldi et al. 2025, eq. 7 and 8).

    Args:
        target, source: for each projection, the singular values of every head's block, (heads, k).

    Returns:
        int64 (heads,): the source head of every target head.
    """
    distance = sum(torch.cdist(t, s) for t, s in zip(target, source, strict=True))
    assert isinstance(distance, Tensor)
    return best_permutation(-distance)


def inner_permutations(scores: Tensor, heads: Tensor) -> PerHead:
    """The best inner permutations for given heads (eq. 9).

    Args:
        scores: (heads * d, heads * d) cross-moments of the space.
        heads: the source head of every target head.
    """
    blocks = head_blocks(scores, len(heads))
    return PerHead(
        Permutation(heads),
        tuple(Permutation(best_permutation(blocks[i, j])) for i, j in enumerate(heads.tolist())),
    )


def joint_heads(scores: Mapping[str, Tensor], count: int) -> dict[str, PerHead]:
    """The exact best element: heads and inner permutations at once, over all spaces that share the heads.

    Every pair of heads is scored by its best inner permutations, then the heads are assigned (brute force in the
    paper's Table 3): count^2 small assignments for each space.

    Args:
        scores: space -> (heads * d, heads * d) cross-moments.
        count: number of heads.
    """
    pair_scores = torch.zeros(count, count, dtype=torch.float64)
    for score in scores.values():
        blocks = head_blocks(score, count).cpu()
        for i in range(count):
            for j in range(count):
                pair_scores[i, j] += permutation_score(blocks[i, j], best_permutation(blocks[i, j]))
    heads = best_permutation(pair_scores)
    return {space: inner_permutations(score, heads) for space, score in scores.items()}


def head_blocks(scores: Tensor, count: int) -> Tensor:
    """(heads * d, heads * d) -> (target head, source head, d, d)."""
    return scores.unflatten(1, (count, -1)).unflatten(0, (count, -1)).permute(0, 2, 1, 3)


def identity_heads(count: int, width: int, heads: Tensor | None = None) -> PerHead:
    """Heads in natural or given order, nothing moved inside."""
    order = torch.arange(count) if heads is None else heads
    return PerHead(Permutation(order), tuple(Permutation(torch.arange(width)) for _ in range(count)))
