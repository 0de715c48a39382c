"""How the three models are related: is tuned a fine-tune of source, and do source and target share coordinates."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .errors import InputError
from .maps import Maps
from .match import NullTest, alignment, weight_evidence
from .models import Models


@dataclass(frozen=True)
class DeltaReport:
    """The task vector: tuned - source.

    Attributes:
        relative_norm: its norm over the norm of source.
        parts: the same by part (embeddings, each layer, the rest); None where source is zero and tuned is not.
        changed: share of tensors that changed at all.
        verdict: "fine-tune", "large" (more than half the weights' own norm) or "unrelated" (more than all of it).
    """

    relative_norm: float
    parts: dict[str, float | None]
    changed: float
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """For result.json."""
        return asdict(self)


def delta_report(models: Models) -> DeltaReport:
    """Measures the task vector.

    Raises:
        InputError: it is zero: tuned is the same model as source.
    """
    source, tuned = models.source, models.tuned
    assert tuned is not None
    squares: dict[str, list[float]] = {}
    changed = total = 0
    for name in source.floats():
        if name not in tuned.disk or tuned.shape(name) != source.shape(name):
            continue
        base = source.tensor(name).double()
        delta = tuned.tensor(name).double() - base
        part = squares.setdefault(part_of(name), [0.0, 0.0])
        part[0] += float(delta.square().sum())
        part[1] += float(base.square().sum())
        changed, total = changed + bool(delta.any()), total + 1
    if not changed:
        raise InputError(
            f"tuned {tuned.checkpoint.location} has the same weights as source {source.checkpoint.location}: the task "
            "vector is zero, there is nothing to port (was the base given twice, or the fine-tune never saved?)"
        )
    # JSON has no infinity; a part that is zero in both did not change.
    parts = {part: (d / b) ** 0.5 if b else None if d else 0.0 for part, (d, b) in squares.items()}
    overall = (sum(d for d, _ in squares.values()) / max(sum(b for _, b in squares.values()), 1e-30)) ** 0.5
    verdict = "fine-tune" if overall < 0.5 else "large" if overall < 1 else "unrelated"
    return DeltaReport(overall, parts, changed / total, verdict)


def part_of(name: str) -> str:
    """The part of a model a tensor is counted under: its layer, or its first name."""
    found = re.search(r"^(.*?)(layers?|resblocks|blocks)\.(\d+)\.", name)
    return f"{found.group(1)}{found.group(2)}.{found.group(3)}" if found else name.split(".")[0]


@dataclass(frozen=True)
class Relation:
    """How source and target are related.

    Attributes:
        cosine: of all matrices as they are.
        verdict: "same-lineage", "related-coordinates", "no-correspondence" or "not-tested".
        text: the verdict in a sentence.
        null: the null test behind it.
    """

    cosine: float
    verdict: str
    text: str
    null: NullTest | None = None

    def as_dict(self) -> dict[str, Any]:
        """For result.json."""
        return asdict(self)


TEXTS = {
    "same-lineage": "Same lineage: the two bases share their coordinates as they are; adding the task vector (naive) "
    "is the right thing, and matching should return the identity.",
    "related-coordinates": "Related coordinates: units of the two bases correspond after matching, far beyond what "
    "matching reaches on a shuffled target.",
    "no-correspondence": "No correspondence found in the weights: matching reaches no more than it reaches on a "
    "shuffled target. A port by weights alone is not expected to carry the task over; check it on data before use.",
    "not-tested": "The relation of the two bases was not tested beyond their cosine.",
}


def relation(models: Models, maps: Maps | None = None, null: NullTest | None = None) -> Relation:
    """Says how source and target are related.

    Args:
        maps, null: what matching and its null test found, if they were run.
    """
    cosine = null.identity if null else raw_cosine(models)
    if cosine > 0.3 and (maps is None or maps.report.get("identity_is_as_good") or maps.is_identity):
        verdict = "same-lineage"
    elif null is None:
        verdict = "not-tested"
    else:
        verdict = "related-coordinates" if null.corresponds else "no-correspondence"
    return Relation(cosine, verdict, TEXTS[verdict], null)


def raw_cosine(models: Models) -> float:
    """Cosine of source and target over all matrices that both have, as they are."""
    if models.layout.spaces:
        return alignment(weight_evidence(models, models.layout, "cpu"), {})
    product = left = right = 0.0
    for name in models.shared():
        one, other = (model.tensor(name).double() for model in (models.source, models.target))
        if one.ndim > 1:
            product += float((one * other).sum())
            left, right = left + float(one.square().sum()), right + float(other.square().sum())
    return product / max((left * right) ** 0.5, torch.finfo(torch.float64).tiny)
