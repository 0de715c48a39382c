"""The fine-tunes themselves, where they are from: what a port is held against."""

from __future__ import annotations

from collections.abc import Iterator

from .._version import __version__
from ..porting.port import port
from ..report.records import Record, Reference, Scores
from ..running.scores import evaluate, score_dict
from ..study.sweep import support_state
from .cells import Done
from .choice import NAIVE
from .ports import FORMAT
from .recipes.sections import TransportSpec
from .workbench import Workbench


def references(bench: Workbench, seed: int) -> Iterator[Done]:
    """The fine-tunes on the sources they belong to."""
    wanted: dict[str, tuple[TransportSpec, str]] = {}
    for name in bench.settings.sections:
        spec = bench.recipe.section(name)
        if not isinstance(spec, TransportSpec):
            continue
        for task, one in spec.tasks.items():
            if task not in wanted or wanted[task][0].support is None:
                wanted[task] = spec, one.tuned
    for task, (spec, tuned) in wanted.items():
        yield _reference(bench, seed, task, spec, tuned)


def _reference(bench: Workbench, seed: int, task: str, spec: TransportSpec, tuned: str) -> Done:
    about = {"format": FORMAT, "version": __version__, "tuned": bench.store.key(tuned, seed), "seed": seed}
    about |= {"device": bench.settings.device.split(":")[0], "task": bench.task_depends_on(task), "name": task}
    if spec.support is not None:
        about |= {"source": bench.store.key(spec.source, seed), "support": bench.task_depends_on(spec.support)}
    cell = bench.cells.cell("reference", (f"seed{seed}", task), about)

    def make() -> Record:
        live, asked = bench.live(tuned, seed), bench.recipe.tasks[task]
        found = score_dict(evaluate(live, asked, bench.prepared(asked, "test", live)))
        return Reference(seed, task, found, on_support(bench, seed, spec.source, tuned, spec.support))

    return bench.cells.read(cell) or bench.cells.made(cell, make)


def on_support(bench: Workbench, seed: int, base: str, tuned: str, support: str | None) -> Scores | None:
    """A fine-tune under its base's own head: its task vector, added to where it is from.

    Args:
        base, tuned, support: names in the recipe; None: there is no support task.
    """
    if support is None:
        return None
    source = bench.checkpoint(base, seed)
    result = port(source, bench.checkpoint(tuned, seed), source, method=NAIVE.method, verify=False)
    live, about = bench.live(base, seed), bench.recipe.tasks[support]
    return bench.scores(live, support_state(result.tensors), about, "test")
