"""In which form two bases are matched: the second part of a method. Light to import."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ..models.folding import Folding
    from ..models.model import Models
    from ..spaces.layout import Layout


@dataclass(frozen=True)
class Form:
    """Which units are set together, and what is done to the bases before they are matched.

    Attributes:
        streams: "tied" (one residual stream a tower), "junction" (one at every residual sum) or "module" (none: every
            module has maps of its own at both ends).
        heads: "-" (not matched), "spectral" (singular values, once), "inner-product" (exact, at every step; brute force
            over pairs), "in-order" (only the units inside) or "flat" (all units of all heads in one set).
        tie_qkv: whether q, k and v of a head share one inner map.
        norms: "kept", or "folded" into what reads through them, so that streams may be rotated.
        skips: "stock", or "mapped": the mapped source is run with permuted skips (Rinaldi et al. 2025, eq. 12).

    Raises:
        ValueError: mapped skips with anything but one stream at every sum.
    """

    streams: Literal["tied", "junction", "module"] = "tied"
    heads: Literal["-", "spectral", "inner-product", "in-order", "flat"] = "-"
    tie_qkv: bool = False
    norms: Literal["kept", "folded"] = "kept"
    skips: Literal["stock", "mapped"] = "stock"

    def __post_init__(self) -> None:
        if self.permutes_skips and self.streams != "junction":
            raise ValueError(f"skips are permuted between sums with maps of their own; here streams are {self.streams}")

    def of(self, models: Models) -> tuple[Layout, Folding]:
        """The layout that is matched, and how tensors are folded before they are."""
        from ..models.folding import NO_FOLDING, norm_folding, rotatable_layout

        layout = models.layout.with_ties(streams=self.streams, tie_qkv=self.tie_qkv, flat_heads=self.flattens_heads)
        if self.norms == "kept":
            return layout, NO_FOLDING
        folding = norm_folding(models.layout, [models.source, models.target])
        return rotatable_layout(layout, folding), folding

    def with_inner_maps(self, tie_qkv: bool | None) -> Form:
        """The same with q, k and v tied or not; None leaves it."""
        return self if tie_qkv is None else replace(self, tie_qkv=tie_qkv)

    @property
    def flattens_heads(self) -> bool:
        """Whether the units of all heads are one set."""
        return self.heads == "flat"

    @property
    def permutes_skips(self) -> bool:
        """Whether the mapped source is run with permuted skips."""
        return self.skips == "mapped"

    @property
    def fits_stock_models(self) -> bool:
        """Whether maps of this form lead to a model of the same class: heads stay whole, one stream runs through."""
        return self.streams == "tied" and not self.flattens_heads

    @property
    def keeps_function(self) -> bool:
        """Whether maps of this form from a group that keeps the function do keep it."""
        return self.fits_stock_models or (self.permutes_skips and not self.flattens_heads)
