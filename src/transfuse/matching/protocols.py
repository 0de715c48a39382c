"""What solvers ask of their evidence, which is gathered elsewhere: cross-moments, space by space."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from torch import Tensor

from ..maps.transport import SpaceMaps
from ..spaces.layout import Layout


class CrossMoments(Protocol):
    """Moments that depend on the maps of other spaces, as those of weights do.

    Attributes:
        layout: whose spaces they are.
    """

    layout: Layout

    def holders(self, space: str) -> list[str]:
        """The tensors that have an axis in a space."""
        ...

    def others(self, name: str, space: str) -> frozenset[str]:
        """The spaces whose maps a tensor's part of the moments of `space` depends on."""
        ...

    def cross(self, space: str, maps: SpaceMaps, *, known: frozenset[str] | None = None, rows: bool = False) -> Tensor:
        """Moments (size, size) of a space given the maps of others; `known`, `rows`: see `WeightEvidence.cross`."""
        ...

    def row_squares(self, space: str, maps: SpaceMaps) -> tuple[Tensor, Tensor]:
        """Squared norms (size,) of the rows that `cross(rows=True)` multiplies: of target, of source."""
        ...

    def holds_twice(self, name: str, space: str) -> bool:
        """Whether two axes of a tensor hold a space, so that the objective is quadratic in its map."""
        ...

    def value(self, maps: SpaceMaps, names: Iterable[str] | None = None) -> float:
        """The objective F(T) over all tensors, or over `names`."""
        ...

    def spectra(self, space: str, *, output: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Singular values of every head's block, by projection: lists of (heads, k), of target and of source."""
        ...


class SpaceMoments(Protocol):
    """Moments that depend on no map, as those of activations do."""

    @property
    def layout(self) -> Layout:
        """Whose spaces they are."""
        ...

    @property
    def scores(self) -> Mapping[str, Tensor]:
        """Space -> (target units, source units)."""
        ...

    @property
    def source_heads(self) -> Callable[[str], int | None] | None:
        """Space -> number of source's heads, where source is of another width or depth than target; else None."""
        ...

    def spreads(self, space: str) -> Tensor | None:
        """Sums of squared distances to the mean in a space, (2,): of target, of source; None where nothing was seen."""
        ...
