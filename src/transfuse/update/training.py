"""Training of target by teachers: tuned on inputs of the task, target itself on inputs that show what it shall keep.

Without the second it is distillation on unlabelled inputs (Hinton et al. 2015, 1503.02531); with it, learning without
forgetting (Li & Hoiem 2016, 1606.09282), the rehearsed inputs being generic ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor
from tqdm import tqdm

from ..errors import InputError
from ..running.inputs import Prepared
from ..running.probes import Probe
from .teachers import Ask
from .views import viewed


@dataclass(frozen=True)
class TrainOptions:
    """How it is trained.

    Attributes:
        steps: so many, the learning rate falling along a cosine.
        optimizer: "adam", or "muon" for the matrices of linear modules (Jordan et al. 2024), in steps as large as
            Adam's (Liu et al. 2025, 2502.16982), and Adam for all others.
        lr: learning rate at the start.
        batch_size: inputs a step, of each lesson.
        seed: of their order, and of their views.
    """

    steps: int = 300
    optimizer: Literal["adam", "muon"] = "adam"
    lr: float = 1e-3
    batch_size: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Lesson:
    """Inputs, and who says what is right on them.

    Attributes:
        inputs: unlabelled.
        student, teacher: what either says about a batch.
        weight: beside other lessons.
        views: whether each step sees them anew (`viewed`).
        mix: whether two of them may become one.
    """

    inputs: Prepared
    student: Ask
    teacher: Ask
    weight: float = 1.0
    views: bool = False
    mix: bool = False

    def loss(self, index: Tensor, generator: Generator) -> Tensor:
        """Distance from the teacher on the inputs of these numbers."""
        batch = self.inputs.batch(index)
        if self.views:
            batch = viewed(batch, generator, mix=self.mix)
        with torch.no_grad():
            wanted = self.teacher(batch)
        return self.weight * self.student(batch).distance(wanted)


def train_on(
    student: Probe,
    lessons: Sequence[Lesson],
    options: TrainOptions,
    *,
    still: Collection[str] = (),
    progress: bool = False,
) -> dict[str, Tensor]:
    """Trains a model on all lessons at once.

    Args:
        student: starts as target, in the class of the output; it is changed.
        lessons: what it is told.
        options: see there.
        still: canonical names of what does not change.

    Returns:
        Canonical name -> parameter, of those that the inputs reach.

    Raises:
        InputError: the loss is not finite.
    """
    student.module.requires_grad_(True)
    for name in (one for one in still if one in student.names):
        student.module.get_parameter(student.names[name]).requires_grad_(False)
    optimizers = _optimizers(student, options)
    rates = [torch.optim.lr_scheduler.CosineAnnealingLR(one, options.steps) for one in optimizers]
    generators = [torch.Generator().manual_seed(options.seed + number) for number in range(len(lessons))]
    taught = [orders(len(one.inputs), options.batch_size, gen) for one, gen in zip(lessons, generators, strict=True)]
    drawn = torch.Generator().manual_seed(options.seed + len(lessons))
    for _ in tqdm(range(options.steps), desc="distilling", disable=not progress):
        loss = torch.stack([one.loss(next(order), drawn) for one, order in zip(lessons, taught, strict=True)]).sum()
        if not torch.isfinite(loss):
            raise InputError("distillation: the loss is not finite: the models' scores overflow, or training diverged")
        student.module.zero_grad()
        loss.backward()
        for one in (*optimizers, *rates):
            one.step()
    trained = ((name, student.module.get_parameter(one)) for name, one in student.names.items())
    return {name: parameter.detach().cpu().clone() for name, parameter in trained if parameter.grad is not None}


def _optimizers(student: Probe, options: TrainOptions) -> list[torch.optim.Optimizer]:
    parameters = list(student.module.parameters())
    if options.optimizer == "adam":
        return [torch.optim.Adam(parameters, lr=options.lr)]
    inner = {id(student.module.get_parameter(one.weight)) for one in student.sites.values()}
    matrices = [one for one in parameters if id(one) in inner and one.ndim == 2]
    others = [one for one in parameters if not (id(one) in inner and one.ndim == 2)]
    found: list[torch.optim.Optimizer] = []
    if matrices:
        found.append(torch.optim.Muon(matrices, lr=options.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    return [*found, torch.optim.Adam(others, lr=options.lr)] if others else found


def orders(count: int, batch_size: int, generator: Generator) -> Iterator[Tensor]:
    """The inputs of every step: whole passes in random orders."""
    size = min(batch_size, count)
    while True:
        yield from (b for b in torch.randperm(count, generator=generator).split(size) if len(b) == size)
