"""What a family says of itself: towers, and rows of a table that give every tensor its axes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..spaces.layout import TOWERS

Lookup = tuple[str | Callable[[Mapping[str, Any]], Any], ...]


@dataclass(frozen=True)
class Tower:
    """One stack of transformer layers and what hangs on it.

    Attributes:
        table: rows as in the module docstring.
        name: prefix of its spaces (`vision.` in a model of two towers, else empty); one of `TOWERS`.
        heads, layers, norm, activation: where the config says it. Keys to look up in order (dotted for nested ones,
            "=pre" for a value that is always the same), or functions of the config.
    """

    table: str
    name: str = ""
    heads: Lookup = ("num_attention_heads",)
    layers: Lookup = ("num_hidden_layers",)
    norm: Lookup = ("=pre",)
    activation: Lookup = ("hidden_act",)


@dataclass(frozen=True)
class Tie:
    """Two spaces that are one, unless a tensor between them is there ("": always)."""

    space: str
    same_as: str
    unless: str = ""


@dataclass(frozen=True)
class Family:
    """A model family: everything that has to be known about its parameters.

    Attributes:
        name: as in `--family`.
        model_types: `model_type` of configs it serves, each with a prefix that its bare checkpoints lack.
        towers: one or two.
        prefixes: leading parts of on-disk names that may or may not be there.
        aliases: (regular expression, replacement) for names of old releases.
        outputs: axes of the outputs that are not in public coordinates, by name ("as normed": behind the last norm).
        tied: tensors that may be left out on disk since they equal another one.
        ties: spaces that coincide in some variants.
        optional: what may be missing in one of two bases: names of heads, as regular expressions.
        anchor: a tensor every member has; what stands before it on disk is a prefix of all the stack's names.
        recognise: (kind of checkpoint, config) -> whether it is one of these, where no `model_type` says it.
    """

    name: str
    model_types: Mapping[str, str]
    towers: tuple[Tower, ...]
    prefixes: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    ties: tuple[Tie, ...] = ()
    optional: tuple[str, ...] = ()
    anchor: str = ""
    recognise: Callable[[str, Mapping[str, Any]], bool] | None = None

    def is_known_by(self, kind: str, config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint of that kind is one of these by more than its `model_type`."""
        return self.recognise is not None and self.recognise(kind, config)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """All rows of all towers."""
        return tuple(row for tower in self.towers for row in _parse_table(tower))

    def row_of(self, name: str) -> Row | None:
        """The first row whose name fits a tensor, whatever its condition."""
        return next((row for row in self.rows if row.pattern.fullmatch(name)), None)


@dataclass(frozen=True)
class Row:
    """One line of a table, parsed."""

    pattern: re.Pattern[str]
    axes: str
    role: str
    condition: str
    negated: bool
    tower: Tower


def _parse_table(tower: Tower) -> list[Row]:
    rows = []
    for line in filter(None, map(str.strip, tower.table.splitlines())):
        found = re.fullmatch(r"(\S+)\s+(.*?)(?:\s+as\s+(\S+))?(?:\s+(if|unless)\s+(\S+))?", line)
        assert found, line
        name, axes, role, word, condition = found.groups()
        axes = with_tower(axes, tower.name)
        rows.append(Row(_name_pattern(name), axes, role or "", condition or "", word == "unless", tower))
    return rows


def with_tower(axes: str, tower: str) -> str:
    """Puts the tower's name before every space that has none: "stream.0" -> "vision.stream.0"."""
    others = "|".join(filter(None, TOWERS))
    return re.sub(rf"(?<![\w.{{/])(?!(?:{others})\.)([A-Za-z])", rf"{tower}\1", axes)


def _name_pattern(name: str) -> re.Pattern[str]:
    name, leaf = (name[:-2], r"\.(?P<leaf>weight|bias)") if name.endswith(".*") else (name, "")
    return re.compile(re.escape(name).replace(r"\{l\}", r"(?P<l>\d+)", 1).replace(r"\{l\}", r"(?P=l)") + leaf)
