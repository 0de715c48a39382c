"""Inner products of source and target, tensor by tensor, and the cosine they make."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Products(NamedTuple):
    """Of one tensor: <target, T source>, |target|^2, |T source|^2, and whether it is a matrix or more."""

    both: float
    target: float
    source: float
    is_matrix: bool


def cosine(products: Iterable[Products]) -> float:
    """Cosine between target and mapped source over matrices; norm gains and biases are near-constant, so left out."""
    chosen = [one for one in products if one.is_matrix]
    both, target, source = (sum(one[i] for one in chosen) for i in range(3))
    return both / (target * source) ** 0.5 if target and source else 0.0
