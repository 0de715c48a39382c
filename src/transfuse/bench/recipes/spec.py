"""Recipes: one YAML file that describes the models, tasks, methods and measurements of a table or figure.

    recipe = load_recipe("table1-clip-vitb16")   # shipped, or the path of a file

What a file may hold is what the classes below say; a wrong key is an error that names the file, the key and the keys
there are. Models are named in `models`, tasks in `tasks`; the sections (`transport`, `alpha`, `fewshot`,
`interpolation`) refer to them by name, so one recipe can share trained models among its sections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, get_args

# The extra `bench`; its absence was explained by the imports above.
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...data.tasks import TaskSpec
from ...errors import InputError
from ...methods.table import METHODS, Method
from ...options.groups import AUTO
from ...options.requests import MethodRequest
from ...running.unlabelled import SYNTHETIC
from ...study.train import InitSpec, TrainSpec

Positive = Annotated[float, Field(gt=0)]
Section = Literal["transport", "alpha", "fewshot", "interpolation"]
SECTIONS: tuple[Section, ...] = get_args(Section)
CONTROLS = ("naive", "random")
FINE_TUNING = "fine-tuning"
ORACLE = "oracle"
# Seeds of a recipe are this far apart, so that seeds inside it never meet those of another one.
SEED_STEP = 1000


def match_options() -> list[str]:
    """The options of a method that a recipe may set."""
    return list(MethodRequest.declared())


class Spec(BaseModel):
    """A part of a recipe: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ConvertSpec(Spec):
    """What becomes of a CLIP before it is used (see `convert`).

    Attributes:
        tokenizer: a hub id or a folder whose tokenizer is taken where the checkpoint has none.
        tower: "text" for its text tower alone.
    """

    tokenizer: str | None = None
    tower: Literal["text"] | None = None


class ModelSpec(Spec):
    """Where a model comes from: exactly one of four forms.

    Attributes:
        location: a hub id or a folder.
        convert: with `location` or `init`: a CLIP of open_clip to be made one of transformers, or its text tower.
        architecture: its transformers class ("CLIPModel"); with `location`, for dry runs on tiny models.
        init: random weights from a config.
        base, train: trained from another model.
        base, plant, of: `base` in other coordinates, which computes the same: drawn from the symmetries that the source
            model `of` shares with it.
        seed: of planting.
    """

    location: str | None = None
    convert: ConvertSpec | None = None
    architecture: str | None = None
    init: InitSpec | None = None
    base: str | None = None
    train: TrainSpec | None = None
    plant: Literal["permutation", "rotation"] | None = None
    of: str | None = None
    seed: int = 0

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = {key for key in ("location", "init", "base", "train", "plant", "of") if getattr(self, key) is not None}
        if given not in ({"location"}, {"init"}, {"base", "train"}, {"base", "plant", "of"}):
            raise ValueError(
                f"a model is given by location, by init, by base + train or by base + plant + of; here: "
                f"{', '.join(sorted(given)) or 'nothing'}"
            )
        if self.convert is not None and not given <= {"location", "init"}:
            raise ValueError("convert goes with location or init")
        return self

    @property
    def given(self) -> str | None:
        """Where it is used as it lies; None where it has to be made."""
        return self.location if self.convert is None else None

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the models that this one is made from."""
        return tuple(one for one in (self.base, self.of) if one is not None)

    def shifted(self, seed: int, limit: int | None = None) -> ModelSpec:
        """This model under a recipe's seed, trained on `limit` rows at most."""
        changes: dict[str, Any] = {"seed": self.seed + SEED_STEP * seed}
        if self.init is not None:
            changes["init"] = self.init.model_copy(update={"seed": self.init.seed + SEED_STEP * seed})
        if self.train is not None:
            rows = [one for one in (self.train.limit, limit) if one is not None]
            new = {"seed": self.train.seed + SEED_STEP * seed, "limit": min(rows) if rows else None}
            changes["train"] = self.train.model_copy(update=new)
        return self.model_copy(update=changes)


_THEN = {"scale": "", "mask": " + GradFix", "tune": ", then fine-tuning", "nothing": ", no labels"}


class InputsSpec(Spec):
    """Unlabelled inputs of a method that goes by activations.

    Attributes:
        count: so many training rows.
        task: whose; None: of the task that is carried. "synthetic": drawn ones.
    """

    count: int = Field(default=512, ge=2)
    task: str | None = None


class MethodSpec(Spec):
    """A method with its options; in YAML its name alone, or its name with options of `MethodRequest` beside it.

    Attributes:
        method: a row of `METHODS`.
        name: its label in tables, where one method is there twice.
        options: those of `MethodRequest`.
        inputs: what it goes by, where that is activations; auto without them goes by weights.
        then: what a few labelled examples are for (section fewshot): "scale" (one for each part of the task vector),
            "mask" (GradFix), "tune" (fine-tuning of what was carried) or "nothing".
    """

    method: str
    name: str | None = Field(default=None, alias="label")
    options: dict[str, Any] = Field(default_factory=dict)
    inputs: InputsSpec | None = None
    then: Literal["scale", "mask", "tune", "nothing"] = "scale"

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"method": given}
        if not isinstance(given, Mapping):
            return given
        rest = {key: value for key, value in given.items() if key in match_options()}
        if not rest:
            return given
        return {**{k: v for k, v in given.items() if k not in rest}, "options": {**given.get("options", {}), **rest}}

    @model_validator(mode="after")
    def _is_known(self) -> Self:
        if self.method not in METHODS and self.method != AUTO:
            raise ValueError(f"unknown method {self.method!r}; known: {', '.join((*METHODS, AUTO))}")
        try:
            MethodRequest.of(**self.options)
        except InputError as error:
            raise ValueError(f"method {self.method}: {error}") from error
        if self.label in (FINE_TUNING, ORACLE):
            raise ValueError(f"the label {self.label!r} is taken; give another one")
        return self

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.name or f"{self.method}{_THEN[self.then]}"

    @property
    def row(self) -> Method | None:
        """Its row in the table; None: auto, which takes one."""
        return METHODS.get(self.method)

    @property
    def by_task(self) -> bool:
        """Whether it looks at each fine-tune's inputs anew, so that there are no maps for all of them."""
        return self.row is None or self.row.needs_inputs

    @property
    def wanted_inputs(self) -> InputsSpec | None:
        """The inputs it is given."""
        return self.inputs or (InputsSpec() if self.row is not None and self.by_task else None)


class TunedSpec(Spec):
    """The fine-tune of a task: the name of a model."""

    tuned: str


class TransportSpec(Spec):
    """Fine-tunes of one source, carried to several targets (Rinaldi et al. 2025, Tables 1 to 3; Fig. 4 as `alpha`).

    Attributes:
        source: name of the old base.
        targets: label of the regime -> name of the new base.
        tasks: name of a task -> its fine-tune.
        support: name of a task on which nothing should be lost.
        methods: rows of the tables; the controls are added.
        alphas: scales tried on the validation split.
        null_trials: shuffled targets of each kind in the null test.
    """

    source: str
    targets: dict[str, str] = Field(min_length=1)
    tasks: dict[str, TunedSpec] = Field(min_length=1)
    support: str | None = None
    methods: list[MethodSpec] = Field(min_length=1)
    alphas: list[float] = Field(default=[0.2, 0.4, 0.6, 0.8, 1.0], min_length=1)
    null_trials: int = Field(default=1, ge=0)

    @property
    def regimes(self) -> dict[str, tuple[str, str]]:
        """Label -> (source, target)."""
        return {label: (self.source, target) for label, target in self.targets.items()}


class FewShotSpec(TransportSpec):
    """A few labelled examples: scales of the parts of the task vector (Table 4), GradFix, fine-tuning.

    Attributes:
        shots: examples of each class.
        steps, lr: of the descent on the scales.
        per: "layer" or "tensor".
        tune_lr, tune_steps: of the baseline, plain fine-tuning of target, and of fine-tuning what was carried; of
            several learning rates the best on the validation split. No steps: as many as `steps`.
        mask_alpha: of GradFix: one scale, or "cv": that of `alphas` which is best by cross-validation on the examples,
            1 where there is only one of a class.
    """

    shots: list[int] = Field(default=[1, 4, 16], min_length=1)
    steps: int = Field(default=100, ge=1)
    lr: float = Field(default=0.05, gt=0)
    per: Literal["layer", "tensor"] = "layer"
    tune_lr: Positive | Annotated[list[Positive], Field(min_length=1)] = 1e-4
    tune_steps: int | None = Field(default=None, ge=1)
    mask_alpha: float | Literal["cv"] = "cv"


class InterpolationSpec(Spec):
    """The straight line from the mapped source to the target (Fig. 5).

    Attributes:
        pairs: label -> names of two models.
        task: on which both are measured.
        points: on the line, both ends counted; odd, so that the middle is one.
    """

    pairs: dict[str, tuple[str, str]] = Field(min_length=1)
    task: str
    methods: list[MethodSpec] = Field(min_length=1)
    points: int = Field(default=11, ge=3)
    null_trials: int = Field(default=1, ge=0)

    @model_validator(mode="after")
    def _has_middle(self) -> Self:
        if self.points % 2 == 0:
            raise ValueError(f"points is {self.points}; an odd number is needed, so that one of them is the middle")
        return self

    @property
    def regimes(self) -> dict[str, tuple[str, str]]:
        """Label -> (source, target)."""
        return dict(self.pairs)


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

    def section(self, name: Section) -> TransportSpec | FewShotSpec | InterpolationSpec | None:
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
    for section in ("transport", "alpha", "fewshot"):
        spec: TransportSpec | None = getattr(recipe, section)
        if spec is None:
            continue
        yield f"{section}.source", "model", spec.source
        yield from ((f"{section}.targets.{label}", "model", one) for label, one in spec.targets.items())
        for task, one in spec.tasks.items():
            yield f"{section}.tasks", "task", task
            yield f"{section}.tasks.{task}.tuned", "model", one.tuned
        for method in spec.methods:
            if method.inputs is not None and method.inputs.task not in (None, SYNTHETIC):
                yield f"{section}.methods.{method.label}.inputs", "task", str(method.inputs.task)
        if spec.support is not None:
            yield f"{section}.support", "task", spec.support
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
        if twice := {label for label in labels if labels.count(label) > 1}:
            raise ValueError(f"{section}.methods: {sorted(twice)[0]!r} is there twice; give one a label of its own")
        for one in spec.methods:
            add("method", one.label, (one.method, one.options, one.inputs, one.then), f"{section}.methods")
        for label, pair in spec.regimes.items():
            add("target", label, pair, section)
        for task, one in spec.tasks.items() if isinstance(spec, TransportSpec) else ():
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
