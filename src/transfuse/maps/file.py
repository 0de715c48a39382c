"""What the project itself keeps in one safetensors file, with JSON metadata: maps, moments."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import InputError


def check_file(path: Path, *, force: bool, load: Callable[[Path], Any]) -> None:
    """Refuses a place for such a file before any work is done.

    Args:
        path: where it is to be.
        force: whether a file of the same kind may be replaced.
        load: reads such a file; raises InputError if it is of another kind.

    Raises:
        InputError: the folder is missing; the file exists (and not `force`), or is something else.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    if not path.exists():
        return
    if not force:
        raise InputError(f"{path}: it exists; give another place, or --force")
    load(path)  # --force replaces its own kind, never a model


def write_file(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], key: str, about: Mapping[str, Any], what: str
) -> None:
    """Writes tensors, and metadata as JSON under `key`, beside the place and renamed; `what` they are, for messages.

    Raises:
        InputError: it could not be written.
    """
    partial = Path(f"{path}.partial")
    try:
        # `save_file` makes files that only their owner can read.
        partial.write_bytes(save(dict(tensors), metadata={key: json.dumps(about, sort_keys=True)}))
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: the {what} could not be written: {error}") from error
    finally:  # also after an interrupt
        partial.unlink(missing_ok=True)


def read_file(path: str | os.PathLike[str], key: str, what: str) -> tuple[Any, dict[str, Tensor]]:
    """The metadata under `key`, and the tensors.

    Raises:
        InputError: no such file, or none that has such metadata.
    """
    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {})[key])
            # Cloned into aligned memory: products of matrices can differ in the last bit with the alignment.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a {what} file of transfuse ({error})") from error
    return about, tensors


def format_of(path: str | os.PathLike[str], about: Any, newest: int, what: str, damaged: str) -> None:
    """Raises InputError unless metadata are of a format that is known here, up to `newest`."""
    version = about.get("format_version") if isinstance(about, dict) else None
    if not isinstance(version, int):
        raise InputError(f"{path}: its metadata has no format version: {damaged}")
    if version > newest:
        raise InputError(f"{path}: written in {what} format {version}, newer than {newest}: update transfuse")
