"""The loss gradients of single examples at a model, and their votes on the direction in which the loss falls."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.tasks import TaskSpec
from ..errors import InputError, TransfuseError
from ..files.configs import quiet_transformers
from ..running.inputs import Batch, Prepared
from ..running.live import LiveModel, module_params
from ..running.scores import loss_of
from .scale import fixed_inputs

log = logging.getLogger(__name__)

MEMORY = 10**9  # bytes of gradients of single examples that are held at once
Vectors = dict[str, Tensor]  # by output name


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
