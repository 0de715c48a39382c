"""What lies where in a model folder: names of files, configs, the index of several weight files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from .reading import Part
from .weights import file_part

_PLAIN = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
VOCABULARY_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (
    *VOCABULARY_FILES, TOKENIZER_CONFIG, "merges.txt", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
IMAGE_PROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILES = (IMAGE_PROCESSOR_FILE, "processor_config.json")
_MIXED = "the files of two models or versions may be mixed, or the download is not complete"


def candidates(folder: Path) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The weight files to look for, best first, and the folder's config.json ({} if none).

    A folder can hold a model twice: transformers is preferred to open_clip, and that to timm (image tower only).
    """
    plain = read_object(folder / "config.json") if (folder / "config.json").exists() else {}
    if not (folder / "open_clip_config.json").exists():
        return _PLAIN, plain
    return (*_PLAIN, *OPEN_CLIP_WEIGHTS) if "model_type" in plain else (*OPEN_CLIP_WEIGHTS, *_PLAIN), plain


def index_parts(folder: Path, index: str) -> dict[str, Part]:
    """The weight files that an index names.

    Raises:
        InputError: one is missing, cannot be read, or holds other tensors than the index says.
    """
    parts = {}
    for file, named in weight_map(folder / index).items():
        path = folder / file
        if not path.exists():
            raise InputError(f"{path}: missing, though {index} names it; the download is not complete")
        parts[file] = part = file_part(path)
        for name in sorted(part.infos.keys() ^ set(named)):
            is_in, says = ("is in", "does not say so") if name in part.infos else ("is not in", "says so")
            raise InputError(f"{path}: tensor '{name}' {is_in} it, but {index} {says}; {_MIXED}")
    return parts


def weight_map(path: Path) -> dict[str, list[str]]:
    """File name -> tensor names, as an index file says."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: it has no 'weight_map' object; the index is damaged")
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        # A name such as "../x" would read outside the model's folder.
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{path}: tensor '{name}' is said to be in {file!r}, which is not a file of this folder")
        files.setdefault(file, []).append(name)
    return dict(sorted(files.items()))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: it cannot be read, or holds none.
    """
    try:
        return parse_object(path.read_bytes(), str(path))
    except OSError as err:
        raise InputError(f"{path}: cannot be read ({err.strerror or err})") from err


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """The JSON object that a text is; `where` it comes from is for the message.

    Raises:
        InputError: it is none.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise InputError(f"{where}: not valid JSON ({err}); it may be cut off, or wrongly edited") from err
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON object was expected, not {type(value).__name__}")
    return value
