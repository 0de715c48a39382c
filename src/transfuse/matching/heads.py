"""The two-level step for attention heads: which head is which, then which unit inside it is which.

Several spaces can share the heads of a layer (q and k one, v and o the other); they take the same head permutation,
each with inner maps of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..maps import Map, Orthogonal, PerHead, Permutation
from .assignment import best_permutation, permutation_score
from .procrustes import best_rotation


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


def inner_maps(scores: Tensor, heads: Tensor, group: str = "permutation") -> PerHead:
    """The best inner maps for given heads (eq. 9, or Procrustes in its place).

    Args:
        scores: (heads * d, heads * d) cross-moments of the space.
        heads: the source head of every target head.
        group: "permutation" or "orthogonal".
    """
    blocks = head_blocks(scores, len(heads))
    return PerHead(Permutation(heads), tuple(_inner(blocks[i, j], group) for i, j in enumerate(heads.tolist())))


def joint_heads(scores: Mapping[str, Tensor], count: int, group: str = "permutation") -> dict[str, PerHead]:
    """The exact best element: heads and inner maps at once, over all spaces that share the heads.

    Every pair of heads is scored by its best inner maps, then the heads are assigned (brute force in the paper's
    Table 3): count^2 small problems for each space.

    Args:
        scores: space -> (heads * d, heads * d) cross-moments.
        count: number of heads.
        group: "permutation" or "orthogonal".
    """
    pair_scores = torch.zeros(count, count, dtype=torch.float64)
    for score in scores.values():
        pair_scores += _pair_scores(head_blocks(score, count).cpu(), group)
    heads = best_permutation(pair_scores)
    return {space: inner_maps(score, heads, group) for space, score in scores.items()}


def head_blocks(scores: Tensor, count: int) -> Tensor:
    """(heads * d, heads * d) -> (target head, source head, d, d)."""
    return scores.unflatten(1, (count, -1)).unflatten(0, (count, -1)).permute(0, 2, 1, 3)


def identity_heads(count: int, width: int, heads: Tensor | None = None) -> PerHead:
    """Heads in natural or given order, nothing moved inside."""
    order = torch.arange(count) if heads is None else heads
    return PerHead(Permutation(order), tuple(Permutation(torch.arange(width)) for _ in range(count)))


def _inner(block: Tensor, group: str) -> Map:
    return Orthogonal(best_rotation(block)) if _rotates(block, group) else Permutation(best_permutation(block))


def _rotates(blocks: Tensor, group: str) -> bool:
    """One unit alone could only change its sign, which what a head adds to its attention (T5's biases) must not."""
    return group == "orthogonal" and blocks.shape[-1] > 1


def _pair_scores(blocks: Tensor, group: str) -> Tensor:
    """(target head, source head): what the best inner map of each pair reaches."""
    if _rotates(blocks, group):  # the nuclear norm
        return torch.linalg.svdvals(blocks.double()).sum(-1)
    scored = [[permutation_score(block, best_permutation(block)) for block in row] for row in blocks]
    return torch.tensor(scored, dtype=torch.float64)
