"""A recipe of every section on scikit-learn's digits and tiny ViTs: seconds on one core."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import digits

VIT: dict[str, Any] = {
    "model_type": "vit",
    "architectures": ["ViTForImageClassification"],
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
}
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
UPRIGHT: dict[str, Any] = {"kind": "image-classification", "data": {"path": "digits", "local": "digits"}}
# Other class names make it another task, whose head is carried.
ON_SIDE: dict[str, Any] = {
    "kind": "image-classification",
    "data": {"path": "digits", "local": "digits", "transform": "rotate90", "classes": NAMES},
}


def recipe(**changes: Any) -> dict[str, Any]:
    """A recipe as a file holds it."""
    pretrain = {"task": UPRIGHT, "steps": 3, "batch_size": 32, "lr": 0.003}
    init = {"config": VIT, "std": 0.2, "image_mean": [0.5], "image_std": [0.5]}
    methods = ["tied", {"method": "transfusion", "tie_qkv": False}]
    carried = {"source": "source", "tasks": {"on-side": {"tuned": "tuned"}}, "methods": methods, "alphas": [0.5, 1.0]}
    return {
        "name": "digits-small",
        "title": "Digits",
        "about": "A test.",
        "paper": "Rinaldi et al. 2025, Table 1",
        "seeds": [0],
        "limit": {"train": 200, "validation": 40, "test": 60},
        "quick": {"seeds": [0], "limit": {"test": 20}, "train_scale": 0.5},
        "tasks": {"upright": UPRIGHT, "on-side": ON_SIDE},
        "models": {
            "start": {"init": init},
            "other": {"init": {**init, "seed": 1}},
            "source": {"base": "start", "train": pretrain},
            "tuned": {"base": "source", "train": {**pretrain, "task": ON_SIDE}},
            "independent": {"base": "other", "train": pretrain},
            "planted": {"base": "source", "plant": "permutation", "of": "source"},
        },
        "transport": {
            **carried,
            "targets": {"planted": "planted", "independent": "independent"},
            "support": "upright",
        },
        **changes,
    }


def everything() -> dict[str, Any]:
    """The same with all sections."""
    carried = recipe()["transport"]
    few = {**carried, "targets": {"planted": "planted"}, "methods": ["tied"]}
    worth = {key: value for key, value in few.items() if key != "alphas"}
    count = {"count": 16}
    worth["methods"] = ["tied", {"method": "functional", "inputs": count, "keep": {"task": "upright", **count}}]
    again = {"task": ON_SIDE, "steps": 3, "batch_size": 32, "lr": 0.003, "keep": {"task": UPRIGHT, **count}}
    return recipe(
        models={**recipe()["models"], "again": {"base": "planted", "train": again}},
        worth={**worth, "retrained": {"again": {"planted": {"on-side": "again"}}}},
        alpha={**few, "alphas": [0.25, 1.0]},
        fewshot={**few, "shots": [1], "steps": 2},
        interpolation={
            "pairs": {"line": ["source", "independent"]},
            "task": "upright",
            "methods": ["tied", {"method": "transfusion", "tie_qkv": False}],
            "points": 3,
        },
    )


def write(folder: Path, content: dict[str, Any]) -> Path:
    """A recipe file."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def data_dir(folder: Path) -> Path:
    """A data directory with the digits in it."""
    digits.write_data(folder / "digits")
    return folder
