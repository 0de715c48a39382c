"""GradFix: a transported task vector, masked by the signs of a few gradients at the target (2510.09658).

The loss gradients of a few labelled examples, taken at the target without a step, vote entry by entry on the direction
in which the loss falls. Where the task vector points there it is kept: theta_B + alpha * m * pi(tau), with
m = 1[s = sign pi(tau)] (Rinaldi et al. 2026, ICLR).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.tasks import TaskSpec, load_task
from ..errors import InputError, TransfuseError
from ..files.configs import quiet_transformers
from ..maps.random import tensor_generator
from ..models.delta import task_vector
from ..models.model import ConfigLike, ModelLike, Models
from ..models.opening import open_models
from ..options.groups import Output, Run
from ..options.requests import PortRequest, RefineRequest
from ..options.studies import Mask
from ..porting.card import model_card
from ..porting.output import write_port
from ..porting.port import port
from ..porting.run import PortResult
from ..running.inputs import Batch, Prepared, prepare
from ..running.live import LiveModel, module_params, with_state
from ..running.scores import evaluate, loss_of, score_dict
from ..spaces.layout import part_of
from ..update.live import live_of
from ..update.objects import Masked
from ..update.ported import Ported
from .scale import check_place, compared, fixed_inputs, moving_parts
from .selection import Shots, choose_shots
from .sweep import check_alphas

log = logging.getLogger(__name__)

VOTES = ("majority", "mean")
TIES = ("mean", "drop", "keep")
MODES = ("normal", "force", "soft-share", "soft-sigmoid", "random", "oracle")

MEMORY = 10**9  # bytes of gradients of single examples that are held at once

Truth = Callable[[str], Tensor]  # canonical name -> the target's own task vector
Vectors = dict[str, Tensor]  # by output name


@dataclass(frozen=True)
class MaskRule:
    """How gradients become a mask; s is the sign of the direction in which the loss falls, by their vote.

    Attributes:
        vote: "majority", s = sign(sum over n of sign(-g_n)), or "mean", s = sign(-sum over n of g_n).
        ties: what becomes of an entry whose vote is 0: "mean": the other vote decides, and if that is 0, too, it is
            left out; "drop": it is left out; "keep": it is kept as it is.
        mode: "normal": the entries of sign s are kept. "force": every entry gets sign s. "random": as many entries of
            every tensor as "normal" keeps, but which is chance. "oracle": s is the sign of the target's own task
            vector. "soft-share", "soft-sigmoid": every entry is weighted by p^power, or sigmoid((2 p - 1) /
            temperature), where p is the share of examples whose -g has its sign (g = 0 counts half); the second tends
            to the mask of the majority as the temperature falls.
        power, temperature: see mode.
        seed: of mode "random".
    """

    vote: str = "majority"
    ties: str = "mean"
    mode: str = "normal"
    power: float = 2.0
    temperature: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("vote", VOTES), ("ties", TIES), ("mode", MODES)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        for name in ("power", "temperature"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name} is {getattr(self, name)}; it has to be above zero")
        if self.mode.startswith("soft") and self.vote != "majority":
            raise InputError(f"mode {self.mode} weighs by the votes of single examples; leave vote {self.vote!r} out")


@dataclass(frozen=True)
class Tally:
    """The votes of some examples.

    Attributes:
        votes: sum over examples of sign(-g), int32, by output name.
        sums: sum over examples of g.
        count: number of examples.
        how: "vmap", or "loop" where the model's class cannot be vectorised over examples.
    """

    votes: Vectors
    sums: Vectors
    count: int
    how: str

    def __add__(self, other: Tally) -> Tally:
        votes = {name: one + other.votes[name] for name, one in self.votes.items()}
        sums = {name: one + other.sums[name] for name, one in self.sums.items()}
        return Tally(votes, sums, self.count + other.count, self.how)


# --- gradients ----------------------------------------------------------------------------------------------------


def tally(
    live: LiveModel,
    task: TaskSpec,
    prepared: Prepared,
    names: Sequence[str],
    *,
    micro_batch: int | None = None,
    progress: bool = False,
) -> Tally:
    """The gradients of the loss of each example, summed up as they come: all of them are never held.

    Dropout is off. What is zero but for rounding (the bias of attention keys, say) votes at random.

    Args:
        live: the model whose weights the gradients are taken at.
        task, prepared: the examples.
        names: output names of the tensors that vote.
        micro_batch: gradients computed at once, each as large as these tensors; None: as many as `MEMORY` has room
            for, and no more than a batch of the task. It changes no result but the last bits.
        progress: a bar on stderr.

    Raises:
        InputError: `micro_batch` is below 1, or the model does not fit the task.
        TransfuseError: a gradient is not finite.
    """
    if micro_batch is not None and micro_batch < 1:
        raise InputError(f"micro-batches of {micro_batch} examples; at least one is needed")
    point = _point(live, names)
    votes = {name: torch.zeros(live.shapes[name], dtype=torch.int32, device=live.device) for name in names}
    sums = {name: torch.zeros(live.shapes[name], dtype=live.dtype, device=live.device) for name in names}
    rows = fixed_inputs(live, task, prepared, names)
    size = micro_batch or min(prepared.batch_size, max(1, MEMORY // sum(x.nbytes for x in point.values())))
    with torch.no_grad():  # torch.func differentiates all the same; nothing around it is to record
        how, gradients = _gradients(live, task, rows, point, size)
        for found in tqdm(gradients, total=len(rows), desc="gradients", unit="example", disable=not progress):
            for name, gradient in found.items():
                votes[name] -= gradient.sign().int()
                sums[name] += gradient
    for name, one in sums.items():
        if not one.isfinite().all():
            raise TransfuseError(f"{live.location}: the gradient of {name!r} is not finite on the examples")
    return Tally(_on_cpu(votes), _on_cpu(sums), len(rows), how)


def _on_cpu(vectors: Vectors) -> Vectors:
    return {name: one.cpu() for name, one in vectors.items()}


def _point(live: LiveModel, names: Collection[str]) -> Vectors:
    """Where the gradients are taken: the model's own weights, by output name.

    Raises:
        InputError: the class has none of them.
    """
    found = {out: live.model.get_parameter(name).detach() for name, out in live.stored_names.items() if out in names}
    missing = sorted(set(names) - found.keys())
    if not found:
        raise InputError(
            f"{live.location}: none of the tensors that change is a parameter of {type(live.model).__name__}"
        )
    if missing:
        log.warning("%s are no parameters of the model's class, and do not vote", ", ".join(missing[:5]))
    return found


def _gradients(
    live: LiveModel, task: TaskSpec, rows: Prepared, point: Vectors, size: int
) -> tuple[str, Iterator[Vectors]]:
    """How they are computed, and the gradients of one example after another."""
    plain, shared = _with_plain_attention(live), rows.extra

    def loss(params: Vectors, own: Batch) -> Tensor:
        one = {name: x[None] for name, x in own.items()}
        return loss_of(plain, task, {**one, **shared}, params=module_params(live, params))

    gradient = torch.func.grad(loss)
    batched = torch.func.vmap(gradient, in_dims=(None, 0))

    def read(index: Tensor) -> Batch:
        return {name: x.to(live.device) for name, x in rows.batch(index).items() if name not in shared}

    def vectorised() -> Iterator[Vectors]:
        for index in torch.arange(len(rows)).split(size):
            found = batched(point, read(index))
            for i in range(len(index)):
                yield {name: one[i] for name, one in found.items()}

    def looped() -> Iterator[Vectors]:
        for index in torch.arange(len(rows)).split(1):
            yield gradient(point, {name: x[0] for name, x in read(index).items()})

    try:
        batched(point, read(torch.arange(1)))
    except (RuntimeError, TypeError, ValueError) as error:  # what is wrong in itself is raised again by the loop
        log.info("%s is run example by example: %s", type(live.model).__name__, str(error).partition("\n")[0])
        return "loop", looped()
    return "vmap", vectorised()


def _with_plain_attention(live: LiveModel) -> LiveModel:
    """A copy without fused attention, which vmap would take apart, and whose gradients may differ from run to run."""
    copied: Any = copy.deepcopy(live.model)
    if hasattr(copied, "set_attn_implementation"):
        with quiet_transformers():
            copied.set_attn_implementation("eager")
    return replace(live, model=copied)


# --- masks --------------------------------------------------------------------------------------------------------


def vote_signs(found: Tally, out: str, tau: Tensor, rule: MaskRule) -> Tensor:
    """The sign (-1, 0 or 1) that the examples give every entry of a tensor, ties settled.

    Args:
        found: the votes.
        out: output name of the tensor.
        tau: what would be added to it.
    """
    votes, mean = found.votes[out].sign().to(tau), -found.sums[out].sign().to(tau)
    signs = mean if rule.vote == "mean" else votes
    if rule.ties == "drop":
        return signs
    return torch.where(signs == 0, mean if rule.ties == "mean" else tau.sign(), signs)


def mask_of(found: Tally, out: str, tau: Tensor, rule: MaskRule, *, name: str, truth: Tensor | None = None) -> Tensor:
    """The mask of one tensor (`Masked`): which entries stay (bool), or what they are multiplied with.

    Args:
        found, out, tau: see `vote_signs`.
        name: canonical name of the tensor, which the random control draws by.
        truth: the target's own task vector, for the oracle.
    """
    if rule.mode.startswith("soft"):
        return _weights(found, out, tau, rule)
    signs = vote_signs(found, out, tau, rule) if truth is None else truth.to(tau).sign()
    if rule.mode == "force":
        return torch.where(tau < 0, -signs, signs)  # so that the product is |tau| times the sign
    kept = (signs == tau.sign()) & (tau != 0)
    if rule.mode == "random":
        kept = _at_random(kept, tau != 0, tensor_generator(rule.seed, name))
    return kept


def _weights(found: Tally, out: str, tau: Tensor, rule: MaskRule) -> Tensor:
    """The weights of a soft mode, from 0 to 1; margin is 2 p - 1."""
    margin = tau.sign() * found.votes[out].to(tau) / found.count
    if rule.mode == "soft-sigmoid":
        return (margin / rule.temperature).sigmoid()
    return ((1 + margin) / 2) ** rule.power


def _at_random(kept: Tensor, among: Tensor, generator: torch.Generator) -> Tensor:
    """As many entries as `kept` has, at random among those of `among`."""
    places = among.flatten().nonzero().flatten()
    chosen = torch.zeros(kept.numel(), dtype=torch.bool)
    chosen[places[torch.randperm(len(places), generator=generator)[: int(kept.sum())]]] = True
    return chosen.view(kept.shape)


def masked(ported: Ported, found: Tally, rule: MaskRule, truth: Truth | None = None) -> Ported:
    """The port with what is left of its task vector; tensors that do not vote stay as they are."""
    names, masks = ported.added, {}
    for out in found.votes:
        name, true = names[out], None if truth is None else truth(names[out])
        masks[name] = mask_of(found, out, ported.change(out), rule, name=name, truth=true)
    return ported.with_update(Masked(ported.update, masks))


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


# --- what the mask is like ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Counts:
    """Over the entries of the task vector that are not zero.

    Attributes:
        entries: how many.
        added: the sum of the shares of them that are added.
        ties: those whose vote is 0, before the rule for ties.
        silent: those of which no example has a gradient.
        agreeing: those whose vote has the sign of the task vector.
        known, right: those with a vote of which an oracle knows the sign, and of these those where the vote has it.
    """

    entries: int = 0
    added: float = 0.0
    ties: int = 0
    silent: int = 0
    agreeing: int = 0
    known: int = 0
    right: int = 0

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def as_dict(self) -> dict[str, Any]:
        """Shares; None where there is nothing to have a share of."""
        found = {
            "entries": self.entries,
            "density": self.added / self.entries,
            "ties": self.ties / self.entries,
            "silent": self.silent / self.entries,
            "agreement": _share(self.agreeing, self.entries - self.ties),
        }
        return found | ({"oracle_agreement": self.right / self.known} if self.known else {})


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _counts(whole: Ported, kept: Ported, found: Tally, rule: MaskRule, out: str, truth: Truth | None) -> _Counts:
    name = whole.added[out]
    tau, delta = whole.change(out), kept.change(out)
    moving = tau != 0
    vote = vote_signs(found, out, tau, replace(rule, ties="drop")) * moving
    true = vote if truth is None else truth(name).to(tau).sign() * (vote != 0)
    return _Counts(
        entries=int(moving.sum()),
        added=(delta.abs() / tau.abs())[moving].double().sum().item(),
        ties=int((moving & (vote == 0)).sum()),
        silent=int((moving & (found.votes[out] == 0) & (found.sums[out] == 0)).sum()),
        agreeing=int(((vote == tau.sign()) & (vote != 0)).sum()),
        known=0 if truth is None else int((true != 0).sum()),
        right=0 if truth is None else int(((vote == true) & (true != 0)).sum()),
    )


def mask_report(
    whole: Ported, kept: Ported, found: Tally, rule: MaskRule, truth: Truth | None = None
) -> dict[str, Any]:
    """What a mask leaves, in all, by part and by tensor.

    Args:
        whole: with the whole task vector.
        kept: what `masked` made of it.
        found, rule, truth: as given to that.

    Returns:
        "entries" (not zero in the task vector), and shares of them: "density" (added; of soft masks the mean weight),
        "ties" (vote 0, before the rule), "silent" (no example has a gradient), and, of those with a vote, "agreement"
        (its sign is the task vector's) and "oracle_agreement". "parts" and "tensors" have the same. "slope" is by how
        much the examples' mean loss changes with alpha at alpha 0, "whole_slope" that of the whole task vector.
    """
    names = whole.added
    tensors = {names[out]: _counts(whole, kept, found, rule, out, truth) for out in found.votes}
    parts: dict[str, _Counts] = {}
    for name, one in tensors.items():
        parts[part_of(name)] = parts.get(part_of(name), _Counts()) + one
    return {
        **sum(tensors.values(), _Counts()).as_dict(),
        "parts": {name: one.as_dict() for name, one in parts.items()},
        "tensors": {name: one.as_dict() for name, one in tensors.items()},
        "slope": _slope(kept, found),
        "whole_slope": _slope(whole, found),
    }


def _slope(ported: Ported, found: Tally) -> float:
    return sum((one.double() * ported.change(out)).sum().item() for out, one in found.sums.items()) / found.count


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
    check_place(asked, (source, tuned, target))
    result = port(source, tuned, target, request=asked.shared(PortRequest, output=Output()))
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
