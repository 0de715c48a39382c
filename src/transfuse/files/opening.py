"""Opening checkpoints: folders, single files, hub models and models in memory; only headers are read."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from .checkpoint import Checkpoint
from .folders import OPEN_CLIP_WEIGHTS, candidates, index_parts, parse_object, read_object
from .hub import HUB_ID, fetch_model
from .reading import Part, Parts, TensorInfo
from .weights import PICKLES, file_part, mapping_part

# Wrappers of training code (DataParallel, torch.compile) put their own name before every tensor name.
_WRAPPERS = ("module.", "_orig_mod.")
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_QUANTISED = {"qweight", "qzeros", "SCB", "absmax", "quant_state"}
_ADAPTER = "adapters are not read yet: load it with peft, call merge_and_unload(), save the merged model and give that"


def open_checkpoint(
    location: str | os.PathLike[str] | Mapping[str, torch.Tensor] | nn.Module | Checkpoint,
    *,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    role: str = "the model",
) -> Checkpoint:
    """Opens a checkpoint; only file headers are read.

    Args:
        location: A model folder (transformers, open_clip, timm), a .safetensors/.pt/.pth/.bin file, a hub id
            ("org/name", "org/name@revision"), a mapping name -> tensor, a module (its state dict, and its
            config if it has one), or a Checkpoint. What is in memory is copied (tied tensors once), so that it can be
            changed later: training a model changes its state dict.
        config: Keys that go over those of the model's own config: a mapping, a config of transformers, a JSON file, or
            JSON text ("{...").
        role: What the model is to the caller ("source", "tuned", ...), for messages.

    Raises:
        InputError: It is not there, not readable, not complete, quantised, an adapter, or holds code; or nothing that
            can be opened.
    """
    extra = _given_config(config)
    if isinstance(location, Checkpoint):
        return replace(location, config={**location.config, **extra}) if extra else location
    kind = "state_dict"
    if isinstance(location, nn.Module):
        own = _config_of(location)
        kind = "transformers" if own.get("model_type") else kind
        location, extra = location.state_dict(), {**own, **extra}
    if isinstance(location, Mapping):
        part = mapping_part(location, "", "in memory", copied=True)
        return _assemble("in memory", None, kind, extra, {"": part})
    if not isinstance(location, str | os.PathLike):
        raise InputError(
            f"{role} is given as {type(location).__name__}, which is no model: give a folder, a weight file, a hub id, "
            "a state dict (name -> tensor) or a torch.nn.Module"
        )
    where = os.fspath(location)
    path = Path(where).expanduser()
    if where and os.path.isdir(path):
        return _open_folder(where, path, extra)
    if where and os.path.exists(path):
        return _assemble(where, path.parent, "state_dict", extra, {path.name: file_part(path)})
    match = HUB_ID.fullmatch(where) if isinstance(location, str) else None
    if match is None or path.suffix in (".safetensors", *PICKLES):
        raise InputError(f"'{where}': no such file or folder, and not a hub id (org/name or org/name@revision)")
    return _open_folder(where, fetch_model(where, match["repo"], match["revision"]), extra)


def _given_config(config: Any) -> dict[str, Any]:
    if hasattr(config, "to_dict"):
        return _as_in_a_file(config)
    if config is None or isinstance(config, Mapping):
        return copy.deepcopy(dict(config or {}))  # the caller may go on to change it, like the tensors
    text = os.fspath(config)
    return parse_object(text, "config text") if text.lstrip().startswith("{") else read_object(Path(text).expanduser())


def _config_of(model: nn.Module) -> dict[str, Any]:
    """What a model's own config says, as it would stand in a file; {} if it has none."""
    inner = getattr(model, "_orig_mod", model.module if isinstance(model, _PARALLEL) else model)
    if inner is not model:
        return _config_of(inner)
    own: Any = getattr(model, "config", None)
    if not hasattr(own, "to_dict"):
        return {}
    # The config of a model with a new head still names the class that it was loaded from until it is saved.
    return {**_as_in_a_file(own), "architectures": [type(model).__name__]}


def _as_in_a_file(config: Any) -> dict[str, Any]:
    """A config object as a file holds it: text where labels have numbers."""
    return json.loads(json.dumps(config.to_dict(), default=str))


def _open_folder(where: str, folder: Path, extra: dict[str, Any]) -> Checkpoint:
    names, config = candidates(folder)
    weights = next((name for name in names if (folder / name).exists()), None)
    if weights is None:
        if (folder / "adapter_config.json").exists():
            raise InputError(f"{where}: an adapter without the model's weights; {_ADAPTER}")
        raise InputError(f"{where}: no weights in it; looked for {', '.join(names)}")
    if weights in OPEN_CLIP_WEIGHTS:
        config = read_object(folder / "open_clip_config.json")
    config = {**config, **extra}
    parts = index_parts(folder, weights) if weights.endswith(".json") else {}
    return _assemble(where, folder, _kind(weights, config), config, parts or {weights: file_part(folder / weights)})


def _kind(weights: str, config: Mapping[str, Any]) -> str:
    if weights in OPEN_CLIP_WEIGHTS:
        return "open_clip"
    if "model_type" not in config and isinstance(config.get("architecture"), str):
        return "timm"
    return "transformers" if config else "state_dict"


def _assemble(where: str, root: Path | None, kind: str, config: dict[str, Any], parts: dict[str, Part]) -> Checkpoint:
    names = [name for part in parts.values() for name in part.infos]
    if not names:
        raise InputError(f"{where}: it holds no tensors")
    cut = _wrapper_length(names)
    headers = {name[cut:]: info for part in parts.values() for name, info in part.infos.items()}
    shards = {file: tuple(name[cut:] for name in part.infos) for file, part in parts.items()}
    _refuse_unmergeable(where, config, headers)
    holds = {name[cut:]: (file, name) for file, part in parts.items() for name in part.infos}
    return Checkpoint(
        location=where, root=root, kind=kind, config=config, headers=headers, shards=shards, _read=Parts(parts, holds)
    )  # fmt: skip


def _wrapper_length(names: Sequence[str]) -> int:
    """Length of the wrapper prefixes that all names have, one inside the other."""
    for prefix in _WRAPPERS:
        if all(name.startswith(prefix) and len(name) > len(prefix) for name in names):
            return len(prefix) + _wrapper_length([name[len(prefix) :] for name in names])
    return 0


def _refuse_unmergeable(where: str, config: Mapping[str, Any], headers: Mapping[str, TensorInfo]) -> None:
    advice = "quantised weights cannot be merged; give the model in float16, bfloat16 or float32"
    if config.get("quantization_config"):
        raise InputError(f"{where}: its config has a 'quantization_config'; {advice}")
    for name, info in headers.items():
        small_float = info.dtype.is_floating_point and info.dtype.itemsize == 1
        packed = name.endswith(".weight") and info.dtype in (torch.int8, torch.uint8)
        if small_float or packed or not _QUANTISED.isdisjoint(name.split(".")):
            raise InputError(f"{where}, file '{info.file}': tensor '{name}' is quantised ({info.dtype}); {advice}")
    if all(".lora_" in name for name in headers):
        raise InputError(f"{where}: it holds LoRA matrices only (such as '{next(iter(headers))}'); {_ADAPTER}")
