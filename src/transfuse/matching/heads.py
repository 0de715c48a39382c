"""The two-level step for attention heads: which head is which, then which unit inside it is which.

Several spaces can share the heads of a layer (q and k one, v and o the other); they take the same head permutation,
each with inner maps of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..maps.algebra import Map, Orthogonal, PerHead, Permutation, Rectangular
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


def resized_heads(scores: Mapping[str, Tensor], count: int, source_count: int) -> dict[str, Rectangular]:
    """The same between different numbers of heads, or heads of different widths: rotations inside, heads whole.

    Heads are assigned; where target has more, each that is left over takes the one that fits it best.

    Args:
        scores: space -> (target's units, source's units) cross-moments.
        count, source_count: numbers of heads.
    """
    blocks = {space: head_blocks(score, count, source_count) for space, score in scores.items()}
    pairs = torch.stack([torch.linalg.svdvals(one.double()).sum(-1) for one in blocks.values()]).sum(0)
    heads = pairs.argmax(1)
    rows, columns = linear_sum_assignment(pairs.numpy(), maximize=True)
    heads[torch.from_numpy(rows)] = torch.from_numpy(columns)
    found = {}
    for space, score in scores.items():
        weight = torch.zeros(score.shape, dtype=torch.float64)
        mine, its = (size // n for size, n in zip(score.shape, (count, source_count), strict=True))
        for i, j in enumerate(heads.tolist()):
            turned = best_rotation(blocks[space][i, j]) if (mine, its) != (1, 1) else torch.ones(1, 1)
            weight[i * mine : (i + 1) * mine, j * its : (j + 1) * its] = turned
        found[space] = Rectangular(weight)
    return found


def head_blocks(scores: Tensor, count: int, source_count: int | None = None) -> Tensor:
    """(heads * d, source heads * e) -> (target head, source head, d, e)."""
    return scores.unflatten(1, (source_count or count, -1)).unflatten(0, (count, -1)).permute(0, 2, 1, 3)


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
