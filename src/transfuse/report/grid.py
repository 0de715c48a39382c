"""What tables are made of: columns, rows, cells, and the records of one regime by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .records import MethodLine, Metric, Record, Results, Scores
from .values import Value

Cell = Value | str | None
Kind = TypeVar("Kind", bound=Record)


@dataclass(frozen=True)
class Column:
    """A column: the group it stands under (a task, say) and its name there; a text column holds no score."""

    group: str
    name: str
    text: bool = False


@dataclass(frozen=True)
class Row:
    """A row: its role is "reference" (absolute values), "control", "method" or "oracle"."""

    label: str
    role: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """A table with its heading and a line on how to read it."""

    key: str
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


class Lookup:
    """The records of one regime, by seed."""

    def __init__(self, results: Results, regime: str):
        self.results, self.regime = results, regime
        self.records = [one for one in results.records if getattr(one, "regime", regime) == regime]

    def find(self, kind: type[Kind], **wanted: Any) -> dict[int, Kind]:
        """The record of that kind and those fields, for each seed."""
        found = (one for one in self.records if isinstance(one, kind))
        kept = (one for one in found if all(getattr(one, key) == value for key, value in wanted.items()))
        return {one.seed: one for one in kept}

    def metric(self, task: str) -> Metric:
        """By which a task is judged."""
        return self.results.metrics[task]

    def has_records(self, line: MethodLine) -> bool:
        """Whether a row is of use: an oracle exists for planted targets only."""
        return line.role != "oracle" or any(getattr(one, "method", None) == line.label for one in self.records)

    def note(self) -> str:
        """How spread is to be read."""
        seeds = len(self.results.seeds)
        return f"Mean ± sample standard deviation over {seeds} seeds." if seeds > 1 else "One seed: no spread."


def picked(found: Mapping[int, Record], field: str) -> dict[int, Scores]:
    """One field of records by seed, where it is there."""
    values = {seed: getattr(one, field) for seed, one in found.items()}
    return {seed: value for seed, value in values.items() if value is not None}


Cells = Mapping[tuple[str, str], Cell]


def table_of(
    key: str, title: str, note: str, columns: Sequence[Column], rows: Iterable[tuple[str, str, Cells]]
) -> Table:
    """A table from rows that hold their cells by (group, name)."""
    made = (Row(label, role, tuple(cells.get((c.group, c.name)) for c in columns)) for label, role, cells in rows)
    return Table(key, title, note, tuple(columns), tuple(made))
