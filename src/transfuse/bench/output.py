"""What a run leaves: result.json, tables, figures, the page, the recipe as it was run."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import InputError
from ..report.figures import figures_of, regime_figures
from ..report.page import SectionFigures, render
from ..report.records import AS_IT_IS, KEPT, Failure, MethodLine, Metric, Results, SectionPlan, as_json
from ..report.style import Figure
from ..report.tables import SectionReport, sections_of
from ..report.writing import as_json as tables_as_json
from ..report.writing import comma_separated, markdown
from .cells import Done
from .choice import has_oracle, verdict_methods, with_controls
from .jobs import usable_cores
from .recipes.parts import FINE_TUNING, ORACLE, ModelSpec
from .recipes.reading import dump_recipe, plain
from .recipes.sections import CONTROLS, CarriedSpec, FewShotSpec, InterpolationSpec, Section, WorthSpec
from .recipes.spec import Recipe
from .store import MadeModel

FORMAT = 1
_PACKAGES = ("torch", "transformers", "datasets", "safetensors", "numpy", "scipy", "scikit-learn", "POT", "tokenizers")


def results(
    recipe: Recipe,
    sections: Sequence[Section],
    cells: Sequence[Done],
    failures: tuple[Failure, ...],
    provenance: Mapping[str, Any],
) -> Results:
    """All that was measured, in the form that the report takes."""
    return Results(
        name=recipe.name,
        title=recipe.title,
        about=recipe.about,
        paper=recipe.paper,
        seeds=tuple(recipe.seeds),
        metrics={name: Metric(task.primary, task.higher_is_better) for name, task in recipe.tasks.items()},
        sections=tuple(_plan(recipe, name) for name in sections),
        records=tuple(one.record for one in cells if one.record is not None),
        failures=failures,
        provenance=provenance,
    )


def _plan(recipe: Recipe, section: Section) -> SectionPlan:
    spec = recipe.section(section)
    assert spec is not None
    oracle = isinstance(spec, CarriedSpec) and any(has_oracle(recipe, *pair) for pair in spec.regimes.values())
    lines = [MethodLine(one.label, one.method, _role(one.label)) for one in with_controls(spec, oracle)]
    verdicts = tuple(one.label for one in verdict_methods(spec))
    if isinstance(spec, InterpolationSpec):
        return SectionPlan(section, tuple(spec.regimes), (spec.task,), tuple(lines), verdict_methods=verdicts)
    if isinstance(spec, WorthSpec):
        lines = [MethodLine(one, one, "reference") for one in (KEPT, AS_IT_IS)] + lines
        lines += [MethodLine(one, one, "reference") for one in spec.retrained]
    assert isinstance(spec, CarriedSpec)
    shots = tuple(spec.shots) if isinstance(spec, FewShotSpec) else ()
    if shots:
        lines.append(MethodLine(FINE_TUNING, FINE_TUNING, "control"))
    return SectionPlan(section, tuple(spec.regimes), tuple(spec.tasks), tuple(lines), spec.support, shots, verdicts)


def _role(label: str) -> str:
    return "oracle" if label == ORACLE else "control" if label in CONTROLS else "method"


def provenance(
    recipe: Recipe, asked: Mapping[str, Any], models: Sequence[MadeModel], cells: Sequence[Done], seconds: float
) -> dict[str, Any]:
    """What produced the results: command, versions, options, seconds, models, recipe."""
    return {
        "command": _command(recipe, asked),
        "versions": {"transfuse": __version__, "python": platform.python_version(), **_versions()},
        "options": {**asked, "machine": platform.machine(), "cores": usable_cores()},
        "seconds": {
            "this run": round(seconds, 1),
            "all models": round(sum(one.seconds for one in models), 1),
            "all cells": round(sum(one.seconds for one in cells), 1),
        },
        "models": [_about_model(recipe, one) for one in models],
        "recipe_text": dump_recipe(recipe),
    }


def _command(recipe: Recipe, asked: Mapping[str, Any]) -> str:
    """The command that gives these results again, from the resolved recipe that lies beside them."""
    words = ["transfuse", "bench", f"{asked['out']}/recipe.yaml", "-o", f"{asked['out']}-again"]
    if asked["data_dir"]:
        words += ["--data-dir", asked["data_dir"]]
    for name in asked["only"]:
        words += ["--only", name]
    for key, usual in (("threads", 1), ("device", "cpu")):
        if asked[key] != usual:
            words += [f"--{key}", str(asked[key])]
    return shlex.join(words)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _about_model(recipe: Recipe, made: MadeModel) -> dict[str, Any]:
    spec = recipe.models[made.name]
    scores = made.report.get("validation") or {}
    loss = made.report.get("loss")
    said = [*([f"loss {loss:.3f}"] if loss is not None else []), *(f"{k} {v:.3f}" for k, v in scores.items())]
    return {
        "name": made.name,
        "seed": made.seed,
        "made": _how_made(spec),
        "key": made.key,
        "fingerprint": made.fingerprint,
        "seconds": made.seconds,
        "training": ", ".join(one for one in said if not one.startswith("examples")),
    }


def _how_made(spec: ModelSpec) -> str:
    if spec.given is not None:
        return spec.given
    start = spec.location or ("random" if spec.init else f"{'trained' if spec.train else 'planted'} from {spec.base}")
    return f"{start}, converted" if spec.convert else start


# --- writing ------------------------------------------------------------------------------------------------------


def check_output(out: Path) -> None:
    """Refuses a place for results that holds something else.

    Raises:
        InputError: it does.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: it is not a folder; give another place for the results")
    names = set(os.listdir(out))
    if names and "result.json" not in names:
        raise InputError(f"{out}: it holds something else than results of a benchmark; give another place")


def write_all(results: Results, recipe: Recipe, out: Path, cells: Sequence[Done]) -> tuple[str, dict[str, Any]]:
    """Writes everything into a folder, file by file beside and renamed.

    Returns:
        The tables in markdown, and what result.json holds.
    """
    sections = sections_of(results)
    figures = _figures(results, sections)
    tables = markdown(results, sections)
    result = {
        "format": FORMAT,
        **{key: getattr(results, key) for key in ("name", "title", "about", "paper")},
        "seeds": list(results.seeds),
        "recipe": plain(recipe),
        **{key: value for key, value in results.provenance.items() if key != "recipe_text"},
        "tables": tables_as_json(sections),
        "cells": [_about_cell(one) for one in cells],
        "failures": [asdict(one) for one in results.failures],
    }
    files: dict[str, str | bytes] = {
        "recipe.yaml": dump_recipe(recipe),
        "result.json": json.dumps(result, indent=1, ensure_ascii=False) + "\n",
        "tables.md": tables,
        "tables.csv": comma_separated(sections),
        "report.html": render(results, sections, figures),
    }
    for section in figures.values():
        for one in (*section.overall, *(figure for found in section.by_regime.values() for figure in found)):
            files |= {f"figures/{_file_name(one)}.png": one.png, f"figures/{_file_name(one)}.svg": one.svg}
    for name, content in files.items():
        _write_file(out / name, content)
    return tables, result


def _figures(results: Results, sections: Sequence[SectionReport]) -> dict[str, SectionFigures]:
    """All figures; what matching found is drawn where a regime is first seen."""
    found: dict[str, SectionFigures] = {}
    seen: set[str] = set()
    for section in sections:
        new = [one for one in section.regimes if one.label not in seen]
        seen |= {one.label for one in new}
        by_regime = {one.label: regime_figures(results, section, one) for one in new}
        found[section.kind] = SectionFigures(figures_of(results, section), by_regime)
    return found


def _file_name(figure: Figure) -> str:
    return "".join(one if one.isalnum() or one in "-._" else "_" for one in figure.key)


def _about_cell(done: Done) -> dict[str, Any]:
    about: dict[str, Any] = {"what": done.what, "seconds": done.seconds}
    return {**about, "record": as_json(done.record)} if done.record else {**about, "error": done.error}


def _write_file(path: Path, content: str | bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
