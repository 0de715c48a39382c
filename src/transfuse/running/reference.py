"""A small transformer of our own whose residual skips can be permuted.

The per-junction form of the paper maps the residual stream differently at every sum, so a skip is no longer an identity
(Rinaldi et al. 2025, eq. 11 and 12). No stock model has such skips; this one does, so that the form can be checked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..maps.algebra import Map


@dataclass(frozen=True)
class ReferenceConfig:
    """Sizes of a reference transformer."""

    vocab: int = 23
    tokens: int = 7
    width: int = 32
    num_heads: int = 4
    hidden: int = 48
    layers: int = 3
    classes: int = 5
    norm_first: bool = True

    def as_dict(self) -> dict[str, Any]:
        """The config as a checkpoint has it."""
        return {"model_type": "transfuse_reference", **asdict(self)}


def random_state(config: ReferenceConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Random float64 weights under the names of the `reference` layout; norms and biases are not trivial either."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator) / math.sqrt(shape[-1])

    def norm(name: str) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + 0.3 * normal(config.width), f"{name}.bias": normal(config.width)}

    def linear(name: str, out: int, into: int) -> dict[str, Tensor]:
        return {f"{name}.weight": normal(out, into), f"{name}.bias": 0.5 * normal(out)}

    width, hidden = config.width, config.hidden
    state = {"embed.weight": normal(config.vocab, width), "position": normal(config.tokens, width)}
    for layer in range(config.layers):
        at = f"layers.{layer}."
        state |= norm(f"{at}norm1") | norm(f"{at}norm2")
        for name in "qkvo":
            state |= linear(at + name, width, width)
        state |= linear(f"{at}fc1", hidden, width) | linear(f"{at}fc2", width, hidden)
    return state | norm("norm") | linear("head", config.classes, width)


def forward(
    config: ReferenceConfig,
    state: Mapping[str, Tensor],
    ids: Tensor,
    skips: Mapping[str, Map] | None = None,
) -> Tensor:
    """Logits of the reference transformer.

    Args:
        state: weights, as from `random_state`.
        ids: (batch, tokens) int64.
        skips: space that comes in -> the map on that skip (`skips.skips_of`); the identity where there is none.

    Returns:
        (batch, classes).
    """
    skips = skips or {}

    def skip(x: Tensor, junction: int) -> Tensor:
        found = skips.get(f"stream.{junction}")
        return x if found is None else found.apply(x, -1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (config.width,), state[f"{name}.weight"], state[f"{name}.bias"])

    x = state["embed.weight"][ids] + state["position"][: ids.shape[1]]  # (batch, tokens, width)
    for layer in range(config.layers):
        at, first = f"layers.{layer}.", 2 * layer
        if config.norm_first:
            x = skip(x, first) + _attention(config, state, at, norm(x, f"{at}norm1"))
            x = skip(x, first + 1) + _mlp(state, at, norm(x, f"{at}norm2"))
        else:
            x = norm(skip(x, first) + _attention(config, state, at, x), f"{at}norm1")
            x = norm(skip(x, first + 1) + _mlp(state, at, x), f"{at}norm2")
    return F.linear(norm(x, "norm").mean(1), state["head.weight"], state["head.bias"])


def _attention(config: ReferenceConfig, state: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    q, k, v = (
        F.linear(x, state[f"{at}{name}.weight"], state[f"{at}{name}.bias"])
        .unflatten(-1, (config.num_heads, -1))
        .transpose(1, 2)
        for name in "qkv"
    )  # (batch, heads, tokens, width / heads)
    mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return F.linear(mixed, state[f"{at}o.weight"], state[f"{at}o.bias"])


def _mlp(state: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(x, state[f"{at}fc1.weight"], state[f"{at}fc1.bias"]))
    return F.linear(hidden, state[f"{at}fc2.weight"], state[f"{at}fc2.bias"])
