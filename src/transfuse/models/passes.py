"""How often a run reads each of its models, and how long that takes, phase by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ..files.checkpoint import Checkpoint

ASCENT = "ascent"


class Passes:
    """Counts reads of tensors by phase; of phases inside each other the inner one has them.

    Args:
        checkpoints: the files of the run by role.
    """

    def __init__(self, checkpoints: Mapping[str, Checkpoint]):
        self._checkpoints = checkpoints
        self._reads: dict[str, dict[str, int]] = {}
        self._seconds: dict[str, float] = {}
        self._phase = "other"
        self._mark, self._since = self._now(), time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is read inside belongs to this phase."""
        self._settle()
        outer, self._phase = self._phase, name
        try:
            yield
        finally:
            self._settle()
            self._phase = outer

    def by_phase(self) -> dict[str, dict[str, float]]:
        """Phase -> role -> reads of tensors over tensors there are; phases that read nothing are left out."""
        self._settle()
        return {
            phase: {role: count / len(self._checkpoints[role]) for role, count in reads.items()}
            for phase, reads in self._reads.items()
            if any(reads.values())
        }

    def total(self, *, without: tuple[str, ...] = ()) -> dict[str, float]:
        """Role -> passes over it in all phases but these."""
        found = [one for phase, one in self.by_phase().items() if phase not in without]
        return {role: sum(one[role] for one in found) for role in self._checkpoints}

    def text(self) -> str:
        """For the log: passes over each model and seconds of each phase."""
        rows = [f"{phase} {_text(one)} in {self._seconds[phase]:.1f} s" for phase, one in self.by_phase().items()]
        return f"passes over {'/'.join(self._checkpoints)}: {_text(self.total())} ({', '.join(rows)})"

    def _now(self) -> dict[str, int]:
        return {role: sum(one.known.reads.values()) for role, one in self._checkpoints.items()}

    def _settle(self) -> None:
        """Gives the phase that ends here what was read since the last one."""
        now, at = self._now(), time.monotonic()
        reads = self._reads.setdefault(self._phase, dict.fromkeys(now, 0))
        for role, count in now.items():
            reads[role] += count - self._mark[role]
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + at - self._since
        self._mark, self._since = now, at


def _text(passes: Mapping[str, float]) -> str:
    return "/".join(f"{one:.2f}".rstrip("0").rstrip(".") for one in passes.values())
