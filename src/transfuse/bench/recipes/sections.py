"""The sections of a recipe: what is measured, of which models, by which methods."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from ...data.splits import Field, model_validator
from .parts import MethodSpec, Spec

Positive = Annotated[float, Field(gt=0)]
Section = Literal["transport", "worth", "alpha", "fewshot", "interpolation"]
SECTIONS: tuple[Section, ...] = get_args(Section)
CONTROLS = ("naive", "random")


class TunedSpec(Spec):
    """The fine-tune of a task: the name of a model."""

    tuned: str


class CarriedSpec(Spec):
    """Fine-tunes of one source, carried to several targets.

    Attributes:
        source: name of the old base.
        targets: label of the regime -> name of the new base.
        tasks: name of a task -> its fine-tune.
        support: name of a task on which nothing should be lost.
        methods: rows of the tables; the controls are added.
        null_trials: shuffled targets of each kind in the null test.
    """

    source: str
    targets: dict[str, str] = Field(min_length=1)
    tasks: dict[str, TunedSpec] = Field(min_length=1)
    support: str | None = None
    methods: list[MethodSpec] = Field(min_length=1)
    null_trials: int = Field(default=1, ge=0)

    @property
    def regimes(self) -> dict[str, tuple[str, str]]:
        """Label -> (source, target)."""
        return {label: (self.source, target) for label, target in self.targets.items()}


class TransportSpec(CarriedSpec):
    """What is carried, at several scales (Rinaldi et al. 2025, Tables 1 to 3; Fig. 4 as `alpha`).

    Attributes:
        alphas: scales tried on the validation split.
    """

    alphas: list[float] = Field(default=[0.2, 0.4, 0.6, 0.8, 1.0], min_length=1)


class WorthSpec(CarriedSpec):
    """Is a port worth more than keeping the old model, or retraining?

    Attributes:
        retrained: label of a row -> label of the regime -> name of a task -> a model trained on target with labels.
    """

    retrained: dict[str, dict[str, dict[str, str]]] = Field(default={})

    @model_validator(mode="after")
    def _is_about_these(self) -> Self:
        for label, by_regime in self.retrained.items():
            for regime, by_task in by_regime.items():
                if regime not in self.targets:
                    raise ValueError(f"retrained.{label}: no target {regime!r}; there are: {', '.join(self.targets)}")
                if odd := [task for task in by_task if task not in self.tasks]:
                    raise ValueError(f"retrained.{label}.{regime}: {odd[0]!r} is none of {', '.join(self.tasks)}")
        return self


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
