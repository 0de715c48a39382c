"""A recipe from beginning to end: models, cells, tables, figures, page."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from ..errors import InputError
from ..options.requests import BenchRequest
from ..report.records import Failure
from .cells import Done, Unfinished
from .jobs import Job, Outcome, report_to_stderr, run_jobs, usable_cores
from .measure import Regime
from .output import check_output, provenance, results, write_all
from .recipes.reading import plain, quick
from .recipes.sections import SECTIONS, CarriedSpec, Section, WorthSpec
from .recipes.spec import Recipe
from .references import references
from .store import MadeModel, ModelStore, default_cache
from .tiny import tiny
from .workbench import Settings, Workbench

log = logging.getLogger("transfuse.bench")


@dataclass(frozen=True)
class Finished:
    """A run that came to its end.

    Attributes:
        out: the folder with everything in it.
        result: what `result.json` holds.
        failures: models and cells that could not be made.
        fresh: how many cells were measured now, and not read.
        tables: in markdown.
    """

    out: Path
    result: dict[str, Any]
    failures: tuple[Failure, ...]
    fresh: int
    tables: str


def resolve(
    recipe: Recipe,
    *,
    quick_run: bool = False,
    tiny_run: bool = False,
    seeds: Sequence[int] | None = None,
    limit: int | None = None,
    data_dir: Path | None = None,
) -> Recipe:
    """The recipe as it is run.

    Raises:
        InputError: the recipe has no quick form, or nothing stands in for its data (tiny).
    """
    if quick_run:
        recipe = quick(recipe)
    if tiny_run:
        recipe = tiny(recipe, data_dir)
    changes: dict[str, Any] = {"limit": recipe.limit.capped(limit)}
    if seeds:
        changes["seeds"] = list(dict.fromkeys(seeds))
    return recipe.model_copy(update=changes)


def run_bench(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    request: BenchRequest | None = None,
    about: Mapping[str, Any] = {},
    **options: Any,
) -> Finished:
    """Makes what is missing and writes everything down; a stopped run goes on where it was.

    Args:
        recipe: as `resolve` gives it.
        out: folder for results.
        request, **options: what is asked for (`BenchRequest`), options by name over it (`cache`, `data_dir`, `only`,
            `workers`, `threads`, `device`, `progress`).
        about: what was asked for besides, for the record ("quick": True, ...).

    Returns:
        Finished; what could not be made is among its failures.

    Raises:
        InputError: the output or the cache cannot be written.
    """
    asked = BenchRequest.asked(request, options)
    how, device, data_dir = asked.bench, asked.run.device, asked.data.data_dir
    place, began, threads = Path(out), time.monotonic(), how.threads
    check_output(place)
    sections = _sections(recipe, cast(Sequence[Section], how.only))
    settings = _settings(recipe, sections, place, asked)
    count = how.workers or (min(usable_cores(), 4) if device == "cpu" else 1)
    report_to_stderr(log, not asked.run.progress)
    jobs = _jobs(recipe, sections, settings)
    kept = _kept(jobs, settings)
    left = [one for one in jobs if one.name not in kept]
    with _threads(threads):
        outcomes = run_jobs(
            left,
            perform,
            start=start,
            start_args=(settings,),
            workers=min(count, len(left)),
            threads=threads,
            finished=_teller(len(left)),
            done=kept,
        )
    models, cells, failures = _collected(jobs, outcomes)
    given = {"only": list(how.only), "threads": threads, "device": device, **about}
    record = {**given, "workers": count, "data_dir": str(data_dir or ""), "out": str(out)}
    origin = provenance(recipe, record, models, cells, time.monotonic() - began)
    found = results(recipe, sections, cells, failures, origin)
    tables, result = write_all(found, recipe, place, cells)
    return Finished(place, result, failures, sum(one.fresh for one in cells), tables)


def _settings(recipe: Recipe, sections: Sequence[Section], out: Path, asked: BenchRequest) -> Settings:
    """What every process is told.

    Raises:
        InputError: there is no such data directory.
    """
    data_dir = asked.data.data_dir
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(f"the data directory {data_dir} does not exist")
    return Settings(
        recipe=plain(recipe),
        sections=tuple(sections),
        out=out.resolve(),
        cache=(asked.bench.cache or default_cache()).resolve(),
        data_dir=None if data_dir is None else data_dir.resolve(),
        device=asked.run.device,
        threads=asked.bench.threads,
        progress=asked.run.progress,
    )


# --- in every process ---------------------------------------------------------------------------------------------

_BENCH: list[Workbench] = []


def start(settings: Settings) -> None:
    """Makes this process ready."""
    torch.set_num_threads(settings.threads)
    report_to_stderr(log, not settings.progress)
    # Said of every port again and again; what matters of it is in the tables.
    logging.getLogger("transfuse.porting").setLevel(logging.ERROR)
    _quiet_libraries()
    _BENCH[:] = [Workbench(settings)]


def perform(payload: tuple[Any, ...], bench: Workbench | None = None) -> Any:
    """Does one job: ("model", name, seed), ("regime", label, seed) or ("references", seed)."""
    kind, *rest = payload
    bench = bench or _BENCH[0]
    if kind == "model" and bench.cells.only_read:
        if (found := bench.store.made(*rest)) is None:
            raise Unfinished(rest[0])
        return found
    if kind == "model":
        return bench.store.make(*rest)
    if kind == "regime":
        label, seed = rest
        return list(Regime(bench, seed, label).run())
    return list(references(bench, *rest))


def _quiet_libraries() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    level = logging.getLogger("transfuse.porting").level
    try:
        yield
    finally:
        torch.set_num_threads(before)
        logging.getLogger("transfuse.porting").setLevel(level)
        _BENCH.clear()


# --- jobs ---------------------------------------------------------------------------------------------------------


def _sections(recipe: Recipe, only: Sequence[Section]) -> list[Section]:
    there: list[Section] = [one for one in SECTIONS if recipe.section(one) is not None]
    if odd := [one for one in only if one not in there]:
        raise InputError(f"recipe {recipe.name} has no section {odd[0]!r}; it has {', '.join(there)}")
    return [one for one in there if one in only or not only]


def _jobs(recipe: Recipe, sections: Sequence[Section], settings: Settings) -> list[Job]:
    """Models, each after those it is made from, then what is measured on them."""
    store = ModelStore(recipe, settings.cache, data_dir=settings.data_dir, device=settings.device)
    jobs: list[Job] = []
    by_key: dict[str, str] = {}

    def job_of(name: str, seed: int) -> str:
        return by_key[store.key(name, seed)]

    for seed in recipe.seeds:
        for name in recipe.models_of(sections):
            key = store.key(name, seed)
            if key not in by_key:  # the same model under another name or seed is made once
                by_key[key] = f"model {name}, seed {seed}"
                needs = tuple(job_of(one, seed) for one in recipe.models[name].needs)
                jobs.append(Job(by_key[key], needs, ("model", name, seed)))
    for seed in recipe.seeds:
        tuned = [one for name in sections for one in _tuned(recipe, name)]
        if tuned:
            needs = tuple(dict.fromkeys(job_of(one, seed) for one in tuned))
            jobs.append(Job(f"references, seed {seed}", needs, ("references", seed)))
        for label, models in _regimes(recipe, sections).items():
            needs = tuple(dict.fromkeys(job_of(one, seed) for one in models))
            jobs.append(Job(f"regime {label}, seed {seed}", needs, ("regime", label, seed)))
    return jobs


def _tuned(recipe: Recipe, section: Section) -> list[str]:
    spec = recipe.section(section)
    return [one.tuned for one in spec.tasks.values()] if isinstance(spec, CarriedSpec) else []


def _regimes(recipe: Recipe, sections: Sequence[Section]) -> dict[str, list[str]]:
    """Label of a regime -> the models it needs, over all sections."""
    found: dict[str, list[str]] = {}
    for name in sections:
        spec = recipe.section(name)
        for label, pair in (spec.regimes if spec else {}).items():
            found.setdefault(label, []).extend([*pair, *_tuned(recipe, name)])
            if isinstance(spec, WorthSpec):
                found[label] += [m for rows in spec.retrained.values() for m in rows.get(label, {}).values()]
    return found


def _kept(jobs: Sequence[Job], settings: Settings) -> dict[str, Outcome]:
    """The jobs of which nothing is left to do: no process has to be started for them."""
    bench = Workbench(settings, only_read=True)
    found: dict[str, Outcome] = {}
    for job in jobs:
        try:
            value = perform(job.payload, bench)
        except Unfinished:
            continue
        found[job.name] = Outcome(value)
    return found


def _teller(total: int) -> Any:
    done: list[str] = []

    def finished(job: Job, outcome: Outcome) -> None:
        done.append(job.name)
        said = f"FAILED: {outcome.error}" if outcome.error else "done"
        log.info("[%d/%d] %s: %s", len(done), total, job.name, said)

    return finished


def _collected(
    jobs: Sequence[Job], outcomes: Mapping[str, Outcome]
) -> tuple[list[MadeModel], list[Done], tuple[Failure, ...]]:
    models: list[MadeModel] = []
    cells: list[Done] = []
    failures: list[Failure] = []
    for job in jobs:
        outcome = outcomes[job.name]
        if outcome.error is not None:
            failures.append(Failure(job.name, outcome.error))
        elif isinstance(outcome.value, MadeModel):
            models.append(outcome.value)
        else:
            cells.extend(outcome.value)
            failures.extend(Failure(one.what, one.error) for one in outcome.value if one.error is not None)
    return models, cells, tuple(failures)
