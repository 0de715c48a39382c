"""Training with labels that leaves a model as it is on generic inputs: learning without forgetting (1606.09282)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..data.splits import BaseModel, ConfigDict, Field
from ..data.tasks import TaskSpec
from ..options.groups import Data, Keep, Run
from ..running.live import LiveModel
from ..running.moments import SUFFIX
from ..running.probes import Probe
from ..running.unlabelled import read_inputs
from ..update.lessons import kept as kept_lesson
from ..update.training import orders


class KeptSpec(BaseModel):
    """Unlabelled inputs on which a model stays as it is while it is trained on others.

    Attributes:
        task: whose training rows they are; or "synthetic", "generated" or a file of moments: drawn ones.
        count: so many, or all there are.
        weight: beside the labelled ones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: TaskSpec | Literal["synthetic", "generated"] | Annotated[str, Field(pattern=rf"\{SUFFIX}$")]
    count: int = Field(default=2048, ge=2)
    weight: float = Field(default=1.0, ge=0)


def rehearsed(
    live: LiveModel, kept: KeptSpec, batch_size: int, seed: int, data_dir: Path | None
) -> Callable[[], Tensor]:
    """The loss of the inputs to keep: the same as in a port with them, the model as it is now being the teacher.

    Args:
        live: before training; a copy of it is held.
        kept: the inputs.
        batch_size: of a step.
        seed: of their choice, order and views.
        data_dir: where local data sets lie.

    Raises:
        InputError: see `read_inputs`; or the model says nothing on them that could be kept.
    """
    asked = Keep(kept.task, count=kept.count, weight=kept.weight)
    inputs = read_inputs(asked, live, Data(data_dir=data_dir), Run(seed=seed))
    mine, its = (Probe(one, {}, {}) for one in (live.model, copy.deepcopy(live.model).eval()))
    lesson = kept_lesson(inputs, mine, its, weight=kept.weight, views=True)
    order, drawn = (torch.Generator().manual_seed(seed + one) for one in (1, 2))
    steps = orders(len(inputs), batch_size, order)
    return lambda: lesson.loss(next(steps), drawn)
