"""Reading tensors from files: each file is opened once, and of it only the bytes that are asked for are read.

A mapped file keeps every page that was read in memory and takes its whole size of address space, so safetensors files
are read by their offsets instead: a tensor costs its own bytes, or those of one block.
"""

from __future__ import annotations

import json
import os
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import InputError

_MAX_HEADER = 100_000_000  # bytes, as safetensors has it
METADATA = "__metadata__"  # the key of a header that is no tensor
# Numbers in a block: what is done with one, in float64 at most, stays in a core's cache.
BLOCK = 2**16

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it; `file` is relative to the checkpoint's folder ('' in memory)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str


class Part(Protocol):
    """One file's tensors, by the names it holds."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What is in the file, in its order."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor; it may be shared."""
        ...

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Its numbers in order, `BLOCK` at a time, shape (n,); each is valid until the next is asked for."""
        ...


class InMemory:
    """Tensors that are in memory, or mapped from a pickle by torch."""

    def __init__(self, tensors: Mapping[str, Tensor], file: str):
        self.tensors = tensors
        infos = {name: TensorInfo(tuple(one.shape), one.dtype, file) for name, one in tensors.items()}
        self.infos: Mapping[str, TensorInfo] = infos

    def read(self, name: str) -> Tensor:
        """See `Part`."""
        return self.tensors[name].cpu()

    def blocks(self, name: str) -> Iterator[Tensor]:
        """See `Part`."""
        yield from self.read(name).reshape(-1).split(BLOCK)


class Safetensors:
    """A safetensors file, open as long as this object lives; pickled as its path.

    Raises:
        InputError: it cannot be read, or is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        with _explained(path):
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            weakref.finalize(self, os.close, self._file)
            self.infos, self._starts = _header(path, self._file)

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)

    def read(self, name: str) -> Tensor:
        """See `Part`."""
        info = self.infos[name]
        try:
            tensor = torch.empty(info.shape, dtype=info.dtype)
        except RuntimeError as err:
            raise InputError(f"{self.path}: no memory for tensor '{name}', shape {info.shape}, {info.dtype}") from err
        self._fill(tensor.view(-1), self._starts[name])
        return tensor

    def blocks(self, name: str) -> Iterator[Tensor]:
        """See `Part`."""
        info = self.infos[name]
        count, start = numel(info.shape), self._starts[name]
        buffer = torch.empty(min(count, BLOCK), dtype=info.dtype)
        for first in range(0, count, BLOCK):
            block = buffer[: count - first]
            self._fill(block, start + first * info.dtype.itemsize)
            yield block

    def _fill(self, flat: Tensor, start: int) -> None:
        """Reads what lies at `start` into a contiguous tensor, shape (n,)."""
        room = flat.view(torch.uint8).numpy().data
        done = 0
        with _explained(self.path):
            while done < len(room):  # one call reads 2 GB at most
                count = os.preadv(self._file, [room[done:]], start + done)
                if not count:
                    raise InputError(f"{self.path}: it became shorter while it was read; get it again")
                done += count


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise InputError(f"{path}: cannot be read ({err.strerror or err})") from err
    except (ValueError, LookupError, TypeError, RecursionError) as err:
        raise InputError(f"{path}: not a valid safetensors file ({err}), cut off or damaged; get it again") from err


def _header(path: Path, file: int) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """The tensors of a file in their order in it, and where each begins.

    The length of the header in 8 bytes, the header (JSON), the tensors one behind the other without a hole
    (https://github.com/huggingface/safetensors, "Format").

    Raises:
        InputError: a dtype that is not read.
        ValueError, LookupError, TypeError, RecursionError: it is not that.
    """
    size = os.fstat(file).st_size
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in a file of {size}")
    raw = os.pread(file, length, 8)
    if raw[:1] != b"{":
        raise ValueError("its header is not a JSON object")
    try:
        entries = json.loads(raw, object_pairs_hook=_without_doubles)
    except ValueError as err:
        raise ValueError(f"its header is not valid JSON: {err}") from err
    entries.pop(METADATA, None)
    infos, starts, end = {}, {}, 0
    for name, entry in sorted(entries.items(), key=lambda one: one[1]["data_offsets"]):
        info = _checked_info(path, name, entry, end)
        infos[name], starts[name] = info, 8 + length + end
        end += numel(info.shape) * info.dtype.itemsize
    if 8 + length + end != size:
        raise ValueError(f"tensors of {end} bytes in a file of {size}")
    return infos, starts


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key of its header comes twice")
    return found


def _checked_info(path: Path, name: str, entry: Mapping[str, Any], start: int) -> TensorInfo:
    """What the header says of a tensor that has to begin at `start`."""
    check_name(name)
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise InputError(f"{path}: tensor '{name}' is quantised or of unknown dtype ({entry['dtype']})")
    shape, offsets = entry["shape"], entry["data_offsets"]
    lists = all(isinstance(one, list) for one in (shape, offsets))
    if not lists or not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, *offsets)):
        raise ValueError(f"tensor '{name}' has no sound shape or offsets")
    if offsets != [start, start + numel(tuple(shape)) * dtype.itemsize]:
        raise ValueError(f"tensor '{name}', {shape} {entry['dtype']}, lies at {offsets}, not right behind the last one")
    return TensorInfo(tuple(shape), dtype, path.name)


def check_name(name: str) -> None:
    """Raises ValueError for the name of a tensor that no file can hold."""
    if name == METADATA or any("\ud800" <= one <= "\udfff" for one in name):
        raise ValueError(f"{name!r} is no name for a tensor")


def numel(shape: Sequence[int]) -> int:
    """How many numbers a tensor of this shape has."""
    count = 1
    for length in shape:
        count *= length
    return count


@dataclass(frozen=True)
class Parts:
    """The tensors of all files of a checkpoint, by name.

    Attributes:
        files: by file name.
        holds: tensor name -> (file, name in it).
    """

    files: Mapping[str, Part]
    holds: Mapping[str, tuple[str, str]]

    def read(self, name: str) -> Tensor:
        """See `Part`."""
        file, held = self.holds[name]
        return self.files[file].read(held)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """See `Part`."""
        file, held = self.holds[name]
        return self.files[file].blocks(held)


@dataclass
class Known:
    """What reading has shown of a checkpoint; all that are the same on disk share one.

    Attributes:
        finite: tensors that have neither NaN nor inf.
        reads: how often each tensor was read.
        fingerprint: once it was computed.
    """

    finite: set[str] = field(default_factory=set)
    reads: Counter[str] = field(default_factory=Counter)
    fingerprint: str | None = None
