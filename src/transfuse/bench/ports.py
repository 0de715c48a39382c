"""One source and target under one seed: their maps, the port that was made last, and the cells that are about them.

A task vector is transported once for everything that is measured on it, so the last port is kept with its tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .._version import __version__
from ..data.tasks import ZERO_SHOT
from ..maps.collection import Maps
from ..options.groups import Inputs, Keep
from ..porting.moments import moments
from ..porting.port import port
from ..porting.run import PortResult
from ..report.records import Record, Scores
from ..running.live import LiveModel
from ..running.unlabelled import SYNTHETIC, WITHOUT_DATA
from ..study.sweep import support_state
from ..update.live import live_of
from ..update.ported import Ported
from .cells import Cell, Done
from .cost import Cost, costed
from .recipes.parts import ORACLE, MethodSpec
from .recipes.reading import stated
from .recipes.sections import CarriedSpec
from .workbench import Recent, Workbench

FORMAT = 2  # raised when what a record holds means something else
DRAWN = 2  # raised when synthetic inputs are drawn otherwise


@dataclass(frozen=True)
class Aligned:
    """An alignment that is there, or why it is not."""

    done: Done
    maps: Maps | None


class Ports:
    """Ports between two models of a recipe.

    Attributes:
        label: of the regime.
        source, target: names of the models.
        pair: their keys.
        paths: where they are.
        aligned: label of a method -> its maps.
    """

    def __init__(self, bench: Workbench, seed: int, label: str, models: tuple[str, str]):
        self.bench, self.seed, self.label = bench, seed, label
        self.source, self.target = models
        self.pair = [bench.store.key(name, seed) for name in models]
        self.paths = (bench.location(self.source, seed), bench.location(self.target, seed))
        self.aligned: dict[str, Aligned] = {}
        self._last: tuple[tuple[str, str], PortResult, Cost] | None = None
        self._lives: dict[str, LiveModel] = {}
        self._moments = Recent(2)

    def ported(self, spec: CarriedSpec, task: str, method: MethodSpec) -> PortResult:
        """The port, its tensors held; the last one is kept, since its measurements follow each other."""
        return self.costed(spec, task, method)[0]

    def costed(self, spec: CarriedSpec, task: str, method: MethodSpec) -> tuple[PortResult, Cost]:
        """The same with what it cost; maps of weights are found before, for all tasks."""
        # Rows that differ only in what comes after share one.
        key = (spec.tasks[task].tuned, json.dumps(self.method_depends_on(method), sort_keys=True))
        if self._last is None or self._last[0] != key:
            names = (self.source, spec.tasks[task].tuned, self.target)
            models = [self.bench.checkpoint(name, self.seed) for name in names]
            settings = self.bench.settings
            options: dict[str, Any] = {"seed": self.seed, "device": settings.device, "data_dir": settings.data_dir}
            if method.by_task:
                options |= {"method": method.method, "inputs": self._inputs(method, task), **method.options}
                options |= {"keep": self._keep(method)}
            else:
                options["maps"] = self.aligned[method.label].maps

            def make() -> PortResult:
                result = port(*models, verify=False, **options)
                return replace(result, tensors=result.tensors.held())

            self._last = (key, *costed(make, settings.device))
        return self._last[1:]

    def _inputs(self, method: MethodSpec, task: str) -> Inputs:
        wanted = method.wanted_inputs
        if wanted is None:
            return Inputs()
        about = self.bench.recipe.tasks[task]
        classes = about if wanted.task == SYNTHETIC and about.kind == ZERO_SHOT else None
        return Inputs(self._about(wanted.task or task), count=wanted.count, classes=classes)

    def _keep(self, method: MethodSpec) -> Keep:
        wanted = method.keep
        if wanted is None:
            return Keep()
        task = self._about(wanted.task)
        if wanted.moments:
            key = (wanted.task, wanted.count)
            where = {"data_dir": self.bench.settings.data_dir, "seed": self.seed}
            made = partial(moments, self.paths[1], inputs=task, inputs_count=wanted.count, **where)
            task = self._moments.get_or(key, made)
        return Keep(task, count=wanted.count, weight=wanted.weight)

    def _about(self, task: str) -> Any:
        return task if task in WITHOUT_DATA else self.bench.recipe.tasks[task]

    def live(self, result: PortResult) -> LiveModel:
        """The class of the ported model with its processors; its weights do not matter, so one serves all methods."""
        tuned = result.report["models"]["tuned"]["fingerprint"]
        if tuned not in self._lives:
            state = result.tensors.zero_shot()
            self._lives = {tuned: live_of(result.tensors, state, device=self.bench.settings.device)}
        return self._lives[tuned]

    def on_support(self, spec: CarriedSpec, ported: Ported, split: Any) -> Scores | None:
        """Scores on the support task: target with its own head, and what the port adds to the rest."""
        if spec.support is None:
            return None
        live = self.bench.live(self.target, self.seed)
        return self.bench.scores(live, support_state(ported), self.bench.recipe.tasks[spec.support], split)

    # --- cells ----------------------------------------------------------------------------------------------------

    def cell(self, kind: str, labels: tuple[Any, ...], depends_on: Mapping[str, Any]) -> Cell:
        """A cell about these two models; the labels are part of what it depends on."""
        about = {"format": FORMAT, "version": __version__, "device": self.bench.settings.device.split(":")[0]}
        about |= {"seed": self.seed, "regime": self.label, "pair": self.pair, "labels": list(labels)}
        return self.bench.cells.cell(kind, (f"seed{self.seed}", self.label, *labels), {**about, **depends_on})

    def depends_on(self, spec: CarriedSpec, task: str, method: MethodSpec) -> dict[str, Any]:
        """What a measurement of a carried fine-tune depends on."""
        return {
            "method": self.method_depends_on(method),
            "tuned": self.bench.store.key(spec.tasks[task].tuned, self.seed),
            "task": self.bench.task_depends_on(task),
            "support": self.bench.task_depends_on(spec.support),
        }

    def method_depends_on(self, method: MethodSpec) -> Any:
        """What an alignment or a port depends on, besides the models."""
        wanted = method.wanted_inputs
        about = {"method": method.method, "options": method.options, "oracle": method.label == ORACLE}
        if wanted is not None:
            about["inputs"] = [stated(wanted), self._depends_on(wanted.task)]
        elif method.row is None:
            about["inputs"] = DRAWN  # auto may draw some
        if method.keep is not None:
            about["keep"] = [stated(method.keep), self._depends_on(method.keep.task)]
        return about

    def _depends_on(self, task: str | None) -> Any:
        if task in WITHOUT_DATA:
            return DRAWN
        return None if task is None else self.bench.task_depends_on(task)

    def finished(self, cell: Cell, make: Callable[[], Record]) -> Done:
        """A cell, made where it is not there."""
        return self.bench.cells.read(cell) or self.bench.cells.made(cell, make)
