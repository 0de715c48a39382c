"""Merging at the target: one set of maps carries any number of task vectors, which are combined there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..files.opening import open_checkpoint
from ..methods.table import method_for_maps
from ..models.model import ModelLike, Models
from ..models.plan import make_plan
from ..options.groups import AUTO, Check, Output
from ..options.requests import MergeRequest, PortRequest
from ..update.merging import check_merge, merged
from .card import merge_card
from .output import write_port
from .port import opened, port_models
from .run import PortResult


def merge(
    source: ModelLike,
    tuned: Sequence[ModelLike],
    target: ModelLike,
    *,
    request: MergeRequest | None = None,
    **options: Any,
) -> PortResult:
    """Carries several fine-tunes of `source` over to `target` through one set of maps and merges them there.

    Args:
        source: the old base.
        tuned: its fine-tunes. One head, at most, can come along: those that bring one have to agree in it.
        target: the new base.
        request, **options: what is asked for (`MergeRequest`), options by name over it (`out`, `how`, `density`,
            `alpha`, `method`, ...). Method "auto" is "tied" here.

    Returns:
        PortResult, as of a port; its report has "merge" (how, density, the fine-tunes).

    Raises:
        InputError: an input or option cannot be used, or the fine-tunes bring different heads.
        VerificationError: as `port`.
    """
    asked = MergeRequest.asked(request, options)
    if not isinstance(tuned, Sequence) or isinstance(tuned, str):
        raise InputError(f"tuned is given as {type(tuned).__name__}: a list of fine-tunes is needed")
    how, out, run = asked.merge.how, asked.output.out, asked.run
    kept = check_merge(how, asked.merge.density, len(tuned))
    # Once: fingerprints take a while, and models in memory are copied.
    bases = open_checkpoint(source, role="source"), open_checkpoint(target, role="target")
    results, bearer = _ports(bases, tuned, asked)
    update = merged([one.tensors.update for one in results], how=how, density=kept, seed=run.seed)
    about = {"how": how, "density": kept, "tuned": [_about(result) for result in results]}
    form = results[bearer].report | _of_all(results) | {"merge": about}
    report = {key: value for key, value in form.items() if key != "delta"}
    result = replace(results[0], report=report, out=out, tensors=results[bearer].tensors.with_update(update))
    if out is not None:
        write_port(
            result, out, card=merge_card, verify=asked.check.verify, force=asked.output.force, progress=run.progress
        )
    return result


def _ports(
    bases: tuple[Checkpoint, Checkpoint], tuned: Sequence[ModelLike], asked: MergeRequest
) -> tuple[list[PortResult], int]:
    """A port of each fine-tune, and the number of the one whose head the output takes.

    The first finds the maps, and checks them, for all.
    """
    match = asked.match
    if match.maps is None:
        match = replace(match, method=method_for_maps(match.method).name)
    whole = asked.shared(PortRequest, match=match)
    runs = [opened(whole, bases[0], one, bases[1]) for one in tuned]
    bearer = _head_bearer([models for models, _ in runs])
    models, first = runs[0]
    results = [port_models(models, first.changed(output=Output()))]
    again = first.changed(
        match=replace(match, maps=results[0].maps, method=AUTO),
        check=Check(null_trials=0, verify=False),
        output=Output(),
    )
    return results + [port_models(models, again) for models, _ in runs[1:]], bearer


def _about(result: PortResult) -> dict[str, Any]:
    report = result.report
    return {**report["models"]["tuned"], **{key: report[key] for key in ("delta", "carried", "warnings")}}


def _of_all(results: Sequence[PortResult]) -> dict[str, Any]:
    """What holds for the whole merge: the findings about the bases, which only the first port made."""
    first = results[0].report
    shared = {
        key: first[key] for key in ("options", "maps_options", "match", "relation", "equivalence") if key in first
    }
    bases = {role: first["models"][role] for role in ("source", "target")}
    return shared | {
        "models": bases,
        "warnings": list(dict.fromkeys(line for result in results for line in result.report["warnings"])),
    }


def _head_bearer(opened: Sequence[Models]) -> int:
    """Number of the fine-tune whose head, and form, the output takes: the first that brings a head, else the first.

    Raises:
        InputError: another one has a different head.
    """
    plans = [make_plan(models) for models in opened]
    first = next((i for i, plan in enumerate(plans) if plan.of("carry")), 0)
    carried = {step.name for step in plans[first].of("carry")}
    for models, plan in zip(opened, plans, strict=True):
        mine = {step.name: step.action for step in plan.steps if step.action in ("add", "carry")}
        odd = {name for name, action in mine.items() if (action == "carry") != (name in carried)}
        odd |= {name for name in carried & mine.keys() if not _same(opened[first], models, name)}
        if odd:
            one, other = (m.tuned.checkpoint.location for m in (opened[first], models) if m.tuned is not None)
            raise InputError(
                f"{one} and {other} have different heads ({min(odd)!r}), and a model has room for one: merge bodies "
                "(leave the heads out of all but one fine-tune), or port each by itself with the same --maps"
            )
    return first


def _same(one: Models, other: Models, name: str) -> bool:
    assert one.tuned is not None and other.tuned is not None
    return torch.equal(one.tuned.tensor(name), other.tuned.tensor(name))
