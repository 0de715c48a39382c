"""Tiny data sets on disk, and tiny models with processors, for the tests of evaluation and training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy
import torch
from PIL import Image
from torch import Tensor

from transfuse.data.splits import DataSpec
from transfuse.data.tasks import TaskSpec
from transfuse.running.inputs import Prepared
from transfuse.study.train import InitSpec, TokenizerSpec

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
TEXTS = {
    "good": ["a fine film", "truly great work", "a great and fine thing", "lovely"],
    "bad": ["a poor film", "truly awful work", "an awful and poor thing", "terrible"],
}

TOWER: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PROMPTS = [f"a photo of a {name}." for name in COLOURS]


@dataclass(frozen=True)
class Rows:
    """Model inputs in memory."""

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def read(self, index: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        return {name: x[index] for name, x in self.tensors.items()}


def prepared(tensors: Mapping[str, Tensor], batch_size: int = 64, **extra: Tensor) -> Prepared:
    """Model inputs as `prepare` would give them."""
    rows = Rows(tensors)
    return Prepared(rows, torch.arange(len(rows)), (), batch_size, extra)


def image(colour: str, seed: int, size: int = 8) -> Image.Image:
    """An image of one colour with noise."""
    noise = numpy.random.default_rng(seed).integers(-30, 30, (size, size, 3))
    return Image.fromarray((numpy.array(COLOURS[colour]) + noise).clip(0, 255).astype(numpy.uint8))


def write_images(folder: Path, *, train: int = 30, test: int = 12, size: int = 8) -> Path:
    """train.parquet and test.parquet as the hub has them; the labels take turns."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))})
    for split, count, first in (("train", train, 0), ("test", test, 1000)):
        labels = [row % len(COLOURS) for row in range(count)]
        images = [image(list(COLOURS)[label], first + row, size) for row, label in enumerate(labels)]
        made = datasets.Dataset.from_dict({"img": images, "label": labels}, features=features)
        made.to_parquet(folder / f"{split}.parquet")
    return folder


def write_texts(folder: Path, repeat: int = 6) -> Path:
    """train.tsv and dev.tsv with columns sentence and label, and train.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(text, label) for _ in range(repeat) for label, texts in TEXTS.items() for text in texts]
    lines = "".join(f"{text}\t{label}\n" for text, label in rows)
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("sentence\tlabel\n" + lines)
    (folder / "plain.txt").write_text("".join(f"{text}\n\n" for text, _ in rows))
    return folder


def image_data(folder: Path, **changes: Any) -> DataSpec:
    return DataSpec(path=str(folder), **changes)


def image_task(folder: Path, kind: Any = "image-classification", **changes: Any) -> TaskSpec:
    return TaskSpec(kind=kind, data=image_data(folder), **changes)


def text_data(folder: Path, **changes: Any) -> DataSpec:
    return DataSpec(path=str(folder), **{"test": "dev", **changes})


def plain_data(folder: Path) -> DataSpec:
    return DataSpec(path=str(folder), train="plain", test="plain")


def clip_spec(seed: int = 0, **changes: Any) -> InitSpec:
    config = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": 12,
        "text_config": {**TOWER, "max_position_embeddings": 16},
        "vision_config": {**TOWER, "image_size": 8, "patch_size": 4},
    }
    tokenizer = TokenizerSpec(vocab_size=100, texts=PROMPTS)
    return InitSpec(**{"config": config, "seed": seed, "std": 0.1, "tokenizer": tokenizer, **changes})


def vit_spec(seed: int = 0, **changes: Any) -> InitSpec:
    config = {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        **TOWER,
        "image_size": 8,
        "patch_size": 4,
        "id2label": dict(enumerate(COLOURS)),
        "label2id": {name: number for number, name in enumerate(COLOURS)},
        **changes,
    }
    return InitSpec(config=config, seed=seed, std=0.1)


def bert_spec(data: DataSpec, seed: int = 0, kind: str = "BertForMaskedLM", **changes: Any) -> InitSpec:
    config = {"model_type": "bert", "architectures": [kind], **TOWER, "max_position_embeddings": 16, **changes}
    return InitSpec(config=config, seed=seed, std=0.1, tokenizer=TokenizerSpec(vocab_size=80, data=[data]))
