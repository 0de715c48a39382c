"""The measurements of a recipe: what is in a cell, and how it is made.

Work is grouped by (seed, regime): the process that measures a regime keeps its models, its prepared data and its maps,
so maps and null test are made once, the task vector is transported once for all alphas (`ports`), and the same weights
are never evaluated twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ..errors import TransfuseError
from ..maps.collection import Maps
from ..methods.table import METHODS
from ..report.records import AlphaCurve, Interpolated, Record, ZeroShot
from ..report.records import Ported as PortedScores
from ..study.interpolate import interpolate
from ..study.sweep import choose_alpha
from .alignments import are_alike, describe, find_maps
from .cells import Done
from .choice import NAIVE, SectionSpec, has_oracle, is_tested, verdict_methods, with_controls
from .few_labels import FewLabels
from .ports import Aligned, Ports
from .recipes.parts import ORACLE, MethodSpec
from .recipes.sections import CarriedSpec, FewShotSpec, InterpolationSpec, TransportSpec, WorthSpec
from .workbench import Workbench
from .worth import Worths


class Regime:
    """One source and target under one seed, and everything that is measured on them."""

    def __init__(self, bench: Workbench, seed: int, label: str):
        self.bench, self.seed, self.label = bench, seed, label
        sections = {name: bench.recipe.section(name) for name in bench.settings.sections}
        self.sections = {name: spec for name, spec in sections.items() if spec and label in spec.regimes}
        self.ports = Ports(bench, seed, label, next(iter(self.sections.values())).regimes[label])

    def run(self) -> Iterator[Done]:
        """All cells of the regime, made where they are not there; a failure ends nothing but its cell."""
        for method, trials in self._alignments():
            self.ports.aligned[method.label] = self._align(method, trials)
            yield self.ports.aligned[method.label].done
        zero_shots: dict[str, None] = {}
        for name, spec in self.sections.items():
            if isinstance(spec, InterpolationSpec):
                yield from self._interpolation(spec)
                continue
            if isinstance(spec, WorthSpec):
                worths = Worths(self.ports)
                yield from (one for task in spec.tasks for one in worths.rows(spec, task, self._measurable(spec)))
            elif isinstance(spec, TransportSpec):
                for task in spec.tasks:
                    if task not in zero_shots:
                        yield self._zero_shot(spec, task)
                        zero_shots[task] = None
                    yield from self._task(name, spec, task)

    def _task(self, section: str, spec: TransportSpec, task: str) -> Iterator[Done]:
        few_labels = FewLabels(self.ports)
        for method in self._measurable(spec):
            if section == "transport":
                yield self._transport(spec, task, method)
            elif section == "alpha":
                yield self._curve(spec, task, method)
            elif isinstance(spec, FewShotSpec):
                yield from (few_labels.carried(spec, task, method, shots) for shots in spec.shots)
        if isinstance(spec, FewShotSpec):
            yield from (few_labels.tuning(spec, task, shots) for shots in spec.shots)

    def _methods(self, spec: SectionSpec) -> list[MethodSpec]:
        return with_controls(spec, has_oracle(self.bench.recipe, self.ports.source, self.ports.target))

    def _measurable(self, spec: CarriedSpec) -> list[MethodSpec]:
        """Its methods, but for those whose alignment is among the failures."""
        aligned = self.ports.aligned
        return [one for one in self._methods(spec) if one.by_task or aligned[one.label].maps is not None]

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
        cell = self.ports.cell(
            "alignment", (method.label,), {"method": self.ports.method_depends_on(method), "null_trials": trials}
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
            asked = method if method.label in measured or are_alike(*self.ports.paths) else NAIVE
            maps = find_maps(*self.ports.paths, asked, null_trials=trials, seed=self.seed, device=device)
            record = describe(*self.ports.paths, maps, seed=self.seed, regime=self.label, method=method.label)
            cell.file.parent.mkdir(parents=True, exist_ok=True)
            maps.save(cell.maps_file)
            made.append(maps)
            return record

        done = self.bench.cells.made(cell, make)
        return Aligned(done, made[0] if done.error is None else None)

    # --- ports ----------------------------------------------------------------------------------------------------

    def _zero_shot(self, spec: TransportSpec, task: str) -> Done:
        supports = [one.support for one in self.sections.values() if isinstance(one, TransportSpec) and one.support]
        support = supports[0] if supports else None
        asked = spec.model_copy(update={"support": support})
        cell = self.ports.cell("zero-shot", (task,), self.ports.depends_on(asked, task, NAIVE))

        def make() -> Record:
            result = self.ports.ported(spec, task, NAIVE)
            live, about, ported = self.ports.live(result), self.bench.recipe.tasks[task], result.tensors
            test, validation = (
                self.bench.scores(live, ported.zero_shot(), about, split) for split in ("test", "validation")
            )
            on = [self.ports.on_support(asked, ported.at(0.0), split) for split in ("test", "validation")]
            return ZeroShot(self.seed, self.label, task, test, validation, *on)

        return self.ports.finished(cell, make)

    def _transport(self, spec: TransportSpec, task: str, method: MethodSpec) -> Done:
        alphas = tuple(sorted(set(spec.alphas)))
        depends = {**self.ports.depends_on(spec, task, method), "alphas": alphas}
        cell = self.ports.cell("transport", (task, method.label), depends)

        def make() -> Record:
            result = self.ports.ported(spec, task, method)
            live, about, ported = self.ports.live(result), self.bench.recipe.tasks[task], result.tensors
            curve = tuple(self.bench.scores(live, ported.at(one).state(), about, "validation") for one in alphas)
            chosen = choose_alpha(alphas, curve, about)
            ends = [self.bench.scores(live, ported.at(one).state(), about, "test") for one in (1.0, chosen)]
            on = [self.ports.on_support(spec, ported.at(one), "test") for one in (1.0, chosen)]
            return PortedScores(self.seed, self.label, task, method.label, alphas, curve, chosen, *ends, *on)

        return self.ports.finished(cell, make)

    def _curve(self, spec: TransportSpec, task: str, method: MethodSpec) -> Done:
        alphas = tuple(sorted(set(spec.alphas)))
        depends = {**self.ports.depends_on(spec, task, method), "alphas": alphas}
        cell = self.ports.cell("alpha", (task, method.label), depends)

        def make() -> Record:
            result = self.ports.ported(spec, task, method)
            live, about, ported = self.ports.live(result), self.bench.recipe.tasks[task], result.tensors
            curve = tuple(self.bench.scores(live, ported.at(one).state(), about, "validation") for one in alphas)
            on = [self.ports.on_support(spec, ported.at(one), "validation") for one in alphas]
            support = tuple(one for one in on if one is not None) or None
            return AlphaCurve(self.seed, self.label, task, method.label, alphas, curve, support)

        return self.ports.finished(cell, make)

    # --- interpolation --------------------------------------------------------------------------------------------

    def _interpolation(self, spec: InterpolationSpec) -> Iterator[Done]:
        for method in self._methods(spec):
            if self.ports.aligned[method.label].maps is not None:
                yield from self._lines(spec, method)

    def _lines(self, spec: InterpolationSpec, method: MethodSpec) -> Iterator[Done]:
        row = METHODS[method.method]
        forms = ("linear", "rounded") if row.form.permutes_skips else ("identity",)
        depends = {
            "method": self.ports.method_depends_on(method),
            "task": self.bench.task_depends_on(spec.task),
            "points": spec.points,
        }
        cells = {
            form: self.ports.cell("interpolation", (method.label, form), {**depends, "skips": form}) for form in forms
        }
        kept = {form: self.bench.cells.read(cell) for form, cell in cells.items()}
        curves: dict[str, Record] = {}

        def make(form: str) -> Record:
            if not curves:  # one call gives all forms
                curves.update(self._interpolated(spec, method))
            return curves[form]

        for form, cell in cells.items():
            yield kept[form] or self.bench.cells.made(cell, partial(make, form))

    def _interpolated(self, spec: InterpolationSpec, method: MethodSpec) -> dict[str, Record]:
        settings = self.bench.settings
        curves = interpolate(
            *self.ports.paths,
            self.bench.recipe.tasks[spec.task],
            maps=self.ports.aligned[method.label].maps,
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
