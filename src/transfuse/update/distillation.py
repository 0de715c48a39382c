"""Distillation of tuned into target on unlabelled inputs (Hinton et al. 2015, 1503.02531): the neighbour that trains.

Not a transport: source takes no part in it. It is here since whoever has inputs and may run training steps has this
choice, so that every claim about transport on inputs has to stand beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional
from tqdm import tqdm

from ..errors import InputError
from ..running.inputs import Prepared
from ..running.probes import Probe
from ..running.scores import pooled
from ..running.tokens import Batch
from .functional import let_go_of_student, student_and_tuned
from .ported import Ported
from .transported import Fitted, Without


@dataclass(frozen=True)
class DistilOptions:
    """How it is trained.

    Attributes:
        steps: of Adam, the learning rate falling along a cosine.
        lr: learning rate at the start.
        batch_size: inputs a step.
        seed: of their order.
    """

    steps: int = 300
    lr: float = 1e-3
    batch_size: int = 128
    seed: int = 0


def distil(
    student: Probe, tuned: Probe, inputs: Prepared, options: DistilOptions, *, progress: bool = False
) -> dict[str, Tensor]:
    """Trains a model to give tuned's outputs: the Kullback-Leibler divergence between class probabilities.

    Args:
        student: starts as target, in the class of the output; it is changed.
        tuned: what it is to give.
        inputs: unlabelled.
        options: see there.

    Returns:
        Canonical name -> parameter, of those that the inputs reach.

    Raises:
        InputError: the models give no class scores, or the loss is not finite.
    """
    student.module.requires_grad_(True)
    ends = [one.prompt_features(inputs) for one in (student, tuned)]
    optimizer = torch.optim.Adam(student.module.parameters(), lr=options.lr)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    generator = torch.Generator().manual_seed(options.seed)
    for index in tqdm(_orders(len(inputs), options, generator), desc="distilling", disable=not progress):
        batch = inputs.batch(index)
        with torch.no_grad():
            wanted = scores(tuned, batch, ends[1]).softmax(-1)
        loss = functional.kl_div(scores(student, batch, ends[0]).log_softmax(-1), wanted, reduction="batchmean")
        if not torch.isfinite(loss):
            raise InputError("distillation: the loss is not finite; a smaller learning rate is needed")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    trained = ((name, student.module.get_parameter(one)) for name, one in student.names.items())
    return {name: parameter.detach().cpu().clone() for name, parameter in trained if parameter.grad is not None}


def distil_port(
    ported: Ported, inputs: Prepared, options: DistilOptions, *, device: str = "cpu", progress: bool = False
) -> Fitted:
    """The tensors of a port, trained.

    Args:
        ported: of which the heads that come along are where training starts, beside target.
        inputs: unlabelled, processed for target.
        options: see there.

    Raises:
        InputError: see `distil`; or a model cannot be run here.
    """
    still = Without(ported.update, frozenset(ported.update.names), ported.models.target)
    start = ported.with_update(still)
    student, tuned = student_and_tuned(start, device)
    found = distil(student, tuned, inputs, options, progress=progress)
    let_go_of_student(start, student)
    return Fitted(ported.models.target, found, still)


def scores(probe: Probe, batch: Batch, prompts: Tensor | None) -> Tensor:
    """Class scores (rows, classes) of a model: its logits, or the scaled cosines with features of prompts."""
    found = probe.run(batch)
    if prompts is not None:
        scale = probe.module.logit_scale.detach().exp()  # type: ignore[operator]
        return scale * functional.normalize(pooled(found), dim=-1) @ prompts.T
    logits = getattr(found, "logits", None)
    if logits is None:
        raise InputError("distillation needs class scores: a classifier, or prompts for a model of two towers")
    return logits.flatten(0, -2)


def _orders(count: int, options: DistilOptions, generator: Generator) -> list[Tensor]:
    """The inputs of every step: whole passes in random orders."""
    size = min(options.batch_size, count)
    passes = -(-options.steps * size // (count - count % size))
    batches = [
        b for _ in range(passes) for b in torch.randperm(count, generator=generator).split(size) if len(b) == size
    ]
    return batches[: options.steps]
