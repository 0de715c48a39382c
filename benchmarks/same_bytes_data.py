"""The tiny data, tasks and recipes that `same_bytes.py` works on, made without transfuse."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import yaml
from PIL import Image

WIDTH, HIDDEN = 16, 24
COLOURS = {"blue": (30, 30, 200), "green": (30, 200, 30), "red": (200, 30, 30)}
TEXTS = {
    "good": ["a fine film", "truly great work", "a great and fine thing", "lovely", "what a joy"],
    "bad": ["a poor film", "truly awful work", "an awful and poor thing", "terrible", "what a bore"],
}
LAYERS = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": HIDDEN}
PIXELS = {**LAYERS, "image_size": 8, "patch_size": 4, "num_channels": 3}


def write_images(folder: Path, classes: int = 3) -> None:
    """Folders of images by class: colours with noise, or so many random patterns."""
    rng = numpy.random.default_rng(classes)
    patterns = {name: numpy.full((8, 8, 3), 0) + numpy.array(colour) for name, colour in COLOURS.items()}
    if classes > len(COLOURS):
        patterns = {f"kind {i}": rng.integers(30, 220, (8, 8, 3)) for i in range(classes)}
    for split, count in (("train", 14), ("test", 8)):
        for name, pattern in patterns.items():
            (folder / split / name).mkdir(parents=True)
            for row in range(count):
                pixels = (pattern + rng.integers(-60, 60, (8, 8, 3))).clip(0, 255).astype(numpy.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{row}.png")


def write_texts(place: Path) -> None:
    """`texts` with columns sentence and label, and a plain.txt; `pairs` with sentence1, sentence2 and label."""
    ends = ("", "number", "of a film", "and work")
    rows = [(f"{text} {end}".strip(), label) for end in ends for label, texts in TEXTS.items() for text in texts]
    pairs = [(text, other, label) for (text, label), (other, _) in zip(rows, rows[3:], strict=False)]
    for folder, header, table in (
        (place / "texts", ("sentence", "label"), rows),
        (place / "pairs", ("sentence1", "sentence2", "label"), pairs),
    ):
        folder.mkdir()
        for split, step in (("train", 1), ("dev", 2)):
            lines = ["\t".join(row) for row in (header, *table[::step])]
            (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    (place / "texts" / "plain.txt").write_text("".join(f"{text}\n\n" for text, _ in rows))


def tasks(place: Path) -> dict[str, dict[str, Any]]:
    """By name."""
    images: dict[str, Any] = {"path": str(place / "images"), "local": "images"}
    texts: dict[str, Any] = {"path": str(place / "texts"), "test": "dev"}
    pairs = {**texts, "path": str(place / "pairs"), "text_pair": ["sentence1", "sentence2"]}
    changes = {"turned": "rotate90", "inverted": "invert", "blurred": "blur", "gray": "gray", "noise": "noise"}
    changed = {name: {**images, "transform": transform} for name, transform in changes.items()}
    return {
        **{name: {"kind": "image-classification", "data": data} for name, data in changed.items()},
        "f1": {"kind": "image-classification", "data": images, "metric": "f1"},
        "correlation": {"kind": "text-classification", "data": texts, "metric": "matthews_correlation"},
        "pairs": {"kind": "text-classification", "data": pairs, "max_length": 12},
        "duels": {"kind": "seq2seq", "data": pairs, "max_length": 12, "targets": ["poor", "fine"]},
        "images": {"kind": "image-classification", "data": images},
        "zeroshot": {"kind": "zero-shot-image-classification", "data": images, "templates": ["a photo of a {}."]},
        "texts": {"kind": "text-classification", "data": texts, "max_length": 12},
        "words": {"kind": "masked-lm", "data": {**texts, "train": "plain", "test": "plain"}, "max_length": 12},
        "answers": {"kind": "seq2seq", "data": texts, "max_length": 12},
    }


def write_tasks(place: Path) -> None:
    """A JSON file for each task."""
    (place / "tasks").mkdir()
    for name, task in tasks(place).items():
        (place / "tasks" / f"{name}.json").write_text(json.dumps(task))


def write_recipes(place: Path) -> None:
    """Recipes for `bench`: every section on ViTs, and transport of CLIPs with and without inputs."""
    (place / "recipes").mkdir()
    for name, recipe in {"vits": _vits(tasks(place)), "clips": _clips(tasks(place))}.items():
        (place / "recipes" / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def _models(config: dict[str, Any], task: dict[str, Any], tuned: dict[str, Any], **init: Any) -> dict[str, Any]:
    start = {"config": config, "std": 0.2, **init}
    train = {"task": task, "steps": 4, "batch_size": 16, "lr": 0.003}
    return {
        "start": {"init": start},
        "other": {"init": {**start, "seed": 1}},
        "source": {"base": "start", "train": train},
        "tuned": {"base": "source", "train": {**train, "task": tuned}},
        "independent": {"base": "other", "train": train},
        "planted": {"base": "source", "plant": "permutation", "of": "source"},
        "rotated": {"base": "source", "plant": "rotation", "of": "source"},
    }


def _vits(known: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"], **PIXELS}
    images = known["images"]
    other = {**images, "data": {**images["data"], "transform": "rotate90", "classes": ["azure", "grass", "rose"]}}
    carried = {"source": "source", "tasks": {"turned": {"tuned": "tuned"}}, "methods": ["tied"], "null_trials": 1}
    methods = ["tied", "orthogonal", {"method": "transfusion", "tie_qkv": False}, "functional"]
    few = {**carried, "targets": {"planted": "planted"}}
    return {
        "name": "vits",
        "title": "Colours",
        "seeds": [0],
        "tasks": {"upright": images, "turned": other},
        "models": _models(config, images, other),
        "transport": {
            **carried,
            "methods": methods,
            "alphas": [0.5, 1.0],
            "targets": {"planted": "planted", "rotated": "rotated", "independent": "independent"},
            "support": "upright",
        },
        "alpha": {**few, "alphas": [0.25, 1.0]},
        "fewshot": {**few, "shots": [1], "steps": 2},
        "interpolation": {
            "pairs": {"line": ["source", "independent"]},
            "task": "upright",
            "methods": ["tied", {"method": "transfusion", "tie_qkv": False}],
            "points": 3,
        },
    }


def _clips(known: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    towers = {"text_config": {**LAYERS, "max_position_embeddings": 16}, "vision_config": PIXELS}
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 8, **towers}
    task = known["zeroshot"]
    words = {"vocab_size": 100, "texts": [f"a photo of a {name}." for name in COLOURS]}
    tuned = {**task, "data": {**task["data"], "transform": "rotate90"}}
    return {
        "name": "clips",
        "title": "Colours by name",
        "seeds": [0],
        "quick": {"seeds": [0], "limit": {"test": 12}, "train_scale": 0.5},
        "tasks": {"upright": task, "turned": tuned},
        "models": _models(config, task, tuned, tokenizer=words),
        "transport": {
            "source": "source",
            "targets": {"planted": "planted", "independent": "independent"},
            "tasks": {"turned": {"tuned": "tuned"}},
            "methods": [
                "ot",
                {"method": "theseus", "inputs": {"count": 16}},
                {"method": "functional", "inputs": {"task": "synthetic", "count": 16}},
            ],
            "alphas": [1.0],
            "null_trials": 0,
        },
    }
