"""Inputs for who has none: images of coloured noise, random tokens, texts that a masked language model writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from ..errors import InputError
from .inputs import Pixels, Prepared, Source, pixels_of
from .live import LiveModel
from .noise import drawn_images
from .tokens import Batch
from .written import written_texts


@dataclass(frozen=True)
class Drawn:
    """Inputs in memory."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def read(self, index: Tensor, generator: Generator | None) -> Batch:
        return {name: x[index] for name, x in self.tensors.items()}


@dataclass(frozen=True)
class _DrawnImages:
    """Images in memory, as bytes."""

    stored: Tensor
    pixels: Pixels

    def __len__(self) -> int:
        return len(self.stored)

    def read(self, index: Tensor, generator: Generator | None) -> Batch:
        return {"pixel_values": self.pixels(self.stored[index])}


def synthetic(live: LiveModel, *, count: int = 512, tokens: int = 64, batch_size: int = 64, seed: int = 0) -> Prepared:
    """Drawn inputs, for who has none: images of coloured noise (`drawn_images`), or uniformly random tokens.

    Args:
        live: its config says the form of the inputs, its image processor how pixels become inputs.
        count: how many.
        tokens: of a text, or as many as the model has positions for.
        batch_size: of `Prepared.batches`.
        seed: of their own generator.
    """
    generator = torch.Generator().manual_seed(seed)
    config: Any = live.model.config
    vision = getattr(config, "vision_config", None) or (config if hasattr(config, "patch_size") else None)
    source: Source
    if vision is not None:
        images = drawn_images(count, live.channels, _size(vision.image_size), generator)
        source = _DrawnImages(images, pixels_of(live))
    elif hasattr(config, "vocab_size"):
        length = min(tokens, live.positions or tokens)
        ids = torch.randint(2, int(config.vocab_size), (count, length), generator=generator)
        tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if live.has_decoder:
            tensors["decoder_input_ids"] = torch.randint(2, int(config.vocab_size), ids.shape, generator=generator)
        source = Drawn(tensors)
    else:
        raise InputError(f"{live.location}: its config does not say what inputs look like; give some (--inputs)")
    return Prepared(source, torch.arange(count), (), batch_size)


def _size(given: Any) -> tuple[int, int]:
    """Height and width of the images that a config names."""
    height, width = (given, given) if isinstance(given, int) else given
    return int(height), int(width)


def generated(
    live: LiveModel,
    *,
    count: int = 512,
    tokens: int = 64,
    batch_size: int = 64,
    seed: int = 0,
    progress: bool = False,
) -> Prepared:
    """Texts that a masked language model writes itself (`written_texts`).

    Args:
        live: the model, with a tokenizer.
        count, tokens, batch_size, seed: see `synthetic`.
        progress: a bar on stderr.

    Raises:
        InputError: see `written_texts`.
    """
    ids = written_texts(live, count=count, tokens=tokens, seed=seed, progress=progress)
    source = Drawn({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return Prepared(source, torch.arange(count), (), batch_size)
