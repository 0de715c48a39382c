"""`moments`: what inputs to keep look like, measured once by whoever has them, for ports by whoever has not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

from ..data.splits import Split
from ..data.tasks import TaskSpec, load_task
from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..maps.file import check_file
from ..options.requests import MomentsRequest
from ..running.live import load_live
from ..running.moments import SUFFIX, Moments
from ..running.unlabelled import GENERATED, SYNTHETIC, unlabelled, with_decoder_inputs


def moments(
    model: str | os.PathLike[str] | Checkpoint,
    *,
    request: MomentsRequest | None = None,
    **options: Any,
) -> Moments:
    """Takes the moments of generic inputs, from which `port` draws inputs to keep (`keep=`).

    Args:
        model: the new base: a directory or hub id in the format of transformers. Only what makes its inputs matters.
        request, **options: what is asked for (`MomentsRequest`), options by name over it (`inputs`, `out`, ...).
            Without `out` nothing is written.

    Returns:
        Moments. The same inputs, options and seed give the same bytes in the file.

    Raises:
        InputError: model, task or data cannot be read, do not fit each other, or an option cannot be used.
    """
    asked = MomentsRequest.asked(request, options)
    out, inputs = asked.output.out, asked.inputs
    if not isinstance(inputs.task, TaskSpec | str | Path) or str(inputs.task) in (SYNTHETIC, GENERATED):
        raise InputError("moments are taken of the data of a task: give one (inputs, --inputs)")
    if inputs.classes is not None:
        raise InputError("inputs_classes: moments have no prompts; leave it out")
    if out is not None:
        if out.suffix != SUFFIX:
            raise InputError(f"{out}: moments are known by their file's name; let it end in {SUFFIX}")
        check_file(out, force=asked.output.force, load=Moments.load)
    where = {"data_dir": asked.data.data_dir, "seed": asked.run.seed, "progress": asked.run.progress}
    live = load_live(model)
    rows = unlabelled(load_task(inputs.task), live, count=inputs.count, split=cast(Split, inputs.split), **where)
    found = Moments.of(with_decoder_inputs(rows, live, "moments"), live)
    if out is not None:
        found.save(out)
    return found
