"""The measurements of a recipe: what is in a cell, and how it is made.

Work is grouped by (seed, regime): the process that measures a regime keeps its models, its prepared data and its maps,
so maps and null test are made once, the task vector is transported once for all alphas, and the same weights are never
evaluated twice.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from .._version import __version__
from ..data.splits import Split
from ..data.tasks import TaskSpec
from ..errors import TransfuseError
from ..maps.collection import Maps
from ..methods.table import METHODS
from ..options.groups import Inputs, Run
from ..options.studies import Mask, Scale
from ..porting.port import port
from ..porting.run import PortResult
from ..report.records import AlphaCurve, FewShot, Interpolated, Record, Reference, Scores, ZeroShot
from ..report.records import Ported as PortedScores
from ..running.live import LiveModel, with_state
from ..running.scores import evaluate, score_dict
from ..running.unlabelled import SYNTHETIC
from ..study.gradfix import mask_task_vector
from ..study.interpolate import interpolate
from ..study.scale import alphas_by_tensor, few_shot_tune, learn_scales
from ..study.selection import choose_shots
from ..study.sweep import choose_alpha, support_state
from ..update.live import live_of
from ..update.ported import Ported
from .alignments import are_alike, describe, find_maps
from .cells import Cell, Done, Unfinished
from .choice import NAIVE, SectionSpec, has_oracle, is_tested, verdict_methods, with_controls
from .recipes.reading import FINE_TUNING, ORACLE, FewShotSpec, InterpolationSpec, MethodSpec, TransportSpec, stated
from .workbench import Workbench

log = logging.getLogger("transfuse.bench")

FORMAT = 2  # raised when what a record holds means something else


@dataclass(frozen=True)
class Aligned:
    """An alignment that is there, or why it is not."""

    done: Done
    maps: Maps | None


class Regime:
    """One source and target under one seed, and everything that is measured on them."""

    def __init__(self, bench: Workbench, seed: int, label: str):
        self.bench, self.seed, self.label = bench, seed, label
        sections = {name: bench.recipe.section(name) for name in bench.settings.sections}
        self.sections = {name: spec for name, spec in sections.items() if spec and label in spec.regimes}
        self.source, self.target = next(iter(self.sections.values())).regimes[label]
        self.pair = [bench.store.key(name, seed) for name in (self.source, self.target)]
        self.paths = (bench.location(self.source, seed), bench.location(self.target, seed))
        self.aligned: dict[str, Aligned] = {}
        self._last: tuple[tuple[str, str], PortResult] | None = None
        self._lives: dict[str, LiveModel] = {}

    def run(self) -> Iterator[Done]:
        """All cells of the regime, made where they are not there; a failure ends nothing but its cell."""
        for method, trials in self._alignments():
            self.aligned[method.label] = self._align(method, trials)
            yield self.aligned[method.label].done
        zero_shots: dict[str, None] = {}
        for name, spec in self.sections.items():
            if isinstance(spec, InterpolationSpec):
                yield from self._interpolation(spec)
                continue
            for task in spec.tasks:
                if task not in zero_shots:
                    yield self._zero_shot(spec, task)
                    zero_shots[task] = None
                yield from self._task(name, spec, task)

    def _task(self, section: str, spec: TransportSpec, task: str) -> Iterator[Done]:
        for method in self._methods(spec):
            if not method.by_task and self.aligned[method.label].maps is None:
                continue  # the alignment is among the failures
            if section == "transport":
                yield self._transport(spec, task, method)
            elif section == "alpha":
                yield self._curve(spec, task, method)
            elif isinstance(spec, FewShotSpec):
                yield from (self._few_shot(spec, task, method, shots) for shots in spec.shots)
        if isinstance(spec, FewShotSpec):
            yield from (self._tuning(spec, task, shots) for shots in spec.shots)

    def _methods(self, spec: SectionSpec) -> list[MethodSpec]:
        return with_controls(spec, has_oracle(self.bench.recipe, self.source, self.target))

    # --- alignment ------------------------------------------------------------------------------------------------

    def _alignments(self) -> list[tuple[MethodSpec, int]]:
        """Methods of all sections, with the trials of their null test."""
        found: dict[str, tuple[MethodSpec, int]] = {}
        for spec in self.sections.values():
            for method in (*verdict_methods(spec), *self._methods(spec)):
                if method.by_task:
                    continue
                trials = spec.null_trials if is_tested(method) and method.label != ORACLE else 0
                found[method.label] = (method, max(trials, found.get(method.label, (method, 0))[1]))
        return list(found.values())

    def _align(self, method: MethodSpec, trials: int) -> Aligned:
        cell = self._cell(
            "alignment", (method.label,), {"method": self._method_depends_on(method), "null_trials": trials}
        )
        found = self.bench.cells.read(cell)
        if found is not None:
            try:
                return Aligned(found, Maps.load(cell.maps_file))
            except TransfuseError:
                pass  # damaged: made again
        device, made = self.bench.settings.device, list[Maps]()
        measured = {one.label for spec in self.sections.values() for one in self._methods(spec)}

        def make() -> Record:
            # Where no weights can be matched, that is the verdict; a method that is measured fails instead.
            asked = method if method.label in measured or are_alike(*self.paths) else NAIVE
            maps = find_maps(*self.paths, asked, null_trials=trials, seed=self.seed, device=device)
            record = describe(*self.paths, maps, seed=self.seed, regime=self.label, method=method.label)
            cell.file.parent.mkdir(parents=True, exist_ok=True)
            maps.save(cell.maps_file)
            made.append(maps)
            return record

        done = make_cell(self.bench, cell, make)
        return Aligned(done, made[0] if done.error is None else None)

    # --- ports ----------------------------------------------------------------------------------------------------

    def _ported(self, spec: TransportSpec, task: str, method: MethodSpec) -> PortResult:
        """The port, its tensors held; the last one is kept, since its measurements follow each other."""
        # Rows that differ only in what comes after share one.
        key = (spec.tasks[task].tuned, json.dumps(self._method_depends_on(method), sort_keys=True))
        if self._last is None or self._last[0] != key:
            names = (self.source, spec.tasks[task].tuned, self.target)
            source, tuned, target = (self.bench.checkpoint(name, self.seed) for name in names)
            settings = self.bench.settings
            options = {"seed": self.seed, "device": settings.device, "data_dir": settings.data_dir}
            if method.by_task:
                options |= {"method": method.method, "inputs": self._inputs(method, task), **method.options}
            else:
                options["maps"] = self.aligned[method.label].maps
            result = port(source, tuned, target, verify=False, **options)
            self._last = (key, replace(result, tensors=result.tensors.held()))
        return self._last[1]

    def _inputs(self, method: MethodSpec, task: str) -> Inputs:
        wanted = method.wanted_inputs
        if wanted is None:
            return Inputs()
        name = wanted.task or task
        about = SYNTHETIC if name == SYNTHETIC else self.bench.recipe.tasks[name]
        return Inputs(about, count=wanted.count)

    def _live(self, result: PortResult) -> LiveModel:
        """The class of the ported model with its processors; its weights do not matter, so one serves all methods."""
        tuned = result.report["models"]["tuned"]["fingerprint"]
        if tuned not in self._lives:
            state = result.tensors.zero_shot()
            self._lives = {tuned: live_of(result.tensors, state, device=self.bench.settings.device)}
        return self._lives[tuned]

    def _on_support(self, spec: TransportSpec, ported: Ported, split: Any) -> Scores | None:
        """Scores on the support task: target with its own head, and what the port adds to the rest."""
        if spec.support is None:
            return None
        live = self.bench.live(self.target, self.seed)
        return self.bench.scores(live, support_state(ported), self.bench.recipe.tasks[spec.support], split)

    def _zero_shot(self, spec: TransportSpec, task: str) -> Done:
        supports = [one.support for one in self.sections.values() if isinstance(one, TransportSpec) and one.support]
        support = supports[0] if supports else None
        asked = spec.model_copy(update={"support": support})
        cell = self._cell("zero-shot", (task,), self._depends_on(asked, task, NAIVE))

        def make() -> Record:
            result = self._ported(spec, task, NAIVE)
            live, about, ported = self._live(result), self.bench.recipe.tasks[task], result.tensors
            test, validation = (
                self.bench.scores(live, ported.zero_shot(), about, split) for split in ("test", "validation")
            )
            on = [self._on_support(asked, ported.at(0.0), split) for split in ("test", "validation")]
            return ZeroShot(self.seed, self.label, task, test, validation, *on)

        return self._finished(cell, make)

    def _transport(self, spec: TransportSpec, task: str, method: MethodSpec) -> Done:
        alphas = tuple(sorted(set(spec.alphas)))
        depends = {**self._depends_on(spec, task, method), "alphas": alphas}
        cell = self._cell("transport", (task, method.label), depends)

        def make() -> Record:
            result = self._ported(spec, task, method)
            live, about, ported = self._live(result), self.bench.recipe.tasks[task], result.tensors
            curve = tuple(self.bench.scores(live, ported.at(one).state(), about, "validation") for one in alphas)
            chosen = choose_alpha(alphas, curve, about)
            ends = [self.bench.scores(live, ported.at(one).state(), about, "test") for one in (1.0, chosen)]
            on = [self._on_support(spec, ported.at(one), "test") for one in (1.0, chosen)]
            return PortedScores(self.seed, self.label, task, method.label, alphas, curve, chosen, *ends, *on)

        return self._finished(cell, make)

    def _curve(self, spec: TransportSpec, task: str, method: MethodSpec) -> Done:
        alphas = tuple(sorted(set(spec.alphas)))
        depends = {**self._depends_on(spec, task, method), "alphas": alphas}
        cell = self._cell("alpha", (task, method.label), depends)

        def make() -> Record:
            result = self._ported(spec, task, method)
            live, about, ported = self._live(result), self.bench.recipe.tasks[task], result.tensors
            curve = tuple(self.bench.scores(live, ported.at(one).state(), about, "validation") for one in alphas)
            on = [self._on_support(spec, ported.at(one), "validation") for one in alphas]
            support = tuple(one for one in on if one is not None) or None
            return AlphaCurve(self.seed, self.label, task, method.label, alphas, curve, support)

        return self._finished(cell, make)

    def _few_shot(self, spec: FewShotSpec, task: str, method: MethodSpec, shots: int) -> Done:
        ways = {"scale": self._scaled, "mask": self._masked, "tune": self._tuned, "nothing": self._as_it_is}
        how = {"shots": shots, "then": method.then, **_options_of(spec, method.then)}
        depends = {**self._depends_on(spec, task, method), **how}
        cell = self._cell("fewshot", (task, method.label, shots), depends)
        return self._finished(cell, partial(ways[method.then], spec, task, method, shots))

    def _scaled(self, spec: FewShotSpec, task: str, method: MethodSpec, shots: int) -> Record:
        result = self._ported(spec, task, method)
        live, about, ported = self._live(result), self.bench.recipe.tasks[task], result.tensors
        rows = self.bench.prepared(about, "train", live, shots=shots, seed=self.seed)
        how = Scale(shots=shots, per=spec.per, steps=spec.steps, lr=spec.lr)
        learned = learn_scales(live, ported, about, rows, how, Run(seed=self.seed))
        test = self.bench.scores(live, learned.state, about, "test")
        scaled = ported.at(alphas_by_tensor(ported, learned.alphas, spec.per))
        support = self._on_support(spec, scaled, "test")
        return FewShot(self.seed, self.label, task, method.label, shots, test, support, learned.alphas, learned.losses)

    def _masked(self, spec: FewShotSpec, task: str, method: MethodSpec, shots: int) -> Record:
        result = self._ported(spec, task, method)
        live, about, ported = self._live(result), self.bench.recipe.tasks[task], result.tensors
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
        support = self._on_support(spec, found.ported, "test")
        return FewShot(self.seed, self.label, task, method.label, shots, test, support, {"alpha": found.ported.alpha})

    def _tuned(self, spec: FewShotSpec, task: str, method: MethodSpec, shots: int) -> Record:
        result = self._ported(spec, task, method)
        return self._tuned_from(result.tensors.at(1.0).state(), spec, task, method.label, shots, result)

    def _as_it_is(self, spec: FewShotSpec, task: str, method: MethodSpec, shots: int) -> Record:
        result = self._ported(spec, task, method)
        live, about, ported = self._live(result), self.bench.recipe.tasks[task], result.tensors
        test = self.bench.scores(live, ported.at(1.0).state(), about, "test")
        support = self._on_support(spec, ported.at(1.0), "test")
        return FewShot(self.seed, self.label, task, method.label, shots, test, support)

    def _tuning(self, spec: FewShotSpec, task: str, shots: int) -> Done:
        depends = {**self._depends_on(spec, task, NAIVE), "shots": shots, **_options_of(spec, "tune")}
        cell = self._cell("fewshot", (task, FINE_TUNING, shots), depends)

        def make() -> Record:
            result = self._ported(spec, task, NAIVE)
            return self._tuned_from(result.tensors.zero_shot(), spec, task, FINE_TUNING, shots, result)

        return self._finished(cell, make)

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
        live, about = self._live(result), self.bench.recipe.tasks[task]
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

    # --- interpolation --------------------------------------------------------------------------------------------

    def _interpolation(self, spec: InterpolationSpec) -> Iterator[Done]:
        for method in self._methods(spec):
            if self.aligned[method.label].maps is not None:
                yield from self._lines(spec, method)

    def _lines(self, spec: InterpolationSpec, method: MethodSpec) -> Iterator[Done]:
        row = METHODS[method.method]
        forms = ("linear", "rounded") if row.form.permutes_skips else ("identity",)
        depends = {
            "method": self._method_depends_on(method),
            "task": self.bench.task_depends_on(spec.task),
            "points": spec.points,
        }
        cells = {form: self._cell("interpolation", (method.label, form), {**depends, "skips": form}) for form in forms}
        kept = {form: self.bench.cells.read(cell) for form, cell in cells.items()}
        curves: dict[str, Record] = {}

        def make(form: str) -> Record:
            if not curves:  # one call gives all forms
                curves.update(self._interpolated(spec, method))
            return curves[form]

        for form, cell in cells.items():
            yield kept[form] or make_cell(self.bench, cell, partial(make, form))

    def _interpolated(self, spec: InterpolationSpec, method: MethodSpec) -> dict[str, Record]:
        settings = self.bench.settings
        curves = interpolate(
            *self.paths,
            self.bench.recipe.tasks[spec.task],
            maps=self.aligned[method.label].maps,
            lambdas=[i / (spec.points - 1) for i in range(spec.points)],
            data_dir=settings.data_dir,
            limit=self.bench.recipe.limit.test,
            device=settings.device,
        )
        return {
            one.skips: Interpolated(
                self.seed,
                self.label,
                method.label,
                one.skips,
                one.lambdas,
                one.scores,
                one.source,
                one.barrier,
                one.midpoint_loss,
            )
            for one in curves
        }

    # --- cells ----------------------------------------------------------------------------------------------------

    def _cell(self, kind: str, labels: tuple[Any, ...], depends_on: Mapping[str, Any]) -> Cell:
        about = {"format": FORMAT, "version": __version__, "device": self.bench.settings.device.split(":")[0]}
        about |= {"seed": self.seed, "regime": self.label, "pair": self.pair, "labels": list(labels)}
        return self.bench.cells.cell(kind, (f"seed{self.seed}", self.label, *labels), {**about, **depends_on})

    def _depends_on(self, spec: TransportSpec, task: str, method: MethodSpec) -> dict[str, Any]:
        return {
            "method": self._method_depends_on(method),
            "tuned": self.bench.store.key(spec.tasks[task].tuned, self.seed),
            "task": self.bench.task_depends_on(task),
            "support": self.bench.task_depends_on(spec.support),
        }

    def _method_depends_on(self, method: MethodSpec) -> Any:
        wanted = method.wanted_inputs
        about = {"method": method.method, "options": method.options, "oracle": method.label == ORACLE}
        if wanted is None:
            return about
        named = None if wanted.task in (None, SYNTHETIC) else self.bench.task_depends_on(wanted.task)
        return {**about, "inputs": [stated(wanted), named]}

    def _finished(self, cell: Cell, make: Callable[[], Record]) -> Done:
        return self.bench.cells.read(cell) or make_cell(self.bench, cell, make)


def _options_of(spec: FewShotSpec, then: str) -> dict[str, Any]:
    """What the result of a way to use examples depends on."""
    return {
        "scale": {"steps": spec.steps, "lr": spec.lr, "per": spec.per},
        "mask": {"alpha": spec.mask_alpha, "alphas": spec.alphas},
        "tune": {"steps": spec.tune_steps or spec.steps, "lr": spec.tune_lr},
        "nothing": {},
    }[then]


def make_cell(bench: Workbench, cell: Cell, make: Callable[[], Record]) -> Done:
    """Makes a cell and keeps it; an error of ours is what became of it."""
    if bench.cells.only_read:
        raise Unfinished(cell.what)
    began = time.monotonic()
    try:
        record = make()
    except TransfuseError as error:
        log.info("%s: FAILED: %s", cell.what, error)
        return Done(cell.what, None, str(error), round(time.monotonic() - began, 3), True)
    done = bench.cells.write(cell, record, time.monotonic() - began)
    log.info("%s: %.1f s", cell.what, done.seconds)
    return done


def references(bench: Workbench, seed: int) -> Iterator[Done]:
    """The fine-tunes on the sources they belong to."""
    wanted: dict[str, str] = {}
    for name in bench.settings.sections:
        spec = bench.recipe.section(name)
        if isinstance(spec, TransportSpec):
            wanted |= {task: one.tuned for task, one in spec.tasks.items()}
    for task, tuned in wanted.items():
        yield _reference(bench, seed, task, tuned)


def _reference(bench: Workbench, seed: int, task: str, tuned: str) -> Done:
    about = {"format": FORMAT, "version": __version__, "tuned": bench.store.key(tuned, seed), "seed": seed}
    about |= {"device": bench.settings.device.split(":")[0], "task": bench.task_depends_on(task), "name": task}
    cell = bench.cells.cell("reference", (f"seed{seed}", task), about)

    def make() -> Record:
        live, spec = bench.live(tuned, seed), bench.recipe.tasks[task]
        return Reference(seed, task, score_dict(evaluate(live, spec, bench.prepared(spec, "test", live))))

    return bench.cells.read(cell) or make_cell(bench, cell, make)
