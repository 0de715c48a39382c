"""Tiny models of real classes with random weights, fine-tunes of them, and copies with their units in another order."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ViTConfig,
    ViTForImageClassification,
)

from transfuse.maps.algebra import Map
from transfuse.maps.random import random_maps
from transfuse.models.folding import map_state
from transfuse.models.model import Models
from transfuse.models.opening import open_models

State = dict[str, Tensor]
Model = Any  # the classes of transformers say too little of themselves for a type checker

BERT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 31,
    "max_position_embeddings": 14,
}  # fmt: skip
VIT: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "image_size": 8,
    "patch_size": 4, "num_channels": 1, "num_labels": 7,
}  # fmt: skip
TOWER: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert(kind: Any = BertModel, seed: int = 0, **changes: Any) -> Model:
    """A BERT in float64, so that exactness can be told from rounding."""
    return randomise(kind(BertConfig(**{**BERT, **changes})).double(), seed)


def vit(seed: int = 0, **changes: Any) -> Model:
    """A ViT with a classifier, in float64."""
    return randomise(ViTForImageClassification(ViTConfig(**{**VIT, **changes})).double(), seed)


def clip(kind: Any, seed: int = 0, **changes: Any) -> Model:
    """A CLIP of two small towers, in float64."""
    vision = CLIPVisionConfig(**TOWER, image_size=8, patch_size=4)
    text = CLIPTextConfig(**TOWER, vocab_size=31, max_position_embeddings=14, eos_token_id=2, bos_token_id=1)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12, **changes)
    return randomise(kind(config).double(), seed)


def randomise(model: Model, seed: int) -> Model:
    """Random weights as after training: no bias is zero and no norm is one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            gain = parameter.ndim == 1 and name.endswith("weight")
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(scale * noise + float(gain))
    return model.eval()


def fine_tuned(base: Model, kind: Any = None, seed: int = 100, size: float = 0.05, **changes: Any) -> Model:
    """A fine-tune of `base`: all its weights changed a little; as another class, with a head of its own."""
    config = copy.deepcopy(base.config)
    config.update(changes)
    model = copy.deepcopy(base) if kind is None else randomise(kind(config).to(base.dtype), seed)
    if kind is not None:
        model.base_model.load_state_dict(base.base_model.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((size * noise * parameter.double().std()).to(parameter.dtype))
    return model


def state_of(model: Model) -> State:
    """The weights under the names they have on disk, which can differ from those in memory."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def as_models(model: Model) -> Models:
    """A model as source and target at once."""
    return open_models(state_of(model), state_of(model), config=model.config.to_dict())


def planted(model: Model, seed: int, noise: float = 0.0) -> tuple[Model, dict[str, Map]]:
    """A copy that computes the same with its units in a random order, and the maps to it.

    Args:
        noise: Gaussian noise added to the copy, in units of each tensor's standard deviation.
    """
    models = as_models(model)
    layout = models.layout.with_ties()
    maps = random_maps(layout, torch.Generator().manual_seed(seed))
    state = map_state(models.source, layout, maps, model.dtype)
    moved = type(model).from_pretrained(None, config=model.config, state_dict=state, dtype=model.dtype)
    add_noise(moved, noise, seed + 1)
    return moved, maps


def add_noise(model: Model, noise: float, seed: int) -> None:
    """Adds Gaussian noise in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters() if noise else ():
            spread = noise * parameter.double().std()
            parameter.add_(
                (spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)).to(parameter)
            )


def save(model: Model, path: Path, **options: Any) -> Path:
    """Writes a model folder and gives its path back."""
    model.save_pretrained(path, **options)
    return path
