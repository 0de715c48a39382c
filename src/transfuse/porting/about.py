"""What a report says of the models before anything is matched, and what looks like a mistake in them."""

from __future__ import annotations

import logging
from typing import Any

from .._version import __version__
from ..evidence.relation import DeltaReport, delta_report, is_nearer_to_target
from ..models.model import Models
from ..models.plan import LABEL_HEAD, LANGUAGE_HEAD, Plan

log = logging.getLogger(__name__)


def about_models(models: Models, plan: Plan) -> dict[str, Any]:
    """The first part of `result.json`; warnings are said on stderr too."""
    delta = delta_report(models, [step.name for step in plan.of("carry")])
    opened = {model.role: model.checkpoint.origin or model.checkpoint for model in models.all()}
    return {
        "transfuse": __version__,
        "family": models.layout.family,
        "facts": dict(models.layout.facts),
        "models": {role: {"location": one.location, "fingerprint": one.fingerprint()} for role, one in opened.items()},
        "tensors": plan.count(),
        "carried": [step.out for step in plan.of("carry")],
        "dropped": [step.name for step in plan.of("drop")],
        "delta": delta.as_dict(),
        "resized": models.about_shapes(),
        "warnings": _warnings(models, plan, delta),
    }


def _warnings(models: Models, plan: Plan, delta: DeltaReport) -> list[str]:
    """What looks like a mistake but need not be one; said on stderr too."""
    assert models.tuned is not None
    source, tuned, target = models.source, models.tuned, models.target
    found = []
    if delta.verdict in ("large", "unrelated"):
        found.append(
            f"the task vector is {delta.relative_norm:.2f} of the weights' norm, much for a fine-tune: "
            f"is {source.checkpoint.location} really the base of {tuned.checkpoint.location}?"
        )
    if models.resizing is None and is_nearer_to_target(models):
        found.append(
            f"{tuned.checkpoint.location} is nearer to {target.checkpoint.location} than to "
            f"{source.checkpoint.location}: are the arguments in order (OLD_BASE TUNED NEW_BASE)?"
        )
    if any(LABEL_HEAD.match(n) for n in source.disk) and not any(LABEL_HEAD.match(n) for n in tuned.disk):
        found.append("source has a classifier and tuned has none: are OLD_BASE and TUNED swapped?")
    heads = [one.name for one in plan.of("carry") if LANGUAGE_HEAD.match(one.name)]
    if models.resizing is not None and heads:
        found.append(
            f"the head of a language model ({heads[0]}, ...) is carried to another shape but not fitted there: train "
            "it further before use"
        )
    for line in found:
        log.warning("%s", line)
    return found
