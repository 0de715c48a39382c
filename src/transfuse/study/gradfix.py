"""GradFix: a transported task vector, masked by the signs of a few gradients at the target (2510.09658).

The loss gradients of a few labelled examples, taken at the target without a step, vote entry by entry on the direction
in which the loss falls (`votes`). Where the task vector points there it is kept (`masks`): theta_B + alpha * m *
pi(tau), with m = 1[s = sign pi(tau)] (Rinaldi et al. 2026, ICLR). Here is the run: alpha, by cross-validation if asked,
and the target's own task vector as an oracle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.tasks import TaskSpec, load_task
from ..errors import InputError
from ..models.delta import task_vector
from ..models.model import ConfigLike, ModelLike, Models
from ..models.opening import open_models
from ..options.groups import Output, Run
from ..options.requests import PortRequest, RefineRequest
from ..options.studies import Mask
from ..porting.card import model_card
from ..porting.output import write_port
from ..porting.port import opened, port_models
from ..porting.run import PortResult
from ..running.inputs import Prepared, prepare
from ..running.live import LiveModel, with_state
from ..running.scores import evaluate, score_dict
from ..update.live import live_of
from ..update.ported import Ported
from .masks import MaskRule, Truth, mask_report, masked
from .scale import compared, moving_parts
from .selection import Shots, choose_shots
from .sweep import check_alphas
from .votes import Tally, tally

# --- alpha --------------------------------------------------------------------------------------------------------


def fold_positions(shots: Shots, folds: int) -> list[Tensor]:
    """Positions of the examples of each fold: those of a class are dealt out in turn; at most as many folds as that.

    Raises:
        InputError: a class has one example only, or there are fewer than two folds.
    """
    fewest = min(len(group) for group in shots.groups.values())
    if folds < 2 or fewest < 2:
        raise InputError(
            f"alpha cannot be cross-validated with {folds} folds and {fewest} examples of a class: at least two of "
            "both are needed; give alpha"
        )
    count = min(folds, fewest)
    return [torch.cat([group[fold::count] for group in shots.groups.values()]).sort().values for fold in range(count)]


def validated_alpha(
    live: LiveModel,
    ported: Ported,
    task: TaskSpec,
    folds: Sequence[tuple[Prepared, Tally]],
    rule: MaskRule,
    alphas: Sequence[float],
    truth: Truth | None = None,
) -> tuple[float, dict[str, Any]]:
    """The alpha with the least loss on the examples that its masks were made without.

    Args:
        live: the target.
        ported: with the whole task vector, held.
        folds: the examples of each fold, and their votes.
        alphas: candidates; 0 is one too.

    Returns:
        The alpha (of equals the smallest), and {"folds", "alphas", "losses"}.
    """
    candidates, losses = check_alphas((0.0, *alphas)), []
    for held, (rows, _) in enumerate(folds):
        others = reduce(add, (votes for number, (_, votes) in enumerate(folds) if number != held))
        kept = masked(ported, others, rule, truth)
        losses.append([len(rows) * _loss(live, task, rows, kept.at(alpha).state()) for alpha in candidates])
    count = sum(len(rows) for rows, _ in folds)
    means = [sum(column) / count for column in zip(*losses, strict=True)]
    best = min(zip([math.inf if math.isnan(one) else one for one in means], candidates, strict=True))[1]
    return best, {"folds": len(folds), "alphas": list(candidates), "losses": means}


def _loss(live: LiveModel, task: TaskSpec, rows: Prepared, state: Mapping[str, Tensor]) -> float:
    return score_dict(evaluate(with_state(live, state), task, rows))["loss"]


# --- the whole run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskResult:
    """A masked task vector.

    Attributes:
        ported: target and what is left of the task vector, at the scale that was chosen.
        report: see `refine`.
    """

    ported: Ported
    report: dict[str, Any]


def mask_task_vector(
    live: LiveModel,
    ported: Ported,
    task: TaskSpec,
    shots: Shots,
    mask: Mask,
    run: Run = Run(),
    *,
    truth: Truth | None = None,
) -> MaskResult:
    """Masks a transported task vector by the gradients of a few examples.

    Args:
        live: the target: the weights of `ported` at alpha 0.
        ported: target and the whole task vector, held.
        task, shots: the examples.
        mask: the rule, and how alpha is chosen.
        run: its seed, of the random mask, and whether there is a bar.
        truth: reads the target's own task vector, for the oracle.

    Raises:
        InputError: alpha cannot be cross-validated, or the task vector is zero.
        TransfuseError: a gradient is not finite.
    """
    rule, alpha = rule_of(mask, run), mask.alpha
    names = tuple(moving_parts(ported, "tensor"))
    parts = fold_positions(shots, mask.folds) if alpha == "cv" else [torch.arange(len(shots.rows))]
    voters = [shots.rows.select(part) for part in parts]
    about: dict[str, Any] = {"micro_batch": mask.micro_batch, "progress": run.progress}
    votes = [tally(live, task, rows, names, **about) for rows in voters]
    found, validation = reduce(add, votes), None
    if isinstance(alpha, str):
        held = list(zip(voters, votes, strict=True))
        alpha, validation = validated_alpha(live, ported, task, held, rule, mask.alphas, truth)
    kept = masked(ported, found, rule, truth).at(alpha)
    report = {
        "alpha": alpha,
        "validation": validation,
        "gradients": found.how,
        "before": _loss(live, task, shots.rows, ported.at(0.0).state()),
        "after": _loss(live, task, shots.rows, kept.state()),
        "mask": mask_report(ported, kept, found, rule, truth),
    }
    return MaskResult(kept, report)


def true_vector(ported: Ported, oracle: ModelLike, *, family: str | None = None, config: ConfigLike = None) -> Truth:
    """Reads the task vector of a fine-tune of the target itself.

    Raises:
        InputError: it lacks a tensor that the port adds to, or is the target itself.
    """
    models, target = ported.models, ported.models.target.checkpoint
    opened = open_models(target, target, oracle, family=family, config=config, need_layout=False)
    own, tuned = opened.target, opened.tuned
    assert tuned is not None
    # A model of an unknown family can have other names here than beside its source.
    on_disk = {name: known for known, name in own.disk.items()}
    names = {name: on_disk.get(models.target.disk.get(name, ""), name) for name in ported.added.values()}
    for name, known in names.items():
        if known not in tuned or tuned.shape(known) != own.shape(known):
            raise InputError(
                f"the oracle {tuned.checkpoint.location} has no tensor {name!r} of target's shape: is it a fine-tune "
                f"of {target.location}?"
            )

    def read(name: str) -> Tensor:
        return task_vector(own, tuned, names[name])[0]

    if not any(read(name).any() for name in names):
        raise InputError(f"the oracle {tuned.checkpoint.location} has the weights of the target, {target.location}")
    return read


def refine(
    source: ModelLike,
    tuned: ModelLike,
    target: ModelLike,
    task: TaskSpec | str | Path,
    *,
    request: RefineRequest | None = None,
    **options: Any,
) -> PortResult:
    """A port whose task vector is masked by the gradients of a few labelled examples, with test scores.

    The gradients are taken at the target, under the head that the result will have where tuned brings one along: only
    there do they say in which direction its loss falls.

    Args:
        source, tuned, target: see `port`.
        task: its "train" split gives the examples, its "test" split the scores; a spec, a YAML or JSON file, or JSON
            text.
        request, **options: what is asked for (`RefineRequest`), options by name over it (`per_class`, `out`, `alpha`,
            `mode`, `method`, ...).

    Returns:
        PortResult, as of a port; its report has "refine": the rule, the examples, the mask (`mask_report`), alpha and
        its validation, the loss on the examples ("before", "after"; under the same head), and test scores ("zero-shot",
        "alpha-1": the whole task vector, "refined").

    Raises:
        InputError: an input or option cannot be used.
    """
    asked = RefineRequest.asked(request, options)
    mask, run, out, task = asked.mask, asked.run, asked.output.out, load_task(task)
    models, whole = opened(asked.shared(PortRequest), source, tuned, target)
    result = port_models(models, whole.changed(output=Output()))
    held = result.tensors.held()
    truth = None if mask.oracle is None else true_vector(held, mask.oracle, **vars(asked.opening))
    live = live_of(held, held.at(0.0).state(), device=run.device)
    where: dict[str, Any] = {"data_dir": asked.data.data_dir, "seed": run.seed}
    chosen: dict[str, Any] = {"select": mask.select, "pool": mask.pool}
    shots = choose_shots(task, live, mask.per_class, **chosen, **where, progress=run.progress)
    found = mask_task_vector(live, held, task, shots, mask, run, truth=truth)
    rows = prepare(task, "test", live, limit=asked.data.limit, **where)
    lives = compared(live, held, refined=found.ported.state())
    about = {
        "rule": asdict(rule_of(mask, run)),
        **found.report,
        "per_class": mask.per_class,
        "examples": len(shots.rows),
        **chosen,
        "selected": dict(shots.numbers),
        "test": {name: score_dict(evaluate(one, task, rows)) for name, one in lives.items()},
    }
    refined = replace(result, report=result.report | {"refine": about}, out=out, tensors=found.ported)
    if out is not None:
        checks = {"verify": asked.check.verify, "force": asked.output.force, "progress": run.progress}
        write_port(refined, out, card=_card, **checks)
    return refined


def rule_of(mask: Mask, run: Run) -> MaskRule:
    """The rule that is asked for."""
    return MaskRule(mask.vote, mask.ties, mask.mode, mask.power, mask.temperature, run.seed)


def _card(models: Models, report: Mapping[str, Any]) -> str:
    found = report["refine"]
    said = f"{found['alpha']:g}, masked by the gradients of {found['examples']} examples ({found['rule']['mode']})"
    return model_card(models, {**report, "alpha": said})
