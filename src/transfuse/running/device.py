"""Whether there is the device that a run asks for."""

from __future__ import annotations

import torch

from ..errors import InputError


def check_device(device: str) -> None:
    """Raises InputError if nothing can be computed there."""
    try:
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, ImportError) as error:  # AssertionError: torch without CUDA
        raise InputError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
