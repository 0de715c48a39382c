"""Scales of a transported task vector learned from a few examples: theta_B + sum over l of alpha_l pi(tau)_l.

One alpha for each layer, or each tensor, by gradient descent on the alphas alone (Zhang et al. 2024, 2407.02880, aTLAS;
Rinaldi et al. 2025, Table 4). Beside it the baseline: the same examples, steps and loss for all weights of the target.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.tasks import ZERO_SHOT, TaskSpec, load_task
from ..errors import InputError, TransfuseError
from ..files.open_clip import is_of_text_tower
from ..models.model import ModelLike, Models
from ..options.groups import Output, Run
from ..options.requests import PortRequest, ScaleRequest
from ..options.studies import Scale
from ..porting.card import model_card
from ..porting.output import write_port
from ..porting.port import opened, port_models
from ..porting.run import PortResult
from ..running.inputs import Batch, Prepared, prepare
from ..running.live import LiveModel, module_params, with_state
from ..running.scores import evaluate, loss_of, prepared_for, score_dict
from ..spaces.layout import part_of
from ..update.live import live_of
from ..update.ported import Ported
from .train import TrainSpec, fit

Per = Literal["layer", "tensor"]


@dataclass(frozen=True)
class ScaleResult:
    """Learned scales.

    Attributes:
        alphas: part ("encoder.layer.3", or a tensor's canonical name) -> alpha.
        state: the weights, by output name, in target's dtype.
        losses: of every step, before it.
    """

    alphas: dict[str, float]
    state: dict[str, Tensor]
    losses: tuple[float, ...]


def parts_of(ported: Ported, per: Per) -> dict[str, str]:
    """Output name of a tensor -> the part whose alpha scales it; tensors that do not change have none."""
    moving = {out: name for out, name in ported.added.items() if bool(ported.change(out).any())}
    return {out: part_of(name) if per == "layer" else name for out, name in moving.items()}


def moving_parts(ported: Ported, per: Per) -> dict[str, str]:
    """`parts_of`, of which there is at least one.

    Raises:
        InputError: the task vector is zero.
    """
    if parts := parts_of(ported, per):
        return parts
    raise InputError("the transported task vector is zero: there is nothing to scale or to mask")


def learn_scales(
    live: LiveModel,
    ported: Ported,
    task: TaskSpec,
    prepared: Prepared,
    how: Scale,
    run: Run = Run(),
    *,
    batch_size: int | None = None,
) -> ScaleResult:
    """Learns an alpha for each part; everything else is frozen.

    Args:
        live: the ported model (`live_of`); its weights do not matter.
        ported: target and update (`Ported.held`, as it is read several times).
        task, prepared: the examples (`prepare(..., "train", shots=K)`).
        how: parts, steps of Adam, learning rate and start of the alphas.
        run: its seed, by which examples are ordered, and whether there is a bar.
        batch_size: examples a step, drawn without replacement until all were seen; None: that of the task.

    Raises:
        InputError: there are no examples, or the task vector is zero.
        TransfuseError: the loss is not finite.
    """
    per = cast(Per, how.per)
    _check_examples(prepared)
    parts, target = moving_parts(ported, per), ported.at(0.0).state()
    order = {part: i for i, part in enumerate(dict.fromkeys(parts.values()))}
    alphas = torch.full((len(order),), how.init, dtype=live.dtype, device=live.device, requires_grad=True)
    frozen = {name: x.to(live.device, live.dtype) for name, x in target.items() if x.is_floating_point()}
    update = {out: ported.change(out).to(live.device, live.dtype) for out in parts}
    rows = fixed_inputs(with_state(live, target), task, prepared, parts)

    def loss(batch: Batch) -> Tensor:
        moved = {name: frozen[name] + alphas[order[parts[name]]] * x for name, x in update.items()}
        return loss_of(live, task, batch, params=module_params(live, {**frozen, **moved}))

    optimizer, losses = torch.optim.Adam([alphas], lr=how.lr), []
    bar = tqdm(range(how.steps), desc="scales", unit="step", disable=not run.progress)
    for step, index in zip(bar, _order(rows, batch_size, run.seed), strict=False):
        optimizer.zero_grad()
        found = loss(rows.batch(index))
        if not torch.isfinite(found):
            raise TransfuseError(f"the loss of step {step} is {found.item()}; lower the learning rate")
        found.backward()
        optimizer.step()
        losses.append(found.item())
    values = alphas.detach().tolist()
    learned = {part: values[i] for part, i in order.items()}
    return ScaleResult(learned, ported.at(alphas_by_tensor(ported, learned, per)).state(), tuple(losses))


def alphas_by_tensor(ported: Ported, alphas: Mapping[str, float], per: Per) -> dict[str, float]:
    """Alphas by part as alphas by canonical name: what `Ported.at` takes; 0 for tensors that do not change."""
    parts = parts_of(ported, per)
    return {name: alphas[parts[out]] if out in parts else 0.0 for out, name in ported.added.items()}


def few_shot_tune(
    live: LiveModel,
    task: TaskSpec,
    prepared: Prepared,
    *,
    steps: int = 100,
    lr: float = 1e-5,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> LiveModel:
    """The baseline: all weights are trained on the same examples (`train.fit`: AdamW, cosine schedule, dropout).

    A zero-shot task trains the image tower; the class prototypes stay what they are.

    Args:
        live: where it starts: target, under tuned's head where one came along; it is not changed.
        task, prepared, steps, lr, batch_size, seed: see `learn_scales`.
    """
    _check(steps, lr)
    _check_examples(prepared)
    size = batch_size or prepared.batch_size
    spec = TrainSpec(task=task, steps=steps, lr=lr, batch_size=size, seed=seed)
    tuned = replace(live, model=copy.deepcopy(live.model))
    fit(tuned, spec, prepared_for(live, task, prepared), progress=progress)
    return tuned


def scale(
    source: ModelLike,
    tuned: ModelLike,
    target: ModelLike,
    task: TaskSpec | str | Path,
    *,
    request: ScaleRequest | None = None,
    **options: Any,
) -> PortResult:
    """A port whose scales are learned from a few labelled examples of the task, with test scores.

    Args:
        source, tuned, target: see `port`.
        task: its "train" split gives the examples, its "test" split the scores; a spec, a YAML or JSON file, or JSON
            text.
        request, **options: what is asked for (`ScaleRequest`), options by name over it (`shots`, `out`, `per`,
            `method`, ...).

    Returns:
        PortResult, as of a port; its report has "scale" (alphas, losses, test scores: "zero-shot", "alpha-1", "scaled"
        and, with a baseline, "few-shot").

    Raises:
        InputError: an input or option cannot be used.
    """
    asked = ScaleRequest.asked(request, options)
    how, run, out, task = asked.scale, asked.run, asked.output.out, load_task(task)
    models, whole = opened(asked.shared(PortRequest), source, tuned, target)
    result = port_models(models, whole.changed(output=Output()))
    held = result.tensors.held()
    live = live_of(held, held.at(1.0).state(), device=run.device)
    where: dict[str, Any] = {"data_dir": asked.data.data_dir, "seed": run.seed}
    examples = prepare(task, "train", live, shots=how.shots, **where)
    found = learn_scales(live, held, task, examples, how, run)
    lives = compared(live, held, scaled=found.state)
    if how.baseline_lr is not None:
        learn: dict[str, Any] = {"steps": how.steps, "seed": run.seed, "progress": run.progress}
        lives["few-shot"] = few_shot_tune(lives["zero-shot"], task, examples, lr=how.baseline_lr, **learn)
    rows = prepare(task, "test", live, limit=asked.data.limit, **where)
    learned = {"examples": len(examples), "alphas": found.alphas, "losses": list(found.losses)}
    test = {name: score_dict(evaluate(one, task, rows)) for name, one in lives.items()}
    scaled = replace(
        result,
        report=result.report | {"scale": {**asdict(how), **learned, "test": test}},
        out=out,
        tensors=result.tensors.at(alphas_by_tensor(held, found.alphas, cast(Per, how.per))),
    )
    if out is not None:
        checks = {"verify": asked.check.verify, "force": asked.output.force, "progress": run.progress}
        write_port(scaled, out, card=partial(_card, per=how.per), **checks)
    return scaled


def compared(live: LiveModel, ported: Ported, **refined: Mapping[str, Tensor]) -> dict[str, LiveModel]:
    """The models that are scored beside each other: target, the whole task vector, what came of it (its weights)."""
    states = {"zero-shot": ported.zero_shot(), "alpha-1": ported.at(1.0).state(), **refined}
    return {name: with_state(live, state) for name, state in states.items()}


def _card(models: Models, report: Mapping[str, Any], *, per: str) -> str:
    return model_card(models, {**report, "alpha": f"learned per {per} from {report['scale']['examples']} examples"})


def fixed_inputs(live: LiveModel, task: TaskSpec, prepared: Prepared, moving: Collection[str]) -> Prepared:
    """Examples with all that the moving tensors do not change: class prototypes too, unless the text tower moves.

    Args:
        live: the model before anything moves.
        moving: output names of tensors.
    """
    names = {name for name, stored in live.stored_names.items() if stored in moving}
    if task.kind == ZERO_SHOT and any(is_of_text_tower(name) for name in names):
        return prepared
    return prepared_for(live, task, prepared)


def _order(rows: Prepared, batch_size: int | None, seed: int) -> Iterator[Tensor]:
    """Positions of the examples of one step after another: all of them in a random order, then in another one."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(len(rows), generator=generator).split(batch_size or rows.batch_size)


def _check(steps: int, lr: float) -> None:
    if steps < 1 or not (math.isfinite(lr) and lr > 0):
        raise InputError(f"{steps} steps with learning rate {lr}: both have to be above zero")


def _check_examples(prepared: Prepared) -> None:
    if not len(prepared):
        raise InputError("there are no examples to learn from")
