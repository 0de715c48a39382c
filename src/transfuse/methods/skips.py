"""Whether a source carried by some maps is run with permuted skips: what the method that made them says."""

from __future__ import annotations

from collections.abc import Mapping

from ..maps.algebra import Map
from ..maps.collection import Maps
from ..running.skips import skips_of
from .table import METHODS


def takes_skips(maps: Maps) -> bool:
    """Whether a source carried by these maps is run with permuted skips: not where a method leaves stock ones alone."""
    row = METHODS.get(maps.method)
    return maps.streams == "junction" and (row is None or row.form.permutes_skips)


def needed_skips(maps: Maps, ties: Mapping[str, str] = {}) -> dict[str, Map]:
    """The skips that a source carried by these maps is run with, as `skips_of`; none where it takes none."""
    return skips_of(maps.spaces, ties) if takes_skips(maps) else {}
