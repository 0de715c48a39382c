"""What a benchmark measures, one frozen record a measurement: written as JSON by the cells, read by the report.

A *regime* is one target of a recipe (its label): continued, planted, independent, ... A *method* is named by its label,
so that one method can be there twice with other options.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

Scores = Mapping[str, float]  # metric -> value: fractions from 0 to 1, losses in nats


@dataclass(frozen=True)
class Metric:
    """The metric by which a task is judged."""

    name: str = "accuracy"
    higher_is_better: bool = True

    @property
    def in_points(self) -> bool:
        """Whether it is a share, shown in percent points; losses are shown as they are."""
        return self.higher_is_better


@dataclass(frozen=True)
class Alignment:
    """What matching found between two bases, without any data.

    Attributes:
        regime: target's label; in the interpolation section the label of the pair.
        method: its label; `exact` and `exportable` are the guarantees of its row.
        verdict, text: how the bases are related, as in `relation.TEXTS`; `towers` has the verdict of each tower.
        null: tower -> identity, matched, chance, excess, z, and of MLPs p_numbered and p_paired; None where the null
            test was not run.
        equivalence: `Equivalence.as_dict()`, or None where nothing moves.
        layers: part -> cosine of mapped source and target: identity, matched and, where the null test was run, chance.
        heads: head group -> share of heads that moved, and share placed as the spectra alone would.
        similarity: over all weights, before and after matching.
    """

    kind: ClassVar[str] = "alignment"
    seed: int
    regime: str
    method: str
    exact: bool
    exportable: bool
    verdict: str
    text: str
    null: dict[str, dict[str, float]] | None
    equivalence: dict[str, Any] | None
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    heads: dict[str, dict[str, float]] = field(default_factory=dict)
    similarity: tuple[float, float] | None = None
    towers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ZeroShot:
    """Target as it is (with tuned's head on it where the head is carried), on test and validation."""

    kind: ClassVar[str] = "zero-shot"
    seed: int
    regime: str
    task: str
    test: Scores
    validation: Scores
    support: Scores | None = None
    support_validation: Scores | None = None


@dataclass(frozen=True)
class Reference:
    """The fine-tune itself, on the source it belongs to: what whoever keeps the old model has.

    Attributes:
        test: on its task.
        support: on what should not be lost, with source's own head.
    """

    kind: ClassVar[str] = "reference"
    seed: int
    task: str
    test: Scores
    support: Scores | None = None


@dataclass(frozen=True)
class Ported:
    """One fine-tune carried to one target by one method.

    Attributes:
        alphas, validation: the scores on the validation split, one for each alpha.
        chosen: the best of them (the smaller of equals).
        at_one, at_chosen: on the test split, at alpha 1 and at the chosen one.
        support_at_one, support_at_chosen: the same on the support task.
    """

    kind: ClassVar[str] = "transport"
    seed: int
    regime: str
    task: str
    method: str
    alphas: tuple[float, ...]
    validation: tuple[Scores, ...]
    chosen: float
    at_one: Scores
    at_chosen: Scores
    support_at_one: Scores | None = None
    support_at_chosen: Scores | None = None


KEPT, AS_IT_IS = "keep the old fine-tune", "the new base as it is"


@dataclass(frozen=True)
class Worth:
    """What one has on a task, and of what the new base is better at, with one of the models one may take.

    Attributes:
        row: `KEPT`, `AS_IT_IS`, the label of a method, or that of a way of retraining.
        test: on the task.
        support: on the support task: old base's or new base's own head, with what was added to it.
        corrupted: on the task's images, corrupted (mean over the corruptions); None for texts.
        seconds: of the port or the training.
        memory: of the port, bytes at most above those at its start.
        drift: of the port from the new base, on the inputs it went by (see `update.drift`).
    """

    kind: ClassVar[str] = "worth"
    seed: int
    regime: str
    task: str
    row: str
    test: Scores
    support: Scores | None = None
    corrupted: Scores | None = None
    seconds: float | None = None
    memory: int | None = None
    drift: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class AlphaCurve:
    """Scores over alpha, on validation splits only."""

    kind: ClassVar[str] = "alpha"
    seed: int
    regime: str
    task: str
    method: str
    alphas: tuple[float, ...]
    scores: tuple[Scores, ...]
    support: tuple[Scores, ...] | None = None


@dataclass(frozen=True)
class FewShot:
    """One scale for each part learned from `shots` examples a class, or plain fine-tuning on them."""

    kind: ClassVar[str] = "fewshot"
    seed: int
    regime: str
    task: str
    method: str
    shots: int
    test: Scores
    support: Scores | None = None
    scales: dict[str, float] = field(default_factory=dict)
    losses: tuple[float, ...] = ()


@dataclass(frozen=True)
class Interpolated:
    """Scores on the straight line from the mapped source (lambda 0) to target (lambda 1).

    Attributes:
        regime: label of the pair.
        skips: how the skip connections were interpolated: "identity", "linear" or "rounded".
        source: of source itself; lambda 0 has to equal it if the maps keep the function.
        barrier: largest loss above the straight line between the losses of the ends.
    """

    kind: ClassVar[str] = "interpolation"
    seed: int
    regime: str
    method: str
    skips: str
    lambdas: tuple[float, ...]
    scores: tuple[Scores, ...]
    source: Scores
    barrier: float
    midpoint_loss: float


Record = Alignment | ZeroShot | Reference | Ported | Worth | AlphaCurve | FewShot | Interpolated
KINDS: dict[str, type[Any]] = {
    one.kind: one for one in (Alignment, ZeroShot, Reference, Ported, Worth, AlphaCurve, FewShot, Interpolated)
}


def as_json(record: Record) -> dict[str, Any]:
    """A record as plain JSON types, with its kind."""
    return {"kind": record.kind, **asdict(record)}


def from_json(found: Mapping[str, Any]) -> Record:
    """The record that `as_json` made.

    Raises:
        KeyError, TypeError: it is none.
    """
    rest = {key: _frozen(value) for key, value in found.items() if key != "kind"}
    return KINDS[found["kind"]](**rest)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(one) for one in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Failure:
    """A cell or a model that could not be made; `what` names it."""

    what: str
    error: str


@dataclass(frozen=True)
class MethodLine:
    """A row of a section, in the order of the tables: its role is "control", "method", "oracle" or "reference"."""

    label: str
    method: str
    role: str


@dataclass(frozen=True)
class SectionPlan:
    """What a section of a recipe is about, in the order in which it is shown.

    Attributes:
        kind: "transport", "worth", "alpha", "fewshot" or "interpolation".
        regimes: labels of the targets (or pairs).
        tasks: names; of an interpolation, the one task.
        verdict_methods: labels whose null test says how the bases are related.
    """

    kind: str
    regimes: tuple[str, ...]
    tasks: tuple[str, ...]
    methods: tuple[MethodLine, ...]
    support: str | None = None
    shots: tuple[int, ...] = ()
    verdict_methods: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results:
    """All of one run: the input of tables, figures and page.

    Attributes:
        metrics: task name -> its metric.
        provenance: what produced it: recipe, versions, options, models, seconds.
    """

    name: str
    title: str
    about: str
    paper: str
    seeds: tuple[int, ...]
    metrics: Mapping[str, Metric]
    sections: tuple[SectionPlan, ...]
    records: tuple[Record, ...]
    failures: tuple[Failure, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
