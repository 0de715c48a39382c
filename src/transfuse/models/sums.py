"""Sums over tensors in float64, a block at a time in buffers that stay: no fresh memory, and exact to float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from ..files.reading import BLOCK


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for work on blocks: they fit into a core's cache, and more threads mostly wait for each other.

    Sums are the same then on any number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Scratch:
    """Room for a few blocks in float64."""

    def __init__(self, count: int):
        self._rooms = [torch.empty(BLOCK, dtype=torch.float64) for _ in range(count)]

    def numbers(self, which: int, block: Tensor) -> Tensor:
        """A block, shape (n,), in float64, in that room."""
        return self._rooms[which][: len(block)].copy_(block)


def dot(one: Tensor, other: Tensor) -> float:
    """The inner product of two tensors of one shape, summed in float64."""
    if one.device.type != "cpu":
        return float((one * other).sum(dtype=torch.float64))
    scratch, total = Scratch(2), 0.0
    pieces = (x.reshape(-1).split(BLOCK) for x in (one, other))
    for left, right in zip(*pieces, strict=True):
        total += float(torch.dot(scratch.numbers(0, left), scratch.numbers(1, right)))
    return total


def count_equal(one: Tensor, other: Tensor | float) -> int:
    """How many numbers of one tensor, float32 or float64, equal those of another, or a number.

    By NumPy, which compares several times faster than torch does.
    """
    right = other.detach().cpu().numpy() if isinstance(other, Tensor) else other
    return int(np.count_nonzero(np.equal(one.detach().cpu().numpy(), right)))
