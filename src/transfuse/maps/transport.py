"""The contraction every method ends in: each axis takes the map of its space (Rinaldi et al. 2025, eq. 13)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..spaces.axes import Axes, Axis, Part
from .algebra import Map

SpaceMaps = Mapping[str, Map]


def transport(x: Tensor, axes: Axes, maps: SpaceMaps, *, skip: int | None = None) -> Tensor:
    """Carries a tensor of source into the coordinates of target.

    Args:
        x: weights, a difference of weights, or an output of the model; any dtype, kept. Narrow floats are computed in
            float32 and rounded once, behind the last axis.
        axes: what its dimensions belong to.
        maps: space -> map; a space without one stays.
        skip: a dimension to leave alone.
    """
    dtype = x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32)) if x.is_floating_point() else x
    for dim, axis in enumerate(axes.dims or ()):
        if dim != skip:
            x = _move_axis(x, dim, axis, maps)
    return x.to(dtype)


def moved_shape(shape: tuple[int, ...], axes: Axes, maps: SpaceMaps) -> tuple[int, ...]:
    """The shape that `transport` gives a tensor of this one."""
    lengths = list(shape)
    for dim, axis in enumerate(axes.dims or ()):
        if _moves(axis, maps):
            found = [maps.get(part.space) if part.space else None for part in axis.parts]
            known = [one for one in found if one is not None]
            rest = lengths[dim] - sum(one.source_size for one in known)
            lengths[dim] = sum(one.size for one in known) + (rest if len(known) < len(found) else 0)
    return tuple(lengths)


def is_moved(axes: Axes, maps: SpaceMaps) -> bool:
    """Whether `transport` does anything to a tensor of these axes."""
    return any(_moves(axis, maps) for axis in axes.dims or ())


def part_slices(axis: Axis, length: int, sizes: Mapping[str, int]) -> list[tuple[Part, int, int]]:
    """(part, start, length) along an axis that is `length` long."""
    lengths = axis.sizes(length, sizes)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    return list(zip(axis.parts, starts, lengths, strict=True))


def _move_axis(x: Tensor, dim: int, axis: Axis, maps: SpaceMaps) -> Tensor:
    if not _moves(axis, maps):
        return x
    if len(axis.parts) == 1:
        return _apply(x, dim, axis.parts[0], maps)
    pieces = _split(x, dim, axis, maps)
    return torch.cat([_apply(piece, dim, part, maps) for piece, part in zip(pieces, axis.parts, strict=True)], dim)


def _moves(axis: Axis, maps: SpaceMaps) -> bool:
    return any(p.space and p.space in maps and not maps[p.space].is_identity for p in axis.parts)


def _split(x: Tensor, dim: int, axis: Axis, maps: SpaceMaps) -> tuple[Tensor, ...]:
    """The parts of an axis. Only maps say sizes: parts without one, side by side, share what is left over.

    Raises:
        InputError: such parts are not side by side, nor of one space, so that their lengths cannot be told apart.
    """
    known = [maps[p.space].source_size if p.space and p.space in maps else None for p in axis.parts]
    bare = [i for i, size in enumerate(known) if size is None]
    rest = x.shape[dim] - sum(size for size in known if size is not None)
    if bare and bare[-1] - bare[0] == len(bare) - 1:
        shares = [rest, *(0 for _ in bare[1:])]  # nothing happens to them, so one may stand for all
    elif len({axis.parts[i].space for i in bare}) > 1:
        raise InputError(f"no map says how long the parts {[axis.parts[i].space or '_' for i in bare]} of an axis are")
    else:
        shares = [rest // len(bare) for _ in bare]
    lengths = dict(zip(bare, shares, strict=True))
    return x.split([lengths[i] if size is None else size for i, size in enumerate(known)], dim)


def _apply(x: Tensor, dim: int, part: Part, maps: SpaceMaps) -> Tensor:
    found = maps.get(part.space) if part.space else None
    if found is None:
        return x
    return (found.dual() if part.dual else found).apply(x, dim)
