"""A few images and texts in the layout of the data sets that full-size recipes name, under their local names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy
from PIL import Image

CLASSES = {"eurosat": 10, "dtd": 47, "gtsrb": 43, "svhn": 10, "cifar10": 10}
PAIRS = {
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "snli": ("premise", "hypothesis"),
    "scitail": ("premise", "hypothesis"),
}
# What is not as in the other texts: labels 0 and 1, and the splits train and dev.
LABELS: dict[str, tuple[int | str, ...]] = {"mnli": (0, 1, 2), "snli": (0, 1, 2), "scitail": ("entails", "neutral")}
SPLITS = {
    "mnli": ("train", "validation_matched"),
    "snli": ("train", "dev", "test"),
    "scitail": ("train", "dev", "test"),
}
TEXTS = ("a fine film", "what a bore", "a truly great work", "they has gone")


def write(folder: Path) -> Path:
    """The data directory: every class of the images is there three times."""
    for number, (name, classes) in enumerate(CLASSES.items()):
        names = datasets.ClassLabel(names=[f"{name} {one}" for one in range(classes)])
        for split, count in (("train", 3 * classes), ("test", 20)):
            labels = [row % classes for row in range(count)]
            write_images(folder / name / f"{split}.parquet", {"label": (labels, names)}, 100 * number + count)
    renditions = [("axolotl", "n01632777"), ("gold_fish", "n01443537")]
    columns = {
        key: ([renditions[row % 2][at] for row in range(24)], None) for at, key in enumerate(("class_name", "wnid"))
    }
    write_images(folder / "imagenet-r" / "test.parquet", columns, 7)
    for name in ("sst2", "cola", *PAIRS):
        write_texts(folder / name)
    return folder


def write_images(file: Path, columns: dict[str, tuple[list[Any], Any]], seed: int, size: int = 12) -> None:
    """A parquet file as the hub has them: images and further columns, each with its feature."""
    file.parent.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(columns.values()))[0])
    pixels = numpy.random.default_rng(seed).integers(0, 255, (count, size, size, 3)).astype(numpy.uint8)
    features = {name: feature or datasets.Value("string") for name, (_, feature) in columns.items()}
    rows = {
        "image": [Image.fromarray(one) for one in pixels],
        **{name: values for name, (values, _) in columns.items()},
    }
    made = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), **features}))
    made.to_parquet(file)


def write_texts(folder: Path, count: int = 40) -> None:
    """A file for each split, with the columns that the data set of this name has."""
    folder.mkdir(parents=True)
    names, labels = PAIRS.get(folder.name, ("sentence",)), LABELS.get(folder.name, (0, 1))
    header = "\t".join((*names, "label"))
    texts = [[f"{TEXTS[(row + at) % 4]} number {row}" for at, _ in enumerate(names)] for row in range(count)]
    lines = ["\t".join((*one, str(labels[row % len(labels)]))) for row, one in enumerate(texts)]
    for split in SPLITS.get(folder.name, ("train", "dev")):
        (folder / f"{split}.tsv").write_text("\n".join((header, *lines)) + "\n")
