"""The map algebra: what carries the units of one model onto the units of another.

A map T sends a vector x of source units to a vector of target units. Maps compose with `@`, invert, and apply along
any axis of a tensor. A permutation is an index gather, never a matrix; an identity never touches the tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError


class Map(ABC):
    """A linear map between the units of a space of source and the same space of target."""

    kind: ClassVar[str]

    @property
    @abstractmethod
    def size(self) -> int:
        """Number of target's units."""

    @property
    def source_size(self) -> int:
        """Number of source's units."""
        return self.size

    @property
    def is_identity(self) -> bool:
        """Whether this map changes nothing."""
        return False

    @abstractmethod
    def apply(self, x: Tensor, dim: int) -> Tensor:
        """T applied along dimension `dim` of `x`, which is `source_size` long there, `size` after; dtype stays."""

    @abstractmethod
    def inverse(self) -> Map:
        """The map back."""

    def dual(self) -> Map:
        """T^-T, what an input axis takes. The map itself for every orthogonal group."""
        return self

    @abstractmethod
    def __matmul__(self, other: Map) -> Map:
        """The map that applies `other` first, then this one."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What a file has to hold to rebuild this map, by part name."""

    def matrix(self) -> Tensor:
        """The dense (size, source_size) float64 matrix of this map; for tests and small cases."""
        return self.apply(torch.eye(self.source_size, dtype=torch.float64), 0)


@dataclass(frozen=True)
class Identity(Map):
    """The map that costs nothing."""

    length: int
    kind: ClassVar[str] = "identity"

    @property
    def size(self) -> int:
        return self.length

    @property
    def is_identity(self) -> bool:
        return True

    def apply(self, x: Tensor, dim: int) -> Tensor:
        return x

    def inverse(self) -> Map:
        return self

    def __matmul__(self, other: Map) -> Map:
        return other

    def tensors(self) -> dict[str, Tensor]:
        return {"size": torch.tensor([self.length])}


@dataclass(frozen=True, eq=False)
class Permutation(Map):
    """Target unit i is source unit `index[i]`."""

    index: Tensor
    kind: ClassVar[str] = "permutation"

    @property
    def size(self) -> int:
        return len(self.index)

    @property
    def is_identity(self) -> bool:
        return bool((self.index == torch.arange(self.size)).all())

    def apply(self, x: Tensor, dim: int) -> Tensor:
        return x if self.is_identity else x.index_select(dim, self.index.to(x.device))

    def inverse(self) -> Permutation:
        return Permutation(torch.argsort(self.index))

    def __matmul__(self, other: Map) -> Map:
        if isinstance(other, Identity):
            return self
        if isinstance(other, Permutation):
            return Permutation(other.index[self.index])
        if isinstance(other, _Matrix):
            return type(other)(other.weight[self.index.to(other.weight.device)])
        return _product(self, other)

    def tensors(self) -> dict[str, Tensor]:
        return {"index": self.index}


@dataclass(frozen=True, eq=False)
class _Matrix(Map):
    """A map that is held as its matrix, shape (size, size)."""

    weight: Tensor

    @property
    def size(self) -> int:
        return self.weight.shape[0]

    def apply(self, x: Tensor, dim: int) -> Tensor:
        return (self.weight.to(x) @ x.movedim(dim, -2)).movedim(-2, dim) if x.ndim > 1 else self.weight.to(x) @ x

    def __matmul__(self, other: Map) -> Map:
        return self if isinstance(other, Identity) else _product(self, other)

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight}


@dataclass(frozen=True, eq=False)
class Dense(_Matrix):
    """Any invertible matrix. Orthogonal ones are equal to their dual."""

    kind: ClassVar[str] = "dense"

    def inverse(self) -> Dense:
        return Dense(torch.linalg.inv(self.weight))

    def dual(self) -> Dense:
        return Dense(torch.linalg.inv(self.weight).T.contiguous())


@dataclass(frozen=True, eq=False)
class Orthogonal(_Matrix):
    """A rotation or reflection: its own dual."""

    kind: ClassVar[str] = "orthogonal"

    def inverse(self) -> Orthogonal:
        return Orthogonal(self.weight.T.contiguous())


@dataclass(frozen=True, eq=False)
class Coupling(_Matrix):
    """A soft assignment, rows and columns summing to one (Imfeld et al. 2024).

    It need not have an inverse; the transposed coupling stands in for it, so no function is kept exactly.
    """

    kind: ClassVar[str] = "coupling"

    def inverse(self) -> Coupling:
        return Coupling(self.weight.T.contiguous())


@dataclass(frozen=True, eq=False)
class Rectangular(_Matrix):
    """Any matrix, as between different numbers of units, shape (target's, source's). The pseudo-inverse leads back."""

    kind: ClassVar[str] = "rectangular"

    @property
    def source_size(self) -> int:
        return self.weight.shape[1]

    def inverse(self) -> Rectangular:
        return Rectangular(self._back)

    def dual(self) -> Rectangular:
        return Rectangular(self._back.T.contiguous())

    @cached_property
    def _back(self) -> Tensor:
        """The pseudo-inverse: a decomposition, which several tensors need."""
        return torch.linalg.pinv(self.weight)


@dataclass(frozen=True, eq=False)
class PerHead(Map):
    """Heads move as a whole, and every head has a map of its own inside (Rinaldi et al. 2025, eq. 24).

    Target head i is `inner[i]` applied to source head `heads.index[i]`.
    """

    heads: Permutation
    inner: tuple[Map, ...]
    kind: ClassVar[str] = "per-head"

    @property
    def size(self) -> int:
        return sum(one.size for one in self.inner)

    @property
    def source_size(self) -> int:
        return sum(one.source_size for one in self.inner)

    @property
    def is_identity(self) -> bool:
        return self.heads.is_identity and all(one.is_identity for one in self.inner)

    def flat(self) -> Permutation | None:
        """This map as one permutation of all units, or None when an inner map is not one."""
        width = self.inner[0].size
        rows = []
        for head, one in zip(self.heads.index.tolist(), self.inner, strict=True):
            if isinstance(one, Identity):
                rows.append(torch.arange(width) + head * width)
            elif isinstance(one, Permutation):
                rows.append(one.index + head * width)
            else:
                return None
        return Permutation(torch.cat(rows))

    def apply(self, x: Tensor, dim: int) -> Tensor:
        if self.is_identity:
            return x
        if (flat := self.flat()) is not None:
            return flat.apply(x, dim)
        blocks = x.movedim(dim, 0).unflatten(0, (len(self.inner), -1))
        moved = [one.apply(blocks[h], 0) for h, one in zip(self.heads.index.tolist(), self.inner, strict=True)]
        return torch.stack(moved).flatten(0, 1).movedim(0, dim)

    def inverse(self) -> PerHead:
        back = self.heads.inverse()
        return PerHead(back, tuple(self.inner[i].inverse() for i in back.index.tolist()))

    def dual(self) -> PerHead:
        return PerHead(self.heads, tuple(one.dual() for one in self.inner))

    def __matmul__(self, other: Map) -> Map:
        if isinstance(other, Identity):
            return self
        if not isinstance(other, PerHead) or len(other.inner) != len(self.inner):
            return _product(self, other)
        mine = self.heads.index.tolist()
        inner = tuple(one @ other.inner[h] for one, h in zip(self.inner, mine, strict=True))
        return PerHead(Permutation(other.heads.index[self.heads.index]), inner)

    def tensors(self) -> dict[str, Tensor]:
        flat = self.flat()
        if flat is None:
            kind = _joined([type(one) for one in self.inner])
            part = "weight" if kind is Dense else kind.kind
            return {"heads": self.heads.index, part: torch.stack([one.matrix() for one in self.inner])}
        width = self.inner[0].size
        return {"heads": self.heads.index, "index": (flat.index % width).view(len(self.inner), width)}


def _kinds(one: Map) -> list[type[Map]]:
    return [type(inner) for inner in one.inner] if isinstance(one, PerHead) else [type(one)]


def _joined(kinds: Sequence[type[Map]]) -> type[Map]:
    """The kind of a product or a mixture of maps that are not the identity: the narrowest that all of them keep to.

    A coupling is none any more once it is rotated, and it need not have an inverse, so it is any matrix then.
    """
    found = set(kinds) - {Identity, Permutation}
    if len(found) < 2:
        return found.pop() if found else Permutation
    return Rectangular if found & {Coupling, Rectangular} else Dense


def _product(after: Map, before: Map) -> Map:
    """The map that applies `before` first, by their matrices, in the dtype of the first one that is held as such."""
    dtype = next((one.weight.dtype for one in (after, before) if isinstance(one, _Matrix)), torch.float64)
    matrices = (one.weight if isinstance(one, _Matrix) else one.matrix() for one in (after, before))
    weight = torch.matmul(*(one.to(dtype) for one in matrices))
    kind: Any = _joined([*_kinds(after), *_kinds(before)])
    return Permutation(weight.argmax(1)) if kind is Permutation else kind(weight)


def map_from_tensors(kind: str, tensors: Mapping[str, Tensor]) -> Map:
    """Rebuilds a map from what `Map.tensors` gave.

    Raises:
        InputError: an unknown kind, a tensor that is missing or of the wrong form, indices that are no permutation, a
            matrix without an inverse.
    """
    if kind == Identity.kind:
        return Identity(_checked_size(_part(tensors, "size")))
    if kind == Permutation.kind:
        return _checked_index(_part(tensors, "index"))
    if kind == Dense.kind:
        return _checked_dense(_part(tensors, "weight"))
    if kind == Orthogonal.kind:
        return _checked_orthogonal(_part(tensors, "weight"))
    if kind == Coupling.kind:
        return _checked_coupling(_part(tensors, "weight"))
    if kind == Rectangular.kind:
        return _checked_rectangular(_part(tensors, "weight"))
    if kind == PerHead.kind:
        heads = _checked_index(_part(tensors, "heads"))
        part = next((name for name in ("index", "orthogonal", "coupling", "rectangular") if name in tensors), "weight")
        inner = _part(tensors, part)
        if inner.dim() < 2 or len(inner) != heads.size:
            raise InputError(f"{heads.size} heads have an inner map of shape {tuple(inner.shape)}: {DAMAGED}")
        return PerHead(heads, tuple(_INNER[part](one.clone()) for one in inner))
    raise InputError(f"a map of kind {kind!r} is unknown to this version of transfuse")


DAMAGED = "the maps file is damaged"


def _part(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise InputError(f"the part {name!r} of a map is missing: {DAMAGED}")
    return tensors[name]


def _checked_size(size: Tensor) -> int:
    if size.dtype != torch.int64 or size.shape != (1,) or size.item() < 0:
        raise InputError(f"the size of a map is not one whole number: {DAMAGED}")
    return int(size.item())


def _checked_index(index: Tensor) -> Permutation:
    if index.dtype != torch.int64 or index.dim() != 1 or not torch.equal(index.sort().values, torch.arange(len(index))):
        raise InputError(f"the indices of a map are no permutation: {DAMAGED}")
    return Permutation(index)


def _checked_dense(weight: Tensor) -> Dense:
    if not _is_square(weight) or torch.linalg.matrix_rank(weight.double()) < len(weight):
        raise InputError(f"the matrix of a map has no inverse: {DAMAGED}")
    return Dense(weight)


def _checked_orthogonal(weight: Tensor) -> Orthogonal:
    if not _is_square(weight) or (weight.double() @ weight.double().T - torch.eye(len(weight))).abs().max() > 1e-4:
        raise InputError(f"the matrix of a map is not orthogonal: {DAMAGED}")
    return Orthogonal(weight)


def _checked_coupling(weight: Tensor) -> Coupling:
    if not _is_square(weight) or bool((weight < 0).any()) or max((weight.sum(d) - 1).abs().max() for d in (0, 1)) > 0.1:
        raise InputError(f"the rows and columns of a coupling do not sum to one: {DAMAGED}")
    return Coupling(weight)


def _checked_rectangular(weight: Tensor) -> Rectangular:
    if not weight.is_floating_point() or weight.dim() != 2 or not torch.isfinite(weight).all():
        raise InputError(f"a map between different numbers of units is no finite matrix: {DAMAGED}")
    return Rectangular(weight)


def _is_square(weight: Tensor) -> bool:
    square = weight.is_floating_point() and weight.dim() == 2 and weight.shape[0] == weight.shape[1]
    return square and bool(torch.isfinite(weight).all())


_INNER: dict[str, Callable[[Tensor], Map]] = {
    "index": _checked_index,
    "orthogonal": _checked_orthogonal,
    "coupling": _checked_coupling,
    "rectangular": _checked_rectangular,
    "weight": _checked_dense,
}
