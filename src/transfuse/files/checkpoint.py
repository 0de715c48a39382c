"""A checkpoint: a model's tensors under their names, read one at a time when they are asked for."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .reading import BLOCK, Known, Parts, TensorInfo


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model's tensors, read from disk only when asked for and never cached.

    Attributes:
        location: What the user gave ('in memory' for a mapping or a module).
        root: Folder on disk; the parent for a single file, None in memory.
        kind: "transformers", "open_clip", "timm" or "state_dict" (a bare file, in memory, a folder without config).
        config: Parsed config, with the caller's keys over it; {} if there is none.
        headers: Tensor infos by name, in file order, without the wrapper prefix ("module.", "_orig_mod."). The dtype is
            the stored one, also of a tensor that `changes` make anew in float32.
        shards: File name -> names of the tensors in it.
        origin: What it was before it was seen otherwise (`conform.py`); None: it is as it was opened.
        changes: What makes a tensor of its form in `origin`, for those that are seen otherwise; linear.
    """

    location: str
    root: Path | None
    kind: str
    config: dict[str, Any] = field(repr=False)
    headers: Mapping[str, TensorInfo] = field(repr=False)
    shards: dict[str, tuple[str, ...]] = field(repr=False)
    _read: Parts = field(repr=False)
    origin: Checkpoint | None = field(default=None, repr=False)
    changes: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=dict, repr=False)
    known: Known = field(default_factory=Known, repr=False)

    @property
    def companions(self) -> Path | None:
        """Folder whose other files belong to the model; None for a bare file, beside which anything may lie."""
        return None if self.kind == "state_dict" else self.root

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor, on the CPU, in its stored dtype. It may be shared: do not change it in place.

        One of `changes` comes in float32, or float64 if it is stored so.

        Raises:
            InputError: No such tensor, its file cannot be read, or (checked on the first read) it has NaN or inf.
        """
        return self._finite(name, self._load(name))

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """The numbers of a tensor in order, shape (n,), `reading.BLOCK` at a time; each is valid until the next.

        Raises:
            InputError: as `tensor`, but what was read before a NaN or inf has been given by then.
        """
        for block in self.raw_blocks(name):
            if name not in self.known.finite and not is_finite(block):
                self.tensor(name)  # says where
            yield block
        self.known.finite.add(name)

    def raw_blocks(self, name: str) -> Iterator[torch.Tensor]:
        """`blocks` with whatever is in them."""
        if self.origin is not None and name in self.changes:
            return iter(self.changed(name, self.origin.tensor(name)).reshape(-1).split(BLOCK))
        if self.origin is not None:
            return self.origin.raw_blocks(name)
        self._count(name)
        return self._read.blocks(name)

    def changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of `origin` as it is seen here."""
        change = self.changes.get(name)
        return tensor if change is None else change(tensor).contiguous()

    def rounded(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The tensor as it would be if it had been stored in that dtype: rounded first, then seen otherwise."""
        if name not in self.changes or self.origin is None:
            return self.tensor(name).to(dtype)
        return self.changes[name](self.origin.tensor(name).to(dtype))

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __len__(self) -> int:
        return len(self.headers)

    def fingerprint(self) -> str:
        """blake2b (64 hex digits) over name, dtype, shape and bytes of every tensor; the same however sharded."""
        if self.known.fingerprint is None:
            digest = Fingerprint(self.headers)
            for name in digest.names:
                digest.begin(name)
                for block in self.raw_blocks(name):
                    digest.update(block)
            self.known.fingerprint = digest.hexdigest()
        return self.known.fingerprint

    def _load(self, name: str) -> torch.Tensor:
        if self.origin is not None:
            return self.changed(name, self.origin.tensor(name))
        self._count(name)
        return self._read.read(name)

    def _count(self, name: str) -> None:
        if name not in self.headers:
            raise InputError(f"{self.location}: it has no tensor '{name}'; the model may be of another architecture")
        self.known.reads[name] += 1

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        bad = None if name in self.known.finite else _first_not_finite(tensor)
        if bad is not None:
            file = self.root / self.headers[name].file if self.root else self.location
            fault = f"tensor '{name}' holds {tensor[bad].item()} at index {bad}"
            raise InputError(f"{file}: {fault}; the model is damaged (training diverged, or a conversion overflowed)")
        self.known.finite.add(name)
        return tensor


class Fingerprint:
    """The fingerprint of tensors that are given block by block, in the order of `names`."""

    def __init__(self, headers: Mapping[str, TensorInfo]):
        self.names = sorted(headers)
        self._headers = headers
        self._digest = hashlib.blake2b(digest_size=32)

    def begin(self, name: str) -> None:
        """The next blocks are of this tensor."""
        info = self._headers[name]
        self._digest.update(json.dumps([name, str(info.dtype), info.shape]).encode() + b"\0")

    def update(self, block: torch.Tensor) -> None:
        """Numbers of a tensor, in order, of any shape."""
        self._digest.update(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """64 hex digits."""
        return self._digest.hexdigest()


def _first_not_finite(tensor: torch.Tensor) -> tuple[int, ...] | None:
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    if is_finite(tensor):
        return None
    flat = torch.isfinite(tensor).logical_not().reshape(-1).nonzero()[0, 0]
    return tuple(int(i) for i in torch.unravel_index(flat, tensor.shape))


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor has neither NaN nor inf."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if math.isfinite(tensor.sum()):
        return True
    # Sums can overflow. The extremes are NaN or inf if any entry is, and need no mask of the tensor's size.
    return bool(torch.isfinite(torch.stack(list(tensor.aminmax()))).all())
