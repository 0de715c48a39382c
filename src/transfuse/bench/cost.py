"""What a piece of work costs: seconds, and the memory it needs above what was there."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Value = TypeVar("Value")

_STATM = Path("/proc/self/statm")
_PAUSE = 0.01  # seconds between two looks


@dataclass(frozen=True)
class Cost:
    """What something took.

    Attributes:
        seconds: of the wall.
        memory: bytes at most above those at the start: resident ones of the process, looked at a hundred times a
            second, or allocated ones of a GPU; None where neither can be seen.
    """

    seconds: float
    memory: int | None


def costed(make: Callable[[], Value], device: str = "cpu") -> tuple[Value, Cost]:
    """What something gives, and what it cost."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before, began = torch.cuda.memory_allocated(device), time.monotonic()
        found = make()
        torch.cuda.synchronize(device)
        return found, Cost(time.monotonic() - began, torch.cuda.max_memory_allocated(device) - before)
    with _Watch() as watch:
        began = time.monotonic()
        found = make()
        seconds = time.monotonic() - began
    return found, Cost(seconds, watch.most)


class _Watch:
    """Looks at the resident memory of this process from another thread."""

    def __enter__(self) -> _Watch:
        _give_back_what_is_free()
        self.before = self.last = _resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def _look(self) -> None:
        while not self.done.wait(_PAUSE):
            self.last = max(self.last or 0, _resident() or 0)

    @property
    def most(self) -> int | None:
        """Bytes above those at the start."""
        return None if self.before is None else max(self.last or 0, _resident() or 0) - self.before


def _resident() -> int | None:
    try:
        return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None  # no Linux


def _give_back_what_is_free() -> None:
    """Else what an earlier piece of work has left would be used again, and not be seen."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)
