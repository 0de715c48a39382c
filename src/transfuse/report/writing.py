"""Tables as markdown, csv and plain JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .grid import Cell, Column, Table
from .records import Results
from .tables import SectionReport
from .values import Value
from .verdicts import Verdict, counted


def markdown(results: Results, sections: Sequence[SectionReport]) -> str:
    """All tables; the verdict of a regime stands before its numbers."""
    seeds = len(results.seeds)
    lines = [f"# {results.title}", ""]
    if results.paper:
        lines += [f"After {results.paper}.", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for regime in section.regimes:
            lines += [f"### {regime.label}", "", *_verdict_lines(regime.verdict, seeds)]
            for table in regime.tables:
                lines += [f"**{table.title}**", "", *_table_lines(table, seeds), "", table.note, ""]
    if results.failures:
        lines += ["## Failures", "", *(f"- {one.what}: {one.error}" for one in results.failures), ""]
    return "\n".join(lines).rstrip() + "\n"


def _verdict_lines(verdict: Verdict, seeds: int) -> list[str]:
    lines = [f"Verdict, from weights alone: **{verdict.counted()}**. {verdict.text}", ""]
    if not verdict.lines:
        return lines
    lines += ["| null test | as is | matched | chance | excess | z | verdict |", "|---|---:|---:|---:|---:|---:|---|"]
    for one in verdict.lines:
        values = [cell_text(value, seeds) for value in one.values]
        lines.append(f"| {one.name} | {' | '.join(values)} | {counted(one.verdicts)} |")
    return [*lines, ""]


def _table_lines(table: Table, seeds: int) -> list[str]:
    heads = ["", *(_escaped(column_name(one)) for one in table.columns)]
    marks = ["---", *("---" if one.text else "---:" for one in table.columns)]
    lines = [f"| {' | '.join(heads)} |", f"|{'|'.join(marks)}|"]
    for row in table.rows:
        cells = [_escaped(row.label), *(_escaped(cell_text(cell, seeds)) for cell in row.cells)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def column_name(column: Column) -> str:
    """A column's name where there is no second line of heads."""
    return f"{column.group} {column.name}".strip()


def cell_text(cell: Cell, seeds: int) -> str:
    """A cell as text; a missing one is an empty one."""
    if isinstance(cell, Value):
        return cell.text(seeds)
    return cell or ""


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_HEAD = [
    "section",
    "regime",
    "verdict",
    "table",
    "row",
    "role",
    "column",
    "unit",
    "difference",
    "mean",
    "sd",
    "n",
    "seeds",
]


def comma_separated(sections: Sequence[SectionReport]) -> str:
    """One line for every value, with those of each seed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_HEAD)
    for section in sections:
        for regime in section.regimes:
            start = [section.kind, regime.label, regime.verdict.verdict]
            for table in regime.tables:
                writer.writerows([*start, *line] for line in _csv_lines(table))
    return out.getvalue()


def _csv_lines(table: Table) -> list[list[Any]]:
    lines = []
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            start = [table.title, row.label, row.role, column_name(column)]
            if isinstance(cell, Value):
                values = " ".join(f"{seed}:{value!r}" for seed, value in cell.by_seed.items())
                rest = [cell.unit, int(cell.signed), cell.mean, "" if cell.sd is None else cell.sd, cell.n, values]
                lines.append([*start, *rest])
            elif cell:
                lines.append([*start, cell, "", "", "", "", ""])
    return lines


def as_json(sections: Sequence[SectionReport]) -> list[dict[str, Any]]:
    """All tables as plain JSON types."""
    return [asdict(section) for section in sections]
