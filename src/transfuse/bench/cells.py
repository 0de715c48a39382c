"""Cells: one finished measurement a file, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, TransfuseError
from ..report.records import Record, as_json, from_json
from .store import digest

log = logging.getLogger("transfuse.bench")


@dataclass(frozen=True)
class Cell:
    """A measurement that is to be made.

    Attributes:
        what: kind, seed, regime, ...: for people.
        key: hash of everything the measurement depends on.
        file: where it is kept.
    """

    what: str
    key: str
    file: Path

    @property
    def maps_file(self) -> Path:
        """Where the maps of an alignment are kept."""
        return self.file.with_suffix(".safetensors")


@dataclass(frozen=True)
class Done:
    """What became of a cell.

    Attributes:
        record: None where it failed; `error` says why.
        seconds: it took when it was made.
        fresh: whether it was made now.
    """

    what: str
    record: Record | None
    error: str | None
    seconds: float
    fresh: bool


class Unfinished(Exception):
    """A cell is not there, and only what is there was asked for."""


class CellStore:
    """The cells in one folder.

    Attributes:
        only_read: whether a cell that is not there is `Unfinished`, and nothing is measured.
    """

    def __init__(self, folder: Path, *, only_read: bool = False):
        self.folder, self.only_read = folder, only_read

    def cell(self, kind: str, labels: tuple[Any, ...], depends_on: dict[str, Any]) -> Cell:
        """The cell of a measurement."""
        key = digest({"kind": kind, **depends_on})
        label = "-".join(re.sub(r"[^\w.]+", "_", str(one)) for one in labels)
        what = f"{kind} {' '.join(str(one) for one in labels)}"
        return Cell(what, key, self.folder / kind / f"{label}-{key[:12]}.json")

    def read(self, cell: Cell) -> Done | None:
        """A finished cell; None where there is none, or what is there is damaged or of something else."""
        try:
            found = json.loads(cell.file.read_text(encoding="utf-8"))
            if found["key"] != cell.key:
                return None
            return Done(cell.what, from_json(found["record"]), None, found["seconds"], False)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, cell: Cell, record: Record, seconds: float) -> Done:
        """Keeps a finished cell, all of it or nothing.

        Raises:
            InputError: it cannot be written.
        """
        text = json.dumps({"key": cell.key, "seconds": round(seconds, 3), "record": as_json(record)}, indent=1)
        partial = cell.file.with_name(f".{cell.file.name}.{os.getpid()}")
        try:
            cell.file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(cell.file)
        except OSError as error:
            raise InputError(f"{cell.file} cannot be written: {error.strerror}") from error
        # As it will be read, so that a first run and a resumed one give the same tables.
        return Done(cell.what, from_json(json.loads(text)["record"]), None, round(seconds, 3), True)

    def made(self, cell: Cell, make: Callable[[], Record]) -> Done:
        """Makes a cell and keeps it; an error of ours is what became of it."""
        if self.only_read:
            raise Unfinished(cell.what)
        began = time.monotonic()
        try:
            record = make()
        except TransfuseError as error:
            log.info("%s: FAILED: %s", cell.what, error)
            return Done(cell.what, None, str(error), round(time.monotonic() - began, 3), True)
        done = self.write(cell, record, time.monotonic() - began)
        log.info("%s: %.1f s", cell.what, done.seconds)
        return done
