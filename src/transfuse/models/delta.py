"""The task vector, tuned - source, one tensor at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from .model import Model


def task_vector(source: Model, tuned: Model, name: str) -> tuple[Tensor, Tensor]:
    """(tuned - source, source) of one tensor, in float32, or float64 if either is.

    If tuned is stored in a narrower dtype than source, the difference is taken from source rounded to that dtype:
    otherwise rounding of the weights would look like training. Where both are seen in another form (with target's
    positions, say), source is rounded before it takes that form, as tuned was: R(tuned) - R(source)
    is R(tuned - source), since R is linear.
    """
    stored = tuned.dtype(name)
    narrower = stored.itemsize < source.dtype(name).itemsize
    base, new = source.rounded(name, stored) if narrower else source.tensor(name), tuned.tensor(name)
    return difference(base, new)


def difference(base: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """`task_vector` of tensors of source and tuned that are seen as they are stored, or of blocks of them."""
    if new.dtype.itemsize < base.dtype.itemsize:
        base = base.to(new.dtype)
    dtype = torch.float64 if torch.float64 in (base.dtype, new.dtype) else torch.float32
    return new.to(dtype) - base.to(dtype), base.to(dtype)
