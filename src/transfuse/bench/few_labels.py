"""A few labelled examples in a recipe: scales of what was carried, GradFix, fine-tuning, and fine-tuning alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from ..data.splits import Split
from ..data.tasks import TaskSpec
from ..options.groups import Run
from ..options.studies import Mask, Scale
from ..porting.run import PortResult
from ..report.records import FewShot, Record
from ..running.live import LiveModel, with_state
from ..running.scores import evaluate, score_dict
from ..study.gradfix import mask_task_vector
from ..study.scale import alphas_by_tensor, few_shot_tune, learn_scales
from ..study.selection import choose_shots
from ..study.sweep import choose_alpha
from .cells import Done
from .choice import NAIVE
from .ports import Ports
from .recipes.parts import FINE_TUNING, MethodSpec
from .recipes.sections import FewShotSpec


class FewLabels:
    """What is measured with a few labelled examples on the ports between two models."""

    def __init__(self, ports: Ports):
        self.ports, self.bench, self.seed, self.label = ports, ports.bench, ports.seed, ports.label

    def carried(self, spec: FewShotSpec, task: str, method: MethodSpec, shots: int) -> Done:
        """With a port, by what the method says the examples are for."""
        ways = {"scale": self._scaled, "mask": self._masked, "tune": self._tuned, "nothing": self._as_it_is}
        how = {"shots": shots, "then": method.then, **_options_of(spec, method.then)}
        depends = {**self.ports.depends_on(spec, task, method), **how}
        cell = self.ports.cell("fewshot", (task, method.label, shots), depends)
        return self.ports.finished(cell, partial(ways[method.then], spec, task, method, shots))

    def _scaled(self, spec: FewShotSpec, task: str, method: MethodSpec, shots: int) -> Record:
        result = self.ports.ported(spec, task, method)
        live, about, ported = self.ports.live(result), self.bench.recipe.tasks[task], result.tensors
        rows = self.bench.prepared(about, "train", live, shots=shots, seed=self.seed)
        how = Scale(shots=shots, per=spec.per, steps=spec.steps, lr=spec.lr)
        learned = learn_scales(live, ported, about, rows, how, Run(seed=self.seed))
        test = self.bench.scores(live, learned.state, about, "test")
        scaled = ported.at(alphas_by_tensor(ported, learned.alphas, spec.per))
        support = self.ports.on_support(spec, scaled, "test")
        return FewShot(self.seed, self.label, task, method.label, shots, test, support, learned.alphas, learned.losses)

    def _masked(self, spec: FewShotSpec, task: str, method: MethodSpec, shots: int) -> Record:
        result = self.ports.ported(spec, task, method)
        live, about, ported = self.ports.live(result), self.bench.recipe.tasks[task], result.tensors
        alpha = 1.0 if spec.mask_alpha == "cv" and shots == 1 else spec.mask_alpha
        found = mask_task_vector(
            with_state(live, ported.at(0.0).state()),
            ported,
            about,
            choose_shots(about, live, shots, data_dir=self.bench.settings.data_dir, seed=self.seed),
            Mask(per_class=shots, alpha=alpha, alphas=tuple(spec.alphas)),
            Run(seed=self.seed),
        )
        test = self.bench.scores(live, found.ported.state(), about, "test")
        support = self.ports.on_support(spec, found.ported, "test")
        return FewShot(self.seed, self.label, task, method.label, shots, test, support, {"alpha": found.ported.alpha})

    def _tuned(self, spec: FewShotSpec, task: str, method: MethodSpec, shots: int) -> Record:
        result = self.ports.ported(spec, task, method)
        return self._tuned_from(result.tensors.at(1.0).state(), spec, task, method.label, shots, result)

    def _as_it_is(self, spec: FewShotSpec, task: str, method: MethodSpec, shots: int) -> Record:
        result = self.ports.ported(spec, task, method)
        live, about, ported = self.ports.live(result), self.bench.recipe.tasks[task], result.tensors
        test = self.bench.scores(live, ported.at(1.0).state(), about, "test")
        support = self.ports.on_support(spec, ported.at(1.0), "test")
        return FewShot(self.seed, self.label, task, method.label, shots, test, support)

    def tuning(self, spec: FewShotSpec, task: str, shots: int) -> Done:
        """Without: fine-tuning of the target."""
        depends = {**self.ports.depends_on(spec, task, NAIVE), "shots": shots, **_options_of(spec, "tune")}
        cell = self.ports.cell("fewshot", (task, FINE_TUNING, shots), depends)

        def make() -> Record:
            result = self.ports.ported(spec, task, NAIVE)
            return self._tuned_from(result.tensors.zero_shot(), spec, task, FINE_TUNING, shots, result)

        return self.ports.finished(cell, make)

    def _tuned_from(
        self,
        state: Mapping[str, Tensor],
        spec: FewShotSpec,
        task: str,
        label: str,
        shots: int,
        result: PortResult,
    ) -> Record:
        """Fine-tuning on the examples, from some weights; of several learning rates the best on validation data."""
        live, about = self.ports.live(result), self.bench.recipe.tasks[task]
        rows = self.bench.prepared(about, "train", live, shots=shots, seed=self.seed)
        start, steps = with_state(live, state), spec.tune_steps or spec.steps
        rates = sorted(set(spec.tune_lr)) if isinstance(spec.tune_lr, list) else [spec.tune_lr]
        tried = {lr: few_shot_tune(start, about, rows, steps=steps, lr=lr, seed=self.seed) for lr in rates}
        curve = [self._evaluated(one, about, "validation") for one in tried.values()] if len(tried) > 1 else []
        tuned = tried[choose_alpha(rates, curve, about) if curve else rates[0]]
        test = self._evaluated(tuned, about)
        # A head of the task's own says nothing about the support task.
        own = spec.support is not None and not result.tensors.carried
        support = self._evaluated(tuned, self.bench.recipe.tasks[spec.support or task]) if own else None
        return FewShot(self.seed, self.label, task, label, shots, test, support)

    def _evaluated(self, live: LiveModel, task: TaskSpec, split: Split = "test") -> dict[str, float]:
        return score_dict(evaluate(live, task, self.bench.prepared(task, split, live)))


def _options_of(spec: FewShotSpec, then: str) -> dict[str, Any]:
    """What the result of a way to use examples depends on."""
    return {
        "scale": {"steps": spec.steps, "lr": spec.lr, "per": spec.per},
        "mask": {"alpha": spec.mask_alpha, "alphas": spec.alphas},
        "tune": {"steps": spec.tune_steps or spec.steps, "lr": spec.tune_lr},
        "nothing": {},
    }[then]
