"""Keep the old model, port, or retrain: one cell a row, all of them measured on the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ..report.records import AS_IT_IS, KEPT, Scores, Worth
from ..running.live import LiveModel
from .cells import Done
from .choice import NAIVE
from .ports import Ports
from .recipes.parts import MethodSpec
from .recipes.sections import WorthSpec
from .references import on_support


class Worths:
    """The rows of a regime."""

    def __init__(self, ports: Ports):
        self.ports, self.bench, self.seed = ports, ports.bench, ports.seed

    def rows(self, spec: WorthSpec, task: str, methods: Sequence[MethodSpec]) -> Iterator[Done]:
        """The rows of a task: the old fine-tune, the new base, every port, what was retrained."""
        yield self._made(spec, task, KEPT, NAIVE, partial(self._kept, spec, task))
        yield self._made(spec, task, AS_IT_IS, NAIVE, partial(self._as_it_is, spec, task))
        for method in methods:
            yield self._made(spec, task, method.label, method, partial(self._ported, spec, task, method))
        for label, by_regime in spec.retrained.items():
            name = by_regime.get(self.ports.label, {}).get(task)
            if name is not None:
                made = {"retrained": self.bench.store.key(name, self.seed)}
                yield self._made(spec, task, label, NAIVE, partial(self._retrained, spec, task, label, name), **made)

    def _made(
        self, spec: WorthSpec, task: str, row: str, method: MethodSpec, make: Callable[[], Worth], **more: Any
    ) -> Done:
        depends = {**self.ports.depends_on(spec, task, method), **more}
        return self.ports.finished(self.ports.cell("worth", (task, row), depends), make)

    def _kept(self, spec: WorthSpec, task: str) -> Worth:
        return self._model(spec, task, KEPT, spec.source, spec.tasks[task].tuned)

    def _as_it_is(self, spec: WorthSpec, task: str) -> Worth:
        result = self.ports.ported(spec, task, NAIVE)
        support = self.ports.on_support(spec, result.tensors.at(0.0), "test")
        return self._row(task, AS_IT_IS, self.ports.live(result), result.tensors.zero_shot(), support=support)

    def _ported(self, spec: WorthSpec, task: str, method: MethodSpec) -> Worth:
        result, cost = self.ports.costed(spec, task, method)
        support = self.ports.on_support(spec, result.tensors, "test")
        found = self._row(task, method.label, self.ports.live(result), result.tensors.state(), support=support)
        return replace(found, seconds=cost.seconds, memory=cost.memory, drift=result.report.get("drift"))

    def _retrained(self, spec: WorthSpec, task: str, row: str, name: str) -> Worth:
        made = self.bench.store.made(name, self.seed)
        found = self._model(spec, task, row, self.ports.target, name)
        return found if made is None else replace(found, seconds=made.seconds)

    def _model(self, spec: WorthSpec, task: str, row: str, base: str, tuned: str) -> Worth:
        """A model of the recipe as it is; on the support task under its base's own head."""
        checkpoint = self.bench.checkpoint(tuned, self.seed)
        state = {name: checkpoint.tensor(name) for name in checkpoint}
        support = on_support(self.bench, self.seed, base, tuned, spec.support)
        return self._row(task, row, self.bench.live(tuned, self.seed), state, support=support)

    def _row(
        self, task: str, row: str, live: LiveModel, state: Mapping[str, Tensor], *, support: Scores | None
    ) -> Worth:
        about = self.bench.recipe.tasks[task]
        test = self.bench.scores(live, state, about, "test")
        corrupted = self.bench.scores_on_corrupted(live, state, about)
        return Worth(self.seed, self.ports.label, task, row, test, support, corrupted)
