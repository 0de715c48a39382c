"""A port as a model that runs, without being written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..models.plan import output_config
from ..running.instances import idle_of
from ..running.live import LiveModel, load_live
from .ported import Ported


def live_of(ported: Ported, state: Mapping[str, Tensor], **options: Any) -> LiveModel:
    """The ported model as it would load if it were written: config of the output, processors of target.

    Args:
        state: its weights by output name.
        **options: device and dtype of `load_live`.
    """
    _, config = output_config(ported.plan, ported.models)
    place = replace(ported.models.target.checkpoint, config=config)
    return load_live(place, state=state, idle=idle_of(ported.models), **options)
