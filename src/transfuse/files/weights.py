"""One file of weights, or a state dict, as a part of a checkpoint.

Nothing is ever executed: pickles are read with `weights_only=True`, which refuses code.
"""

from __future__ import annotations

import logging
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from .reading import DTYPES, InMemory, Part, Safetensors, check_name

_log = logging.getLogger(__name__)

PICKLES = (".pt", ".pth", ".bin")
_UNWRAP = ("state_dict", "model", "model_state_dict")
# What a malformed pickle or archive makes torch.load raise, besides UnpicklingError.
_LOAD_ERRORS = (OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, struct.error)


def file_part(path: Path) -> Part:
    """A weight file, by its suffix; of safetensors only the header is read.

    Raises:
        InputError: it cannot be read, is no weight file, or holds code.
    """
    try:
        with path.open("rb") as file:
            start = file.read(32)
    except OSError as err:
        raise InputError(f"{path}: cannot be read ({err.strerror or err})") from err
    if not start or start.startswith(b"version https://git-lfs"):
        fault = "a Git LFS pointer, not the weights ('git lfs pull' brings them)" if start else "the file is empty"
        raise InputError(f"{path}: {fault}; get it again")
    if path.suffix == ".safetensors":
        return Safetensors(path)
    if path.suffix in PICKLES:
        return _pickle_part(path)
    raise InputError(f"{path}: not a weight file; .safetensors, {', '.join(PICKLES)} are read")


def _pickle_part(path: Path) -> Part:
    try:
        # Files from before torch 1.6 are not zip archives and cannot be mapped: they are held in memory whole.
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as err:
        raise InputError(
            f"{path}: refused, since reading it can run code: it holds more than tensors and plain values (or is no "
            f"torch file at all). If you trust it, load it and write it with safetensors.torch.save_file. Reason: {err}"
        ) from err
    except _LOAD_ERRORS as err:
        reason = (str(err) or type(err).__name__).splitlines()[0]
        raise InputError(f"{path}: not a readable torch file ({reason}), cut off or damaged; get it again") from err
    return mapping_part(content, path.name, str(path))


def mapping_part(content: Any, file: str, where: str, *, copied: bool = False) -> Part:
    """A part of a state dict, after unwrapping one level ({"state_dict": ...} and such)."""
    if isinstance(content, Mapping):
        content = next((content[key] for key in _UNWRAP if isinstance(content.get(key), Mapping)), content)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if not (isinstance(name, str) and isinstance(value, torch.Tensor)):
            _log.debug("%s: '%s' is %s, not a tensor: left out", where, name, type(value).__name__)
            continue
        if value.layout != torch.strided or value.is_meta or value.dtype not in DTYPES.values():
            raise InputError(f"{where}: tensor '{name}' ({value.dtype}) is sparse, quantised, odd or without data")
        try:
            check_name(name)
        except ValueError as err:
            raise InputError(f"{where}: {err}") from err
        tensors[name] = value.detach()
    if not tensors:
        raise InputError(f"{where}: no tensors in it; a state dict is read, alone or under one of {', '.join(_UNWRAP)}")
    return InMemory(_copies(tensors) if copied else tensors, file)


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU; tensors that are one in memory (tied weights) stay one."""
    made: dict[object, torch.Tensor] = {}
    found = {}
    for name, x in tensors.items():
        place = x.device, x.data_ptr(), x.shape, x.stride(), x.dtype
        if place not in made:
            made[place] = x.to("cpu", copy=True)
        found[name] = made[place]
    return found
