"""Scores of one model, and fine-tuning of one: what a user does before and after a port."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from ..data.splits import Split
from ..data.tasks import TaskSpec, load_task
from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..options.groups import Keep
from ..options.requests import EvaluateRequest, FinetuneRequest
from ..running import scores
from ..running.device import check_device
from ..running.inputs import prepare
from ..running.live import load_live
from ..running.moments import SUFFIX, Moments
from ..running.unlabelled import WITHOUT_DATA
from .rehearsal import KeptSpec
from .train import train, train_spec

DEFAULT_EPOCHS = 3.0


def evaluate(
    model: str | os.PathLike[str] | Checkpoint,
    task: TaskSpec | str | Path,
    *,
    request: EvaluateRequest | None = None,
    **options: Any,
) -> dict[str, float]:
    """Scores a model on a task.

    Args:
        model: a directory or hub id in the format of transformers.
        task: a spec, a YAML or JSON file, or JSON text.
        request, **options: what is asked for (`EvaluateRequest`), options by name over it (`split`, ...).

    Returns:
        "loss", "examples" and the metrics of the task.

    Raises:
        InputError: model, task or data cannot be read, do not fit each other, or an option cannot be used.
    """
    asked = EvaluateRequest.asked(request, options)
    check_device(asked.run.device)
    spec, data = load_task(task), asked.data
    live = load_live(model, device=asked.run.device)
    where = {"data_dir": data.data_dir, "limit": data.limit, "seed": asked.run.seed, "progress": asked.run.progress}
    rows = prepare(spec, cast(Split, data.split), live, **where)
    return scores.score_dict(scores.evaluate(live, spec, rows, progress=asked.run.progress))


def finetune(
    base: str | os.PathLike[str],
    task: TaskSpec | str | Path,
    *,
    request: FinetuneRequest | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Trains a model on a task and writes the result; see `train`.

    Args:
        base: where it starts: a directory or hub id in the format of transformers.
        task: a spec, a YAML or JSON file, or JSON text.
        request, **options: what is asked for (`FinetuneRequest`), options by name over it (`out`, `epochs`, ...).

    Returns:
        "out", and what `train` reports.

    Raises:
        InputError, TransfuseError: see `train`.
    """
    asked = FinetuneRequest.asked(request, options)
    check_device(asked.run.device)
    spec, how = load_task(task), vars(asked.train)
    length = {} if asked.train.epochs or asked.train.steps else {"epochs": DEFAULT_EPOCHS}
    rows: dict[str, Any] = {"limit": asked.data.limit, "seed": asked.run.seed}
    rows |= {"keep": _kept(asked.keep)} if asked.keep.given else {}
    training = train_spec(task=spec, **{**how, **length, **rows, "freeze": list(asked.train.freeze)})
    about = {"data_dir": asked.data.data_dir, "device": asked.run.device, "progress": asked.run.progress}
    assert asked.output.out is not None
    return {
        "out": str(asked.output.out),
        **train(str(base), training, asked.output.out, **about, force=asked.output.force),
    }


def _kept(keep: Keep) -> KeptSpec:
    if isinstance(keep.task, Moments):
        raise InputError("keep: moments are given by their file here, so that the report can name them")
    drawn = str(keep.task) in WITHOUT_DATA or Path(str(keep.task)).suffix == SUFFIX
    task = str(keep.task) if drawn else load_task(keep.task)
    return KeptSpec(task=task, count=keep.count, weight=keep.weight)
