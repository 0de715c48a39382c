"""Random maps, and generators of their own for whatever is drawn."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..spaces.layout import Layout, Space
from .algebra import Dense, Map, Orthogonal, PerHead, Permutation

if TYPE_CHECKING:
    pass


def tensor_generator(seed: int, name: str) -> torch.Generator:
    """A generator of this tensor's own, so that the order of reading does not matter."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def ones_complement(size: int) -> Tensor:
    """An orthonormal basis of the vectors with mean zero: float64 (size, size - 1)."""
    eye = torch.eye(size, dtype=torch.float64)
    return torch.linalg.qr(eye[:, :-1] - 1 / size)[0]


def random_maps(layout: Layout, generator: torch.Generator, *, group: str = "permutation") -> dict[str, Map]:
    """A random element on every space of a layout that moves.

    Args:
        layout: streams tied or not, as wanted.
        generator: the only source of randomness.
        group: "permutation"; "rotation": rotations of the streams that may be rotated (`rotatable_layout`) and inside
            heads; or "largest": any invertible map inside heads.
    """
    orders: dict[str, Permutation] = {}
    found: dict[str, Map] = {}
    for space in layout.spaces.values():
        if not space.moves:
            continue
        if space.heads is None:
            rotates = group == "rotation" and space.group == "rotation"
            found[space.name] = _rotation(space.size, generator) if rotates else _order(space.size, generator)
            continue
        key = space.name.split("/")[0]
        if key not in orders:
            orders[key] = _order(space.heads, generator)
        found[space.name] = PerHead(orders[key], _inner(space, generator, group))
    return found


def _inner(space: Space, generator: torch.Generator, group: str) -> tuple[Map, ...]:
    assert space.heads is not None
    width = space.size // space.heads
    if "permutation" in (group, space.group):
        return tuple(_order(width, generator) for _ in range(space.heads))
    if group == "rotation":
        return tuple(Orthogonal(_orthogonal(width, generator)) for _ in range(space.heads))
    # Well-conditioned on purpose: an orthogonal factor of a Gaussian matrix, its columns stretched by 1/2 to 3/2.
    made = []
    for _ in range(space.heads):
        stretch = 0.5 + torch.rand(width, dtype=torch.float64, generator=generator)
        made.append(Dense(_orthogonal(width, generator) * stretch))
    return tuple(made)


def _order(size: int, generator: torch.Generator) -> Permutation:
    return Permutation(torch.randperm(size, generator=generator))


def _rotation(size: int, generator: torch.Generator) -> Orthogonal:
    """A random rotation that keeps the vector of ones."""
    basis = ones_complement(size)
    return Orthogonal(1 / size + basis @ _orthogonal(size - 1, generator) @ basis.T)


def _orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
