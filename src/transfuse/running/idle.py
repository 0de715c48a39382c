"""Instances of model classes that are needed no more, kept without their weights to be filled with others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn


@dataclass
class Idle:
    """Built classes that take no memory: all they hold is on the meta device.

    Attributes:
        found: (config, dtype, instance).
    """

    found: list[tuple[Mapping[str, Any], torch.dtype, nn.Module]] = field(default_factory=list)

    def take(self, config: Mapping[str, Any], dtype: torch.dtype | None = None) -> nn.Module | None:
        """An instance that was built from this very config, if there is one; it is the caller's from then on.

        Args:
            config: all of it has to be the same.
            dtype: in which it was built, since buffers are in it, too; None where nothing will be computed.
        """
        for number, (known, its_dtype, _) in enumerate(self.found):
            if known == config and dtype in (None, its_dtype):
                return self.found.pop(number)[2]
        return None

    def give(self, config: Mapping[str, Any], module: nn.Module) -> None:
        """Keeps an instance for whoever needs one like it; its weights are gone then."""
        self.found.append((config, dtype_of(module.state_dict()), module.to("meta")))


def dtype_of(state: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype of the first tensor of floating-point numbers, in which a class is built."""
    return next(one.dtype for one in state.values() if one.is_floating_point())
