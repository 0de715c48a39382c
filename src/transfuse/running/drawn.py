"""Drawn inputs, for who has none: smooth images, random tokens."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from ..errors import InputError
from .inputs import Prepared
from .live import LiveModel
from .tokens import Batch


@dataclass(frozen=True)
class Drawn:
    """Inputs in memory."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def read(self, index: Tensor, generator: Generator | None) -> Batch:
        return {name: x[index] for name, x in self.tensors.items()}


def synthetic(live: LiveModel, *, count: int = 512, tokens: int = 64, batch_size: int = 64, seed: int = 0) -> Prepared:
    """Drawn inputs, for who has none: smooth Gaussian images (a coarse and a fine layer), or uniformly random tokens.

    Args:
        live: its config says the form of the inputs.
        count: how many.
        tokens: of a text, or as many as the model has positions for.
        batch_size: of `Prepared.batches`.
        seed: of their own generator.
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = live.model.config
    vision = getattr(config, "vision_config", None) or (config if hasattr(config, "patch_size") else None)
    tensors: dict[str, Tensor]
    if vision is not None:
        tensors = {"pixel_values": _images(vision, count, generator)}
    elif hasattr(config, "vocab_size"):
        length = min(tokens, int(getattr(config, "max_position_embeddings", tokens + 2)) - 2)
        ids = torch.randint(2, int(config.vocab_size), (count, length), generator=generator)
        tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if has_decoder(live):
            tensors["decoder_input_ids"] = torch.randint(2, int(config.vocab_size), ids.shape, generator=generator)
    else:
        raise InputError(f"{live.location}: its config does not say what inputs look like; give some (--inputs)")
    return Prepared(Drawn(tensors), torch.arange(count), (), batch_size)


def has_decoder(live: LiveModel) -> bool:
    """Whether it has a decoder beside an encoder."""
    return "decoder_input_ids" in inspect.signature(live.model.forward).parameters


def _images(vision: Any, count: int, generator: Generator) -> Tensor:
    size = vision.image_size if isinstance(vision.image_size, int) else next(iter(vision.image_size))
    channels = int(getattr(vision, "num_channels", 3))
    coarse = torch.randn(count, channels, 8, 8, generator=generator)
    fine = torch.randn(count, channels, size, size, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear") + 0.3 * fine
