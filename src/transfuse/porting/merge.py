"""Merging at the target: one set of maps carries any number of task vectors, which are combined there."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files.checkpoint import open_checkpoint
from ..files.writing import check_output
from ..maps.collection import Maps
from ..maps.random import tensor_generator
from ..methods.table import DEFAULT_METHOD
from ..models.model import ConfigLike, ModelLike, Models
from ..models.opening import open_models
from ..models.plan import make_plan
from ..update.ported import PortedTensors
from .card import merge_card
from .port import PortResult, port, refuse_inputs, write_port

# The densities of the papers: TIES keeps the largest 20 %; DARE drops 90 % and loses next to nothing.
DENSITIES = {"sum": 1.0, "mean": 1.0, "ties": 0.2, "dare": 0.1}


def merge_deltas(
    deltas: Sequence[Mapping[str, Tensor]], *, how: str = "sum", density: float | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """One task vector out of many.

    - "sum": task arithmetic (Ilharco et al. 2023, 2212.04089); "mean": the same over their number.
    - "ties" (Yadav et al. 2023, 2306.01708): of each task vector only the entries of largest magnitude stay, tensor by
      tensor; each entry takes the sign with the larger total magnitude, and is the mean of the entries that have that
      sign. Where the two signs weigh the same, it is zero.
    - "dare" (Yu et al. 2024, 2311.03099): of each task vector a random share of entries stays, times the inverse of
      that share; then the sum.

    Args:
        deltas: task vectors by tensor name, in any floating dtype; one that lacks a tensor has no say in it.
        how: "sum", "mean", "ties" or "dare".
        density: share of entries that stay in "ties" and "dare"; None for that of the paper (`DENSITIES`).
        seed: of the entries that "dare" drops.

    Raises:
        InputError: an unknown `how`, a density outside (0, 1], or nothing to merge.
    """
    kept = check_merge(how, density, len(deltas))
    names = dict.fromkeys(name for delta in deltas for name in delta)
    return {
        name: _merge([delta.get(name) for delta in deltas], name, how=how, density=kept, seed=seed) for name in names
    }


def check_merge(how: str, density: float | None, count: int) -> float:
    """The density that is used.

    Raises:
        InputError: as `merge_deltas`.
    """
    if how not in DENSITIES:
        raise InputError(f"there is no way of merging named {how!r}; known: {', '.join(DENSITIES)}")
    if not count:
        raise InputError("there is nothing to merge: no fine-tune was given")
    if density is None:
        return DENSITIES[how]
    if how in ("sum", "mean") and density != 1:
        raise InputError(f"a density is for ties and dare; {how!r} keeps every entry")
    if not 0 < density <= 1:
        raise InputError(f"density is {density}; a share above 0 and up to 1 is needed")
    return density


def _merge(given: Sequence[Tensor | None], name: str, *, how: str, density: float, seed: int) -> Tensor:
    """One tensor of all task vectors; each has entries to drop of its own, whichever the others are."""
    if how == "dare":
        drawn = [tensor_generator(seed, f"{i}/{name}") for i in range(len(given))]
        given = [None if x is None else _drop(x, density, g) for x, g in zip(given, drawn, strict=True)]
    there = [x for x in given if x is not None]
    stacked = torch.stack(there)  # (fine-tunes, ...)
    if how == "ties":
        return _ties(torch.stack([_trim(x, density) for x in there]))
    return stacked.mean(0) if how == "mean" else stacked.sum(0)


def _drop(x: Tensor, density: float, generator: torch.Generator) -> Tensor:
    kept = torch.rand(x.shape, generator=generator, dtype=torch.float64) < density
    return torch.where(kept, x / density, torch.zeros_like(x))


def _trim(x: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude (all that are equal to the last of them too); the others are zero."""
    if density == 1 or not x.numel():
        return x
    count = max(1, math.ceil(density * x.numel()))
    threshold = x.abs().flatten().kthvalue(x.numel() - count + 1).values
    return torch.where(x.abs() >= threshold, x, torch.zeros_like(x))


def _ties(trimmed: Tensor) -> Tensor:
    """Elected signs and the mean of what agrees with them, over the first dimension."""
    agrees = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    total = torch.where(agrees, trimmed, torch.zeros_like(trimmed)).sum(0)
    return total / agrees.sum(0).clamp_min(1)


class MergedTensors(PortedTensors):
    """The tensors of target plus a merged task vector, one at a time."""

    def __init__(self, parts: Sequence[PortedTensors], bearer: int, *, how: str, density: float, seed: int):
        first = parts[bearer]  # its head and form are those of the output
        super().__init__(first.models, first.plan, first.maps, first.alpha, first.noise_seed, first.fitted)
        self.how, self.density, self.seed = how, density, seed
        self.parts = [(part, {step.name for step in part.plan.of("add")}) for part in parts]

    def delta(self, name: str) -> Tensor:
        """The merged task vector of one tensor in the coordinates of target."""
        found = [part.delta(name) if name in added else None for part, added in self.parts]
        return _merge(found, name, how=self.how, density=self.density, seed=self.seed)


def merge(
    source: ModelLike,
    target: ModelLike,
    tuned: Sequence[ModelLike],
    *,
    out: str | os.PathLike[str] | None = None,
    how: str = "sum",
    alpha: float = 1.0,
    density: float | None = None,
    method: str = DEFAULT_METHOD,
    maps: Maps | str | os.PathLike[str] | None = None,
    family: str | None = None,
    config: ConfigLike = None,
    null_trials: int = 1,
    verify: bool = True,
    double: bool = False,
    force: bool = False,
    progress: bool = False,
    seed: int = 0,
    **options: Any,
) -> PortResult:
    """Carries several fine-tunes of `source` over to `target` through one set of maps and merges them there.

    Args:
        source, target: old and new base.
        tuned: fine-tunes of source. One head, at most, can come along: those that bring one have to agree in it.
        out: folder to write; None keeps the result in memory.
        how, density: see `merge_deltas`.
        alpha: scale of the merged task vector.
        method, maps, family, config, null_trials, verify, double, force, progress: see `port`.
        seed: of matching, the null test and "dare".
        **options: fields of `MatchOptions`.

    Returns:
        PortResult, as of a port; its report has "merge" (how, density, the fine-tunes).

    Raises:
        InputError: an input cannot be used, or the fine-tunes bring different heads.
        VerificationError: as `port`.
    """
    kept = check_merge(how, density, len(tuned))
    place = None if out is None else Path(out)
    if place is not None:
        check_output(place, force=force)
    # Once: fingerprints take a while, and models in memory are copied.
    source, target = open_checkpoint(source, role="source"), open_checkpoint(target, role="target")
    tuned = [open_checkpoint(one, role="tuned") for one in tuned]
    known = {"family": family, "config": config}
    opened = [open_models(source, target, one, need_layout=False, **known) for one in tuned]
    bearer = _head_bearer(opened)
    if place is not None:
        for models in opened:
            refuse_inputs(models, place, maps)
    common = {"method": method, "alpha": alpha, "seed": seed, "progress": progress, **known, **options}
    checks = {"null_trials": null_trials, "verify": verify, "double": double}
    results = [port(source, tuned[0], target, maps=maps, **checks, **common)]
    for other in tuned[1:]:
        results.append(port(source, other, target, maps=results[0].maps, null_trials=0, verify=False, **common))
    tensors = MergedTensors([one.tensors for one in results], bearer, how=how, density=kept, seed=seed)
    about = {"how": how, "density": kept, "tuned": [_about(result) for result in results]}
    form = results[bearer].report | _of_all(results) | {"merge": about}
    report = {key: value for key, value in form.items() if key != "delta"}
    result = replace(results[0], report=report, out=place, tensors=tensors)
    if place is not None:
        write_port(result, place, card=merge_card, verify=verify, force=force, progress=progress)
    return result


def _about(result: PortResult) -> dict[str, Any]:
    report = result.report
    return {**report["models"]["tuned"], **{key: report[key] for key in ("delta", "carried", "warnings")}}


def _of_all(results: Sequence[PortResult]) -> dict[str, Any]:
    """What holds for the whole merge: the findings about the bases, which only the first port made."""
    first = results[0].report
    shared = {key: first[key] for key in ("options", "match", "relation", "equivalence") if key in first}
    bases = {role: first["models"][role] for role in ("source", "target")}
    return shared | {"models": bases, "warnings": [line for result in results for line in result.report["warnings"]]}


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
