"""Maps for all spaces of a model, and their file: one safetensors file with JSON metadata."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..errors import InputError
from .algebra import DAMAGED, Map, map_from_tensors
from .file import format_of, read_file, write_file

FORMAT_VERSION = 1
_KEY = "transfuse_maps"


@dataclass(frozen=True)
class Maps:
    """One map for each space that moves, and where they came from. A space without a map stays as it is.

    Attributes:
        spaces: space name (as in the layout the maps were made for) -> map.
        family, method: names of the layout family and of the method.
        streams: "tied" (one residual stream), "junction" (one at every residual sum) or "module" (maps of its own at
            both ends of every module).
        tie_qkv: whether one inner map serves q, k and v of a head.
        norms: "kept", or "folded": the maps are between models whose norm gains are folded (`canonical.py`).
        source, target: fingerprints of the two bases; maps are refused for others.
        options: what the method was called with.
        report: what matching had to say (objective by sweep, heads, layers, ...).
    """

    spaces: Mapping[str, Map]
    family: str = ""
    method: str = ""
    streams: str = "tied"
    tie_qkv: bool = False
    norms: str = "kept"
    source: str = ""
    target: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, space: str) -> Map | None:
        return self.spaces.get(space)

    @property
    def is_identity(self) -> bool:
        """Whether no unit moves."""
        return all(one.is_identity for one in self.spaces.values())

    def inverse(self) -> Maps:
        """The maps from target back to source."""
        spaces = {name: one.inverse() for name, one in self.spaces.items()}
        return replace(self, spaces=spaces, source=self.target, target=self.source, report={})

    def __matmul__(self, other: Maps) -> Maps:
        """The maps that apply `other` (A to B) first, then these (B to C)."""
        forms = [(one.family, one.streams, one.tie_qkv, one.norms) for one in (self, other)]
        if forms[0] != forms[1]:
            raise InputError("only maps of one family and one form can be composed")
        if self.source and other.target and self.source != other.target:
            raise InputError("the second maps start at another model than the first lead to (fingerprints differ)")
        names = [*other.spaces, *(name for name in self.spaces if name not in other.spaces)]
        spaces = {name: _compose(self[name], other[name]) for name in names}
        return replace(self, spaces=spaces, source=other.source, report={})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the maps to one safetensors file with JSON metadata."""
        tensors = {
            f"{name}#{part}": t.clone().contiguous()  # maps that share heads share memory, which the format refuses
            for name, one in self.spaces.items()
            for part, t in one.tensors().items()
        }
        about = {key: getattr(self, key) for key in _ABOUT if key not in ("options", "report", "kinds")}
        about |= {"format_version": FORMAT_VERSION, "options": dict(self.options), "report": dict(self.report)}
        about["kinds"] = {name: one.kind for name, one in self.spaces.items()}
        write_file(path, tensors, _KEY, about, "maps")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Maps:
        """Reads maps written by `save`.

        Raises:
            InputError: no such file, not a maps file, damaged, or written by a newer format.
        """
        about, tensors = read_file(path, _KEY, "maps")
        kinds = _checked_about(path, about).pop("kinds")
        del about["format_version"]
        return cls(spaces={name: _rebuild(path, name, kind, tensors) for name, kind in kinds.items()}, **about)


_ABOUT: dict[str, type] = {
    "family": str,
    "method": str,
    "streams": str,
    "tie_qkv": bool,
    "norms": str,
    "source": str,
    "target": str,
    "options": dict,
    "report": dict,
    "kinds": dict,
}


def _checked_about(path: str | os.PathLike[str], about: Any) -> dict[str, Any]:
    """The metadata of a maps file, every key there and of its type."""
    format_of(path, about, FORMAT_VERSION, "maps", DAMAGED)
    for key, kind in _ABOUT.items():
        if not isinstance(about.get(key), kind):
            raise InputError(f"{path}: {key!r} in its metadata is not {kind.__name__}: {DAMAGED}")
    if unknown := sorted(about.keys() - _ABOUT.keys() - {"format_version"}):
        raise InputError(f"{path}: its metadata has unknown keys {unknown}: {DAMAGED}")
    for key, known in (("streams", ("tied", "junction", "module")), ("norms", ("kept", "folded"))):
        if about[key] not in known:
            raise InputError(f"{path}: {key!r} is {about[key]!r}, none of {', '.join(known)}: {DAMAGED}")
    return about


def _rebuild(path: str | os.PathLike[str], name: str, kind: Any, tensors: Mapping[str, Tensor]) -> Map:
    parts = (key.rpartition("#") for key in tensors)
    try:
        return map_from_tensors(kind, {part: tensors[f"{name}#{part}"] for space, _, part in parts if space == name})
    except InputError as error:
        raise InputError(f"{path}: space {name!r}: {error}") from error


def _compose(after: Map | None, before: Map | None) -> Map:
    if after is None or before is None:
        found = after or before
        assert found is not None
        return found
    if after.source_size != before.size:
        raise InputError(f"the second maps take {after.source_size} units where the first give {before.size}")
    return after @ before
