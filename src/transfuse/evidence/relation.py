"""How the three models are related: is tuned a fine-tune of source, and do source and target share coordinates."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import InputError
from ..maps.collection import Maps
from ..models.model import Models
from ..models.products import cosine
from ..spaces.layout import part_of
from .null import NullTest
from .weights import layers_by_tower, weight_evidence


@dataclass(frozen=True)
class DeltaReport:
    """The task vector: tuned - source.

    Attributes:
        relative_norm: its norm over the norm of source.
        parts: the same by part (embeddings, each layer, the rest); None where source is zero and tuned is not.
        changed: share of tensors that changed at all.
        verdict: "fine-tune", "head-only" (nothing but a new head), "large" (more than half the weights' own norm) or
            "unrelated" (more than all of it).
    """

    relative_norm: float
    parts: dict[str, float | None]
    changed: float
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """For result.json."""
        return asdict(self)


def delta_report(models: Models, heads: Collection[str] = ()) -> DeltaReport:
    """Measures the task vector.

    Args:
        heads: names of what is carried over with tuned; one that source has not makes an unchanged body worth a port.

    Raises:
        InputError: it is zero, or no tensor of tuned has a name of source.
    """
    source, tuned = models.source, models.tuned
    assert tuned is not None
    squares: dict[str, list[float]] = {}
    changes = models.survey.changes
    for name, one in changes.items():
        part = squares.setdefault(part_of(name), [0.0, 0.0])
        part[0] += one.delta
        part[1] += one.base
    changed, total = sum(one.changed for one in changes.values()), len(changes)
    if not total:
        raise InputError(
            f"no tensor of tuned {tuned.checkpoint.location} has the name and shape of one of source "
            f"{source.checkpoint.location} ({next(iter(tuned.disk), '-')!r}, {next(iter(source.disk), '-')!r}): "
            "another architecture, or another prefix; name the family"
        )
    if not changed and all(name in changes for name in heads):
        raise InputError(
            f"tuned {tuned.checkpoint.location} has the same weights as source {source.checkpoint.location}: the task "
            "vector is zero, there is nothing to port (was the base given twice, or the fine-tune never saved?)"
        )
    # JSON has no infinity; a part that is zero in both did not change.
    parts = {part: (d / b) ** 0.5 if b else None if d else 0.0 for part, (d, b) in squares.items()}
    overall = (sum(d for d, _ in squares.values()) / max(sum(b for _, b in squares.values()), 1e-30)) ** 0.5
    return DeltaReport(overall, parts, changed / total, _delta_verdict(overall, changed))


def _delta_verdict(relative_norm: float, changed: int) -> str:
    if not changed:
        return "head-only"
    return "fine-tune" if relative_norm < 0.5 else "large" if relative_norm < 1 else "unrelated"


def is_nearer_to_target(models: Models) -> bool:
    """Whether tuned is nearer to target than to source, over the tensors all three have in one shape."""
    return models.survey.to_target < models.survey.to_source


@dataclass(frozen=True)
class Relation:
    """How source and target are related.

    Attributes:
        verdict: a key of `TEXTS`; of two towers, that of the one with less correspondence.
        text: the verdict in a sentence.
        towers: verdict of each tower ("model" where there is one).
        cosines: of the layers' matrices as they are, by tower.
        null: the null test behind it, by tower; None if it was not run.
    """

    verdict: str
    text: str
    towers: dict[str, str]
    cosines: dict[str, float]
    null: dict[str, NullTest] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For result.json."""
        return asdict(self)


# From the least correspondence to the most.
TEXTS = {
    "other-shapes": "The bases differ in width, depth, heads or activation, so no map between them keeps a function: "
    "what the fine-tune does can be carried over; its weights cannot, unless the bases are close relatives.",
    "not-tested": "The weights do not agree as they are, and no matching was tested.",
    "no-correspondence": "No correspondence found in the weights: matching reaches no more than it reaches on a "
    "shuffled target. A port by weights alone is not expected to carry the task over; check it on data before use.",
    "weak-correspondence": "Some units correspond, beyond what matching reaches on a shuffled target, but only part of "
    "the weights: expect a part of the gain at best, and compare with naive and with alpha 0 on data.",
    "related-coordinates": "The bases correspond unit by unit after matching, far beyond what matching reaches on a "
    "shuffled target.",
    "same-lineage": "The bases share their coordinates as they are; adding the task vector unchanged (naive) is right, "
    "and matching gives the identity or nearly so. How much comes along goes by their cosine: of a task nearly all at "
    "0.99, three fifths at 0.92 and a fifth at 0.53 in what was measured.",
}


def strength(null: Mapping[str, NullTest]) -> int:
    """How much a null test found, in its weakest tower: the place of the verdict in `TEXTS`."""
    return min((list(TEXTS).index(one.verdict) for one in null.values()), default=-1)


def relation(models: Models, maps: Maps | None = None, null: Mapping[str, NullTest] | None = None) -> Relation:
    """Says how source and target are related.

    Args:
        maps, null: what matching and its null test found, if they were run.
    """
    if models.resizing is not None:
        return Relation("other-shapes", TEXTS["other-shapes"], {}, {})
    cosines = {tower: one.identity for tower, one in null.items()} if null else raw_cosines(models)
    # Maps of activations have nothing to say on whether weights agree as they are.
    as_is = maps is None or maps.is_identity or bool(maps.report.get("identity_is_as_good", True))
    towers = {tower: _verdict(cosine, as_is, null[tower] if null else None) for tower, cosine in cosines.items()}
    weakest = min(towers.values(), key=list(TEXTS).index)
    text = TEXTS[weakest]
    if len(set(towers.values())) > 1:
        text += " By tower: " + ", ".join(f"{tower} {verdict}" for tower, verdict in towers.items()) + "."
    return Relation(weakest, text, towers, cosines, dict(null) if null else None)


def _verdict(cosine: float, as_is: bool, null: NullTest | None) -> str:
    if cosine > 0.3 and (as_is or (null is not None and null.matched < cosine + 0.01)):
        return "same-lineage"
    return "not-tested" if null is None else null.verdict


def raw_cosines(models: Models) -> dict[str, float]:
    """Cosine of source and target over the layers' matrices, as they are, by tower."""
    products = models.survey.products
    if models.layout.spaces:
        towers = layers_by_tower(weight_evidence(models, models.layout, "cpu"))
        return {tower: cosine(products[n] for n in names) for tower, names in towers.items()}
    return {"model": cosine(products.values())}
