"""The contraction every method ends in: each axis takes the map of its space (Rinaldi et al. 2025, eq. 13)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..spaces.axes import Axes, Axis, Part
from .algebra import Map

SpaceMaps = Mapping[str, Map]


def transport(x: Tensor, axes: Axes, maps: SpaceMaps, *, skip: int | None = None) -> Tensor:
    """Carries a tensor of source into the coordinates of target.

    Args:
        x: weights, a difference of weights, or an output of the model; any dtype, kept.
        axes: what its dimensions belong to.
        maps: space -> map; a space without one stays.
        skip: a dimension to leave alone.
    """
    for dim, axis in enumerate(axes.dims or ()):
        if dim != skip:
            x = _move_axis(x, dim, axis, maps)
    return x


def part_slices(axis: Axis, length: int, sizes: Mapping[str, int]) -> list[tuple[Part, int, int]]:
    """(part, start, length) along an axis that is `length` long."""
    lengths = axis.sizes(length, sizes)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return list(zip(axis.parts, starts, lengths, strict=True))


def _move_axis(x: Tensor, dim: int, axis: Axis, maps: SpaceMaps) -> Tensor:
    if not any(p.space and p.space in maps and not maps[p.space].is_identity for p in axis.parts):
        return x
    if len(axis.parts) == 1:
        return _apply(x, dim, axis.parts[0], maps)
    # A part without a map has no known size; an axis has at most one such kind, so its share is what is left over.
    pieces = _split(x, dim, axis, maps)
    return torch.cat([_apply(piece, dim, part, maps) for piece, part in zip(pieces, axis.parts, strict=True)], dim)


def _split(x: Tensor, dim: int, axis: Axis, maps: SpaceMaps) -> tuple[Tensor, ...]:
    known = [maps[p.space].source_size if p.space and p.space in maps else None for p in axis.parts]
    unknown = known.count(None)
    rest = x.shape[dim] - sum(size for size in known if size is not None)
    return x.split([size if size is not None else rest // unknown for size in known], dim)


def _apply(x: Tensor, dim: int, part: Part, maps: SpaceMaps) -> Tensor:
    found = maps.get(part.space) if part.space else None
    if found is None:
        return x
    return (found.dual() if part.dual else found).apply(x, dim)
