"""Inputs without labels: of a data set, drawn, or written by the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Generator, Tensor

from ..data.extras import need
from ..data.splits import Split, class_names, load_split, no_bars
from ..data.tasks import LANGUAGE, SEQ2SEQ, ZERO_SHOT, TaskSpec, load_task
from ..errors import InputError
from ..options.groups import Data, Inputs, Keep, Run
from .drawn import generated, synthetic
from .inputs import Prepared, Source, prepare_rows
from .live import LiveModel
from .moments import given_moments
from .scores import check_zero_shot, has_two_towers, shifted
from .tokens import Batch, prompts_of

SYNTHETIC, GENERATED = "synthetic", "generated"
WITHOUT_DATA = (SYNTHETIC, GENERATED)


def read_inputs(inputs: Inputs | Keep, live: LiveModel, data: Data = Data(), run: Run = Run()) -> Prepared:
    """Inputs as a user asks for them, processed for a model.

    Args:
        inputs: which, and how many.
        live: the model.
        data: where data lie.
        run: its seed, and whether there are bars.

    Raises:
        InputError: see `load_task`, `unlabelled`, `generated` and `Moments`; they have nothing for the decoder of the
            model; or classes are named that nothing would be done with.
    """
    classes = inputs.classes if isinstance(inputs, Inputs) else None
    if inputs.task in WITHOUT_DATA:
        if inputs.task == SYNTHETIC:
            found = synthetic(live, count=inputs.count, seed=run.seed)
        else:
            found = generated(live, count=inputs.count, seed=run.seed, progress=run.progress)
        return found if classes is None else with_prompts(found, load_task(classes), live, data.data_dir)
    if classes is not None:
        raise InputError("inputs_classes: the inputs are those of a task, which names its classes itself; leave it out")
    if (moments := given_moments(inputs.task)) is not None:
        return _with_decoder_inputs(moments.drawn(live, count=inputs.count, seed=run.seed), live, "moments")
    task = load_task(inputs.task)
    where = {"data_dir": data.data_dir, "seed": run.seed, "progress": run.progress}
    found = unlabelled(task, live, count=inputs.count, split=cast(Split, inputs.split), **where)
    return _with_decoder_inputs(found, live, f"data set {task.data.path}, as a task of kind {task.kind}")


def _with_decoder_inputs(found: Prepared, live: LiveModel, what: str) -> Prepared:
    """The same inputs; InputError if a model's decoder would see nothing. `what` they are, for the message."""
    if live.has_decoder and "decoder_input_ids" not in next(found.batches(1)):
        raise InputError(
            f"{what}: it says nothing about what the decoder of {type(live.model).__name__} sees; describe the inputs "
            f"as a task of kind {SEQ2SEQ}, with its targets"
        )
    return found


def unlabelled(
    task: TaskSpec,
    live: LiveModel,
    *,
    count: int = 512,
    split: Split = "train",
    data_dir: Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Prepared:
    """Inputs of a task; labels are neither needed nor looked at.

    Args:
        task: its data and how they are processed. The classes of a zero-shot task, where it has any, make prompts;
            those of a seq2seq task take turns before the decoder.
        live: gives image processor and tokenizer.
        count: so many, or all there are.
        split, data_dir, seed: see `prepare`.

    Raises:
        InputError: see `load_split`; or there is next to nothing in it, or nothing for a decoder.
    """
    blind = task.data.model_copy(update={"label": []})
    rows = load_split(blind, split, data_dir=data_dir, limit=count, seed=seed)
    classes = _classes(task, data_dir)
    if task.kind == ZERO_SHOT and not (classes and has_two_towers(live.model)):
        task = task.model_copy(update={"kind": "image-classification"})
    if task.kind not in LANGUAGE:
        rows = _with_any_label(rows, classes or ["unlabelled"])
    found = prepare_rows(task, rows, live, seed=seed, progress=progress)
    if task.kind == SEQ2SEQ:
        found = replace(found, source=_WithTargets(found.source, shifted(live, found.extra["targets"])), extra={})
    if len(found) < 2:
        raise InputError(f"data set {task.data.path}: its {split} split has one input; two at least are needed")
    return found.select(torch.arange(min(count, len(found))))


def _classes(task: TaskSpec, data_dir: Path | None) -> list[str] | None:
    """Names of the classes, where they say something about the inputs.

    Raises:
        InputError: a seq2seq task has neither classes nor targets.
    """
    if task.kind not in (ZERO_SHOT, SEQ2SEQ):
        return None
    try:
        return class_names(task.data, data_dir)
    except InputError:
        if task.kind == SEQ2SEQ and not task.targets:
            raise
        return None if task.targets is None else [str(number) for number in range(len(task.targets))]


def _with_any_label(rows: Any, classes: list[str]) -> Any:
    datasets = need("datasets")
    with no_bars(datasets):
        return rows.add_column("label", [0] * len(rows), feature=datasets.ClassLabel(names=classes))


@dataclass(frozen=True)
class _WithTargets:
    """Rows with what the decoder sees: one of `starts` after the other."""

    rows: Source
    starts: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: Tensor, generator: Generator | None) -> Batch:
        return {**self.rows.read(index, generator), "decoder_input_ids": self.starts[index % len(self.starts)]}


def with_prompts(inputs: Prepared, task: TaskSpec, live: LiveModel, data_dir: Path | None = None) -> Prepared:
    """Inputs with the prompts of a zero-shot task, of which only classes and templates are read.

    Args:
        inputs: of whatever kind.
        task: the task. Where its data name their `classes`, nothing is read of them.
        live: gives the tokenizer.
        data_dir: where data lie.

    Raises:
        InputError: it is no zero-shot task, the model has not two towers, or the classes are not to be found.
    """
    if task.kind != ZERO_SHOT:
        raise InputError(
            f"inputs_classes: only a task of kind {ZERO_SHOT} makes prompts of its classes, not {task.kind}"
        )
    check_zero_shot(live)
    return inputs.with_extra(**prompts_of(task, class_names(task.data, data_dir), live))
