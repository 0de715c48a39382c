"""Handwritten digits as a task, and tiny ViTs for it: a source, a fine-tune that knows them, and new bases."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as Pillow
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

import tiny
from transfuse.data.tasks import TaskSpec

CLASSES = 10
SIZES: dict[str, Any] = {"num_labels": CLASSES, "hidden_size": 24, "intermediate_size": 48}


def pixels() -> tuple[Tensor, Tensor]:
    """(1797, 1, 8, 8) values from -1 to 1, float64, and labels."""
    found: Any = load_digits()
    return torch.from_numpy(found.images)[:, None] / 8 - 1, torch.from_numpy(found.target).long()


def write_data(folder: Path) -> Path:
    """The digits as train.parquet and test.parquet, with real PNGs in them."""
    found: Any = load_digits()
    shades, labels = (found.images * 255 / 16).round().astype("uint8"), found.target
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(CLASSES)])})
    folder.mkdir(exist_ok=True)
    for name, rows in {"train": range(1200), "test": range(1200, 1797)}.items():
        columns = {"image": [Pillow.fromarray(shades[i]) for i in rows], "label": [int(labels[i]) for i in rows]}
        Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{name}.parquet"))
    return folder


def task(data: Path, **changes: Any) -> TaskSpec:
    """Classification of the digits."""
    about = {"kind": "image-classification", "data": {"path": str(data)}, **changes}
    return TaskSpec.model_validate(about)


def save(model: tiny.Model, folder: Path) -> Path:
    """A model folder with an image processor that scales bytes to values from -1 to 1."""
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5],
        "image_std": [0.5],
    }
    tiny.save(model, folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def vit(seed: int = 0) -> tiny.Model:
    """A ViT in float32 whose classes are the digits, untrained."""
    model = tiny.vit(seed, **SIZES).float()
    model.config.id2label = {i: str(i) for i in range(CLASSES)}
    model.config.label2id = {str(i): i for i in range(CLASSES)}
    return model


def trained(base: tiny.Model, steps: int, seed: int = 0, lr: float = 2e-3) -> tiny.Model:
    """A copy of `base` trained on the digits' training rows."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    images, labels = pixels()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        rows = torch.randint(1200, (128,), generator=generator)
        loss = functional.cross_entropy(model(pixel_values=images[rows].float()).logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
