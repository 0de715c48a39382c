"""Which families are known, and which one a checkpoint is of."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import InputError
from . import tables
from .table import Family


def _known() -> Iterator[Family]:
    """Every family that a file in `tables` defines."""
    for one in pkgutil.iter_modules(tables.__path__):
        module = importlib.import_module(f"{tables.__name__}.{one.name}")
        yield from (found for found in vars(module).values() if isinstance(found, Family))


FAMILIES: dict[str, Family] = {family.name: family for family in _known()}


def find_family(config: Mapping[str, Any], kind: str, name: str | None = None) -> Family | None:
    """The family of a checkpoint: the one named, else what its config says, else None.

    Raises:
        InputError: a name that no family has.
    """
    if name is not None:
        if name not in FAMILIES:
            raise InputError(f"unknown family {name!r}; known: {', '.join(FAMILIES)}")
        return FAMILIES[name]
    told = next((family for family in FAMILIES.values() if family.is_known_by(kind, config)), None)
    if told is not None:
        return told
    model_type = config.get("model_type")
    return next((family for family in FAMILIES.values() if model_type in family.model_types), None)
