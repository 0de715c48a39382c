"""Updates of low rank, as products of factors, through all that is done with them until somebody asks for a tensor.

A change B A of a weight is carried by maps as (T_out B) (A T_in^-1): the axes of the output are those of B, the axes of
the input those of A, so each factor takes the maps of its own, whatever they are (`maps/transport.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InputError
from ..maps.transport import SpaceMaps, transport
from ..spaces.axes import Axes, Axis, Part
from .objects import Scale, Update, scale_of

_RANK = Axis((Part(None),))  # the dimension between the factors, which no map moves


@dataclass(frozen=True, eq=False)
class Factors:
    """One tensor as scale * left @ right; the tensor's first dimension is left's, all others are right's.

    The kernel of a convolution, (out, in, height, width), is one too: right is (rank, in, height, width). A table of
    tokens is one as well, and so is a weight that is stored (in, out), its factors in that order.

    Attributes:
        left: (first, rank).
        right: (rank, ...), one dimension or more behind the rank.
        scale: of the product (LoRA's alpha / rank, say).
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """The number of columns of left."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """The tensor itself, float32 at least."""
        dtype = torch.promote_types(torch.promote_types(self.left.dtype, self.right.dtype), torch.float32)
        return self.scale * torch.tensordot(self.left.to(dtype), self.right.to(dtype), 1)

    def mapped(self, maps: SpaceMaps, axes: Axes) -> Factors:
        """The factors of the tensor that `transport` makes of this one: T B and A T^-1."""
        if axes.dims is None:
            return self
        first, *others = axes.dims
        left, right = Axes((first, _RANK)), Axes((_RANK, *others))
        return replace(self, left=transport(self.left, left, maps), right=transport(self.right, right, maps))

    def __add__(self, other: Factors) -> Factors:
        """The sum, whose rank is the sum of the ranks: factors beside each other."""
        left = torch.cat([one.scale * _wide(one.left) for one in (self, other)], 1)
        return Factors(left, torch.cat([self.right, other.right], 0))


def _wide(x: Tensor) -> Tensor:
    """Float32 at least: times a scale, narrow factors would be rounded."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class LowRank(Update):
    """Products of factors, tensor by tensor.

    Attributes:
        factors: canonical name -> factors.

    Raises:
        InputError: factors that do not fit each other.
    """

    factors: Mapping[str, Factors]

    def __post_init__(self) -> None:
        for name, one in self.factors.items():
            if one.left.ndim != 2 or one.right.ndim < 2 or one.right.shape[0] != one.rank:
                shapes = f"{tuple(one.left.shape)} and {tuple(one.right.shape)}"
                raise InputError(
                    f"the low-rank factors of {name!r} are {shapes}; (first, rank) and (rank, ...) of one rank are "
                    "needed: is one of them transposed, or the tensor a vector?"
                )

    @property
    def names(self) -> Collection[str]:
        return self.factors.keys()

    def of(self, name: str) -> Tensor:
        return self.factors[name].dense()

    def scaled(self, by: Scale) -> LowRank:
        """The same factors, other scales."""
        return LowRank({n: replace(one, scale=scale_of(by, n) * one.scale) for n, one in self.factors.items()})

    def __add__(self, other: Update) -> Update:
        """A low rank again, where both are."""
        if not isinstance(other, LowRank):
            return super().__add__(other)
        found = dict(self.factors)
        for name, one in other.factors.items():
            found[name] = found[name] + one if name in found else one
        return LowRank(found)

    def mapped(self, maps: SpaceMaps, axes: Mapping[str, Axes]) -> LowRank:
        """This update of source, in the coordinates of target.

        Args:
            maps: space -> map; a space without one stays.
            axes: of every tensor, by canonical name (`Layout.params`).

        Raises:
            InputError: a tensor has no axes, or of another number than its factors.
        """
        for name, one in self.factors.items():
            found, dims = axes.get(name), one.right.ndim
            if found is None:
                raise InputError(f"the layout has no tensor {name!r}, which low-rank factors are given for")
            if found.dims is not None and len(found.dims) != dims:
                raise InputError(
                    f"the low-rank factors of {name!r} make a tensor of {dims} dimensions, the model's has "
                    f"{len(found.dims)}: factors of a flattened kernel have to get its shape back"
                )
        return LowRank({name: one.mapped(maps, axes[name]) for name, one in self.factors.items()})
