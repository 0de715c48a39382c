"""A whole recipe: the models, tasks, methods and measurements of a table or figure, and that its names fit together.

Models are named in `models`, tasks in `tasks`; the sections (`transport`, `worth`, `alpha`, `fewshot`, `interpolation`)
refer to them by name, so one recipe can share trained models among its sections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from ...data.splits import Field, model_validator
from ...data.tasks import TaskSpec
from ...report.records import AS_IT_IS, KEPT
from ...running.unlabelled import WITHOUT_DATA
from .parts import ORACLE, ModelSpec, Spec
from .sections import CONTROLS, SECTIONS, CarriedSpec, FewShotSpec, InterpolationSpec, Section, TransportSpec, WorthSpec


class Limits(Spec):
    """Rows at most of a split; None: all."""

    train: int | None = Field(default=None, ge=1)
    validation: int | None = Field(default=None, ge=1)
    test: int | None = Field(default=None, ge=1)

    def capped(self, limit: int | None) -> Limits:
        """With no split above `limit`."""
        if limit is None:
            return self
        return Limits(**{key: limit if value is None else min(value, limit) for key, value in dict(self).items()})


class QuickSpec(Spec):
    """What a quick run changes; `train_scale` scales steps and epochs of every training."""

    seeds: list[int] | None = None
    limit: Limits | None = None
    train_scale: float = Field(default=1.0, gt=0)


class Recipe(Spec):
    """A whole recipe.

    Attributes:
        name: short, for files.
        title, about, paper: what it is, what the paper claims and what this run can say, where the claim is.
        seeds: every one makes models and draws of its own; the rows they are tested on are the same.
        limit: rows at most of every data set, trainings included.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    title: str
    about: str = ""
    paper: str = ""
    seeds: list[int] = Field(default=[0], min_length=1)
    tasks: dict[str, TaskSpec] = Field(min_length=1)
    models: dict[str, ModelSpec] = Field(min_length=1)
    limit: Limits = Limits()
    quick: QuickSpec | None = None
    transport: TransportSpec | None = None
    worth: WorthSpec | None = None
    alpha: TransportSpec | None = None
    fewshot: FewShotSpec | None = None
    interpolation: InterpolationSpec | None = None

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        if not any(getattr(self, section) for section in SECTIONS):
            raise ValueError(f"nothing to measure: give one of the sections {', '.join(SECTIONS)}")
        for where, kind, name in _references(self):
            known = self.tasks if kind == "task" else self.models
            if name not in known:
                raise ValueError(f"{where}: no {kind} {name!r}; there are: {', '.join(known)}")
        for name in self.models:
            _refuse_cycle(self.models, name)
        _refuse_ambiguity(self)
        return self

    def section(self, name: Section) -> CarriedSpec | InterpolationSpec | None:
        """A section by its name."""
        return getattr(self, name)

    def models_of(self, sections: Sequence[Section] = SECTIONS) -> list[str]:
        """Names of the models that sections need, each after those it is made from."""
        wanted: dict[str, None] = {}

        def add(name: str) -> None:
            for one in self.models[name].needs:
                add(one)
            wanted[name] = None

        for where, kind, name in _references(self):
            if kind == "model" and where.split(".")[0] in sections:
                add(name)
        return list(wanted)


def _references(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """(where, "model" or "task", name) of every name used in a recipe."""
    for name, model in recipe.models.items():
        for key in ("base", "of"):
            if (one := getattr(model, key)) is not None:
                yield f"models.{name}.{key}", "model", one
    for section in SECTIONS:
        spec = recipe.section(section)
        if not isinstance(spec, CarriedSpec):
            continue
        yield f"{section}.source", "model", spec.source
        yield from ((f"{section}.targets.{label}", "model", one) for label, one in spec.targets.items())
        for task, one in spec.tasks.items():
            yield f"{section}.tasks", "task", task
            yield f"{section}.tasks.{task}.tuned", "model", one.tuned
        for method in spec.methods:
            for key in ("inputs", "keep"):
                given = getattr(method, key)
                if given is not None and given.task not in (None, *WITHOUT_DATA):
                    yield f"{section}.methods.{method.label}.{key}", "task", str(given.task)
        if spec.support is not None:
            yield f"{section}.support", "task", spec.support
        if isinstance(spec, WorthSpec):
            for label, by_regime in spec.retrained.items():
                for regime, by_task in by_regime.items():
                    yield from ((f"{section}.retrained.{label}.{regime}", "model", one) for one in by_task.values())
    if recipe.interpolation is not None:
        yield "interpolation.task", "task", recipe.interpolation.task
        for label, pair in recipe.interpolation.pairs.items():
            yield from ((f"interpolation.pairs.{label}", "model", one) for one in pair)


def _refuse_ambiguity(recipe: Recipe) -> None:
    """A label means one thing in all sections, since they share what is found under it."""
    meant: dict[tuple[str, str], Any] = {}

    def add(kind: str, label: str, what: Any, where: str) -> None:
        if meant.setdefault((kind, label), what) != what:
            raise ValueError(
                f"{where}: the {kind} {label!r} is something else in another section; give it another label"
            )

    for section in SECTIONS:
        spec = recipe.section(section)
        if spec is None:
            continue
        labels = [one.label for one in spec.methods]
        if isinstance(spec, WorthSpec):
            labels += [*spec.retrained]
            taken = {*spec.retrained} & {*CONTROLS, ORACLE} | {*labels} & {KEPT, AS_IT_IS}
            if taken:
                raise ValueError(f"{section}: the label {sorted(taken)[0]!r} is taken; give another one")
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(f"{section}.methods: {sorted(twice)[0]!r} is there twice; give one a label of its own")
        for one in spec.methods:
            add("method", one.label, (one.method, one.options, one.inputs, one.keep, one.then), f"{section}.methods")
        for label, pair in spec.regimes.items():
            add("target", label, pair, section)
        for task, one in spec.tasks.items() if isinstance(spec, CarriedSpec) else ():
            add("fine-tune of task", task, one.tuned, f"{section}.tasks")
        support = getattr(spec, "support", None)
        if support is not None:
            add("support task of", "targets", support, f"{section}.support")


def _refuse_cycle(models: Mapping[str, ModelSpec], start: str) -> None:
    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            raise ValueError(f"models: {' -> '.join((*path, name))} are made from each other")
        for one in models[name].needs:
            visit(one, (*path, name))

    visit(start, ())
