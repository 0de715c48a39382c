"""The report as one HTML file: figures inlined, nothing fetched, no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from typing import Any

from ..data.extras import need
from .grid import Cell, Column, Table
from .records import Results
from .style import Figure
from .tables import RegimeReport, SectionReport
from .values import MINUS, Value
from .verdicts import Verdict, counted
from .writing import cell_text


@dataclass(frozen=True)
class SectionFigures:
    """Figures of a section: those over all regimes, and those of each regime (shown before its accuracies)."""

    overall: Sequence[Figure]
    by_regime: Mapping[str, Sequence[Figure]]


def render(results: Results, sections: Sequence[SectionReport], figures: Mapping[str, SectionFigures]) -> str:
    """The page.

    Args:
        sections: from `sections_of`.
        figures: kind of a section -> its figures.
    """
    jinja = need("jinja2")
    text = (resources.files(__package__ or "transfuse.report") / "page.html").read_text(encoding="utf-8")
    options = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja.StrictUndefined}
    template = jinja.Environment(**options).from_string(text)
    seeds = len(results.seeds)
    shown = [_section(one, figures[one.kind], seeds) for one in sections]
    return template.render(results=results, sections=shown, provenance=_provenance(results.provenance))


def _section(section: SectionReport, figures: SectionFigures, seeds: int) -> dict[str, Any]:
    regimes = [_regime(one, figures.by_regime.get(one.label, ()), seeds) for one in section.regimes]
    return {"report": section, "regimes": regimes, "figures": [_figure(one) for one in figures.overall]}


def _regime(regime: RegimeReport, figures: Sequence[Figure], seeds: int) -> dict[str, Any]:
    return {
        "report": regime,
        "null": _null_lines(regime.verdict, seeds),
        "figures": [_figure(one) for one in figures],
        "tables": [_table(one, seeds) for one in regime.tables],
    }


def _figure(figure: Figure) -> dict[str, str]:
    inline = base64.b64encode(figure.svg).decode()
    return {"key": figure.key, "title": figure.title, "caption": figure.caption, "base64": inline}


def _null_lines(verdict: Verdict, seeds: int) -> list[dict[str, Any]]:
    return [
        {
            "name": one.name,
            "values": [cell_text(value, seeds) for value in one.values],
            "verdicts": counted(one.verdicts),
        }
        for one in verdict.lines
    ]


def _table(table: Table, seeds: int) -> dict[str, Any]:
    groups = [(name, len(list(columns))) for name, columns in groupby(table.columns, key=lambda one: one.group)]
    starts = _starts(table.columns)
    styles = [
        " ".join(filter(None, ("text" if one.text else "", "start" if start else "")))
        for one, start in zip(table.columns, starts, strict=True)
    ]
    rows = []
    for number, row in enumerate(table.rows):
        after = table.rows[number + 1].role if number + 1 < len(table.rows) else ""
        cells = [_cell(cell, style, seeds) for cell, style in zip(row.cells, styles, strict=True)]
        last = row.role == "reference" and after != "reference"
        rows.append({"label": row.label, "role": row.role, "cells": cells, "last_reference": last})
    return {
        "title": table.title,
        "note": table.note,
        "groups": groups if any(name for name, _ in groups) else [],
        "columns": [{"name": one.name, "style": style} for one, style in zip(table.columns, styles, strict=True)],
        "rows": rows,
    }


def _starts(columns: Sequence[Column]) -> list[bool]:
    """Whether a column is the first of its group."""
    before = [None, *(one.group for one in columns)]
    return [bool(one.group) and one.group != old for one, old in zip(columns, before, strict=False)]


def _cell(cell: Cell, style: str, seeds: int) -> dict[str, str]:
    title, classes = "", style
    if isinstance(cell, Value):
        title = ", ".join(f"seed {seed}: {value:.4g}" for seed, value in cell.by_seed.items()).replace("-", MINUS)
        classes = f"{style} score".strip()
    return {"text": cell_text(cell, seeds), "style": classes, "title": title}


def _provenance(found: Mapping[str, Any]) -> dict[str, Any]:
    lists = [
        (name, [(key, _said(value)) for key, value in found[key_of].items()])
        for name, key_of in (("Versions", "versions"), ("Options", "options"), ("Seconds", "seconds"))
        if found.get(key_of)
    ]
    return {
        "command": found.get("command", ""),
        "recipe": found.get("recipe_text", ""),
        "models": found.get("models", []),
        "lists": lists,
    }


def _said(value: Any) -> str:
    if value is None:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
