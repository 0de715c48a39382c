"""Random group elements: planted truths for tests, benchmarks and the demo."""

from __future__ import annotations

import torch

from .layout import Layout, Space
from .maps import Dense, Map, PerHead, Permutation


def random_maps(layout: Layout, generator: torch.Generator, *, group: str = "permutation") -> dict[str, Map]:
    """A random element on every space of a layout that moves.

    Args:
        layout: streams tied or not, as wanted.
        generator: the only source of randomness.
        group: "permutation", or "largest": the largest group each space allows (any invertible map inside heads).
    """
    orders: dict[str, Permutation] = {}
    found: dict[str, Map] = {}
    for space in layout.spaces.values():
        if not space.moves:
            continue
        if space.heads is None:
            found[space.name] = Permutation(torch.randperm(space.size, generator=generator))
            continue
        key = space.name.split("/")[0]
        if key not in orders:
            orders[key] = Permutation(torch.randperm(space.heads, generator=generator))
        found[space.name] = PerHead(orders[key], _inner(space, generator, group))
    return found


def _inner(space: Space, generator: torch.Generator, group: str) -> tuple[Map, ...]:
    assert space.heads is not None
    width = space.size // space.heads
    if group == "permutation":
        return tuple(Permutation(torch.randperm(width, generator=generator)) for _ in range(space.heads))
    # Well-conditioned on purpose: an orthogonal factor of a Gaussian matrix, its columns stretched by 1/2 to 3/2.
    made = []
    for _ in range(space.heads):
        basis, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
        made.append(Dense(basis * (0.5 + torch.rand(width, dtype=torch.float64, generator=generator))))
    return tuple(made)
