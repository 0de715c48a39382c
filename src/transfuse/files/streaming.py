"""Writing a safetensors file tensor by tensor: byte for byte what `safetensors.torch.save_file` makes of all of them.

The header says where every tensor lies, so shapes and dtypes have to be known before the first number.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from .reading import DTYPES, METADATA, numel

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# In the file the widest come first, so that every tensor is aligned; of one dtype by name.
_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8",
    "BOOL",
)  # fmt: skip

Pieces = Tensor | Iterable[Tensor]


class Formed(Protocol):
    """Anything that has a shape and a dtype: a tensor, or what a header says of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


class Misformed(RuntimeError):
    """A tensor is not what the header says of it: an error in the program."""


def write_safetensors(
    write: Callable[[bytes | memoryview], object], forms: Mapping[str, Formed], read: Callable[[str], Pieces]
) -> None:
    """Writes a file; needs memory for what `read` gives at a time.

    Args:
        write: of a new binary file.
        forms: shape and dtype of every tensor, by name.
        read: gives a tensor, on any device, whole or piece by piece in the order of its numbers.

    Raises:
        Misformed: `read` gives something else than `forms` says.
    """
    names = sorted(forms, key=lambda name: (_ORDER.index(_NAMES[forms[name].dtype]), name))
    write(_header({name: forms[name] for name in names}))
    for name in names:
        left = numel(forms[name].shape)
        for piece in _pieces(name, forms[name], read(name)):
            write(piece.view(torch.uint8).numpy().data)
            left -= len(piece)
            del piece  # before the next one is made
        if left:
            raise Misformed(f"tensor {name!r} lacks {left} numbers of {tuple(forms[name].shape)}")


def _pieces(name: str, form: Formed, found: Pieces) -> Iterable[Tensor]:
    """What was read as vectors on the CPU."""
    if isinstance(found, Tensor) and tuple(found.shape) != tuple(form.shape):
        raise Misformed(f"tensor {name!r} is {tuple(found.shape)}, not {tuple(form.shape)}")
    for piece in (found,) if isinstance(found, Tensor) else found:
        if piece.dtype != form.dtype:
            raise Misformed(f"tensor {name!r} is {piece.dtype}, not {form.dtype}")
        yield piece.detach().cpu().contiguous().reshape(-1)


def _header(forms: Mapping[str, Formed]) -> bytes:
    """The header and its length, up to where the first tensor begins."""
    entries: dict[str, object] = {METADATA: {"format": "pt"}}
    end = 0
    for name, form in forms.items():
        start, end = end, end + numel(form.shape) * form.dtype.itemsize
        entries[name] = {"dtype": _NAMES[form.dtype], "shape": list(form.shape), "data_offsets": [start, end]}
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw
