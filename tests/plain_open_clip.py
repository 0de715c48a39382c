"""A CLIP of open_clip as plain loops over its own tensors, to hold conversions against; one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]


def image_features(state: State, about: Mapping[str, Any], image: Tensor) -> Tensor:
    """(embedding,) of one image (3, height, width)."""
    vision = about["vision_cfg"]
    kernel = state["visual.conv1.weight"]
    size = kernel.shape[-1]
    rows = [state["visual.class_embedding"]]
    for top in range(0, image.shape[1], size):
        for left in range(0, image.shape[2], size):
            patch = image[:, top : top + size, left : left + size]
            rows.append(torch.stack([(one * patch).sum() for one in kernel]))
    x = _norm(state, "visual.ln_pre", torch.stack(rows) + state["visual.positional_embedding"])
    heads = vision["width"] // vision["head_width"]
    x = _blocks(state, "visual.", x, vision["layers"], heads, about, causal=False)
    return _norm(state, "visual.ln_post", x[0]) @ state["visual.proj"]


def text_features(state: State, about: Mapping[str, Any], ids: Tensor) -> Tensor:
    """(embedding,) of one text: read at the highest token, the first of them."""
    at = "text." if about.get("custom_text") else ""
    text = about["text_cfg"]
    x = state[f"{at}token_embedding.weight"][ids] + state[f"{at}positional_embedding"][: len(ids)]
    x = _blocks(state, at, x, text["layers"], text["heads"], about, causal=True)
    values = ids.tolist()
    read = values.index(text["eos_id"] if text.get("pool_type") == "eos" else max(values))
    return _norm(state, f"{at}ln_final", x[read]) @ state[f"{at}text_projection"]


def _blocks(
    state: State, at: str, x: Tensor, layers: int, heads: int, about: Mapping[str, Any], *, causal: bool
) -> Tensor:
    for layer in range(layers):
        here = f"{at}transformer.resblocks.{layer}."
        x = x + _attention(state, here, _norm(state, f"{here}ln_1", x), heads, causal)
        hidden = _linear(state, f"{here}mlp.c_fc", _norm(state, f"{here}ln_2", x))
        x = x + _linear(state, f"{here}mlp.c_proj", _activation(hidden, bool(about.get("quick_gelu"))))
    return x


def _attention(state: State, here: str, x: Tensor, heads: int, causal: bool) -> Tensor:
    width = x.shape[-1]
    fused = x @ state[f"{here}attn.in_proj_weight"].T + state[f"{here}attn.in_proj_bias"]
    q, k, v = fused[:, :width], fused[:, width : 2 * width], fused[:, 2 * width :]
    size, parts = width // heads, []
    for head in range(heads):
        own = slice(head * size, (head + 1) * size)
        mixed = []
        for row in range(len(x)):
            seen = row + 1 if causal else len(x)
            weights = torch.softmax(k[:seen, own] @ q[row, own] / math.sqrt(size), 0)
            mixed.append(weights @ v[:seen, own])
        parts.append(torch.stack(mixed))
    return _linear(state, f"{here}attn.out_proj", torch.cat(parts, 1))


def _linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    spread = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / spread * state[f"{name}.weight"] + state[f"{name}.bias"]


def _activation(x: Tensor, quick: bool) -> Tensor:
    return x * torch.sigmoid(1.702 * x) if quick else x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
