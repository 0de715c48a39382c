"""The models and methods of a recipe: where a model comes from, which options a method has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from ...data.splits import BaseModel, ConfigDict, Field, model_validator
from ...errors import InputError
from ...methods.table import METHODS, Method
from ...options.groups import AUTO
from ...options.requests import MethodRequest
from ...running.unlabelled import WITHOUT_DATA
from ...study.train import InitSpec, TrainSpec

FINE_TUNING = "fine-tuning"
ORACLE = "oracle"
# Seeds of a recipe are this far apart, so that seeds inside it never meet those of another one.
SEED_STEP = 1000
_THEN = {"scale": "", "mask": " + GradFix", "tune": ", then fine-tuning", "nothing": ", no labels"}


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


class InputsSpec(Spec):
    """Unlabelled inputs of a method that goes by activations.

    Attributes:
        count: so many training rows.
        task: whose; None: of the task that is carried. "synthetic": drawn ones, with the prompts of that task where it
            is a zero-shot one; "generated": texts that target writes.
    """

    count: int = Field(default=512, ge=2)
    task: str | None = None


class KeepSpec(Spec):
    """Unlabelled inputs on which a method leaves target as it is.

    Attributes:
        task: whose training rows they are. "synthetic": drawn ones; "generated": texts that target writes.
        count: so many.
        weight: beside the inputs of the task.
        moments: whether it gets inputs drawn from the moments of these rows, as many, in their place.
    """

    task: str
    count: int = Field(default=2048, ge=2)
    weight: float = Field(default=1.0, ge=0)
    moments: bool = False

    @model_validator(mode="after")
    def _of_rows(self) -> Self:
        if self.moments and self.task in WITHOUT_DATA:
            raise ValueError("moments are taken of the rows of a task, not of drawn inputs")
        return self


class MethodSpec(Spec):
    """A method with its options; in YAML its name alone, or its name with options of `MethodRequest` beside it.

    Attributes:
        method: a row of `METHODS`.
        name: its label in tables, where one method is there twice.
        options: those of `MethodRequest`.
        inputs: what it goes by, where that is activations; auto without them goes by weights.
        keep: on what target stays as it is.
        then: what a few labelled examples are for (section fewshot): "scale" (one for each part of the task vector),
            "mask" (GradFix), "tune" (fine-tuning of what was carried) or "nothing".
    """

    method: str
    name: str | None = Field(default=None, alias="label")
    options: dict[str, Any] = Field(default_factory=dict)
    inputs: InputsSpec | None = None
    keep: KeepSpec | None = None
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
        takes, given = None if self.row is None else self.row.update.takes, {"keep": self.keep, **self.options}
        for name in ("keep", "polish", "train_steps"):
            if takes is not None and given.get(name) and name not in takes:
                raise ValueError(f"method {self.method} does nothing that {name!r} could change; leave it out")
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
