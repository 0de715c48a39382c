"""What a solver gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..maps.algebra import Map


@dataclass(frozen=True)
class Solution:
    """Maps, and how they were found.

    Attributes:
        maps: space -> map.
        objective: F at the start and after every sweep; of one pass, at the start and the end; empty without one.
        converged: whether nothing was left to improve.
        spectral: head group -> heads by singular values, where they were looked at.
    """

    maps: Mapping[str, Map]
    objective: list[float] = field(default_factory=list)
    converged: bool = True
    spectral: Mapping[str, Tensor] = field(default_factory=dict)
