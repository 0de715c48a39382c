"""CLIPs of open_clip with random weights: the form in which full-size recipes get theirs, where weights are missing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..files.writing import Weights, write_checkpoint

CONFIG_FILE, WEIGHT_FILE = "open_clip_config.json", "open_clip_model.safetensors"
_STD = 0.02
_LOGIT_SCALE = math.log(1 / 0.07)

Shapes = dict[str, tuple[int, ...]]


def write_open_clip(
    config: Mapping[str, Any], out: Path, *, seed: int, std: float | None, files: Mapping[str, bytes | str], force: bool
) -> None:
    """Writes a folder as open_clip has it, with weights from N(0, std), norms that do nothing and biases of zero.

    Args:
        config: as in open_clip_config.json: `model_cfg` with `embed_dim`, `vision_cfg`, `text_cfg`; `preprocess_cfg`.
        files: of a tokenizer, say.

    Raises:
        InputError: a size is missing.
    """
    try:
        shapes = _shapes(config["model_cfg"])
    except KeyError as error:
        raise InputError(f"init: the model_cfg of an open_clip model lacks {error}") from error
    generator = torch.Generator().manual_seed(seed)
    state = {name: _drawn(name, shape, std or _STD, generator) for name, shape in shapes.items()}
    write_checkpoint(
        out,
        Weights({WEIGHT_FILE: list(state)}, state.__getitem__, state.__getitem__),
        files={**files, CONFIG_FILE: json.dumps(dict(config), indent=2) + "\n"},
        copy_from=None,
        force=force,
    )


def _shapes(about: Mapping[str, Any]) -> Shapes:
    vision, text, public = about["vision_cfg"], about["text_cfg"], about["embed_dim"]
    wide, narrow, patch = vision["width"], text["width"], vision["patch_size"]
    return {
        "logit_scale": (),
        "positional_embedding": (text["context_length"], narrow),
        "text_projection": (narrow, public),
        "token_embedding.weight": (text["vocab_size"], narrow),
        **_norm("ln_final", narrow),
        **_blocks("", narrow, text),
        "visual.class_embedding": (wide,),
        "visual.positional_embedding": ((vision["image_size"] // patch) ** 2 + 1, wide),
        "visual.proj": (wide, public),
        "visual.conv1.weight": (wide, 3, patch, patch),
        **_norm("visual.ln_pre", wide),
        **_norm("visual.ln_post", wide),
        **_blocks("visual.", wide, vision),
    }


def _blocks(tower: str, width: int, about: Mapping[str, Any]) -> Shapes:
    hidden, found = int(width * about.get("mlp_ratio", 4.0)), Shapes()
    for layer in range(about["layers"]):
        here = f"{tower}transformer.resblocks.{layer}."
        found |= _norm(f"{here}ln_1", width) | _norm(f"{here}ln_2", width)
        found |= {f"{here}attn.in_proj_weight": (3 * width, width), f"{here}attn.in_proj_bias": (3 * width,)}
        for name, outputs, inputs in (("attn.out_proj", width, width), ("mlp.c_fc", hidden, width)):
            found |= {f"{here}{name}.weight": (outputs, inputs), f"{here}{name}.bias": (outputs,)}
        found |= {f"{here}mlp.c_proj.weight": (width, hidden), f"{here}mlp.c_proj.bias": (width,)}
    return found


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _drawn(name: str, shape: tuple[int, ...], std: float, generator: torch.Generator) -> Tensor:
    if name == "logit_scale":
        return torch.tensor(_LOGIT_SCALE)
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1 and name.endswith(".weight"):
        return torch.ones(shape)
    return std * torch.randn(shape, generator=generator)
