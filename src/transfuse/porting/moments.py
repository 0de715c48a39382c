"""`moments`: what inputs to keep look like, measured once by whoever has them, for ports by whoever has not."""

from __future__ import annotations

import os
from typing import Any

from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..maps.file import check_file
from ..options.requests import MomentsRequest
from ..running.live import load_live
from ..running.moments import SUFFIX, Moments, given_moments
from ..running.unlabelled import WITHOUT_DATA, read_inputs


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
    if inputs.task in WITHOUT_DATA or given_moments(inputs.task) is not None:
        raise InputError("moments are taken of the data of a task, not of drawn inputs")
    if out is not None:
        if out.suffix != SUFFIX:
            raise InputError(f"{out}: moments are known by their file's name; let it end in {SUFFIX}")
        check_file(out, force=asked.output.force, load=Moments.load)
    live = load_live(model)
    found = Moments.of(read_inputs(inputs, live, asked.data, asked.run), live)
    if out is not None:
        found.save(out)
    return found
