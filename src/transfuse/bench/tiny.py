"""A recipe made tiny: the real classes, loaders and steps on random weights and whatever data are at hand.

Full-size recipes name hub models and hub data. To see that nothing but weights and data is missing, every model that
has a location becomes a tiny random one of its class, and every data set that is not there becomes one that is.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..data.splits import DataSpec, Split, class_names, data_place, load_split
from ..data.tasks import LANGUAGE, SEQ2SEQ, ZERO_SHOT, TaskSpec
from ..errors import InputError
from ..study.initial import InitSpec, TokenizerSpec
from ..study.train import TrainSpec
from .recipes.parts import MethodSpec, ModelSpec
from .recipes.sections import SECTIONS, CarriedSpec, FewShotSpec, InterpolationSpec, TransportSpec
from .recipes.spec import Limits, Recipe

ROWS = 24
STEPS = 2

_ENCODER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TEXT = {**_ENCODER, "max_position_embeddings": 64}
_IMAGE = {**_ENCODER, "image_size": 32, "patch_size": 8}
_DISTIL = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
# Both towers as the plain ViT CLIPs of open_clip have them.
_OPEN_CLIP: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "mlp_ratio": 1.5},
        "text_cfg": {"context_length": 64, "vocab_size": 400, "width": 32, "heads": 4, "layers": 2, "mlp_ratio": 1.5},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}
# Start of a class's name -> its config.
_CONFIGS: dict[str, dict[str, Any]] = {
    "CLIP": {"model_type": "clip", "projection_dim": 16, "text_config": _TEXT, "vision_config": _IMAGE},
    "Bert": {"model_type": "bert", **_TEXT},
    "Roberta": {"model_type": "roberta", **_TEXT, "max_position_embeddings": 66},
    "Electra": {"model_type": "electra", **_TEXT, "embedding_size": 32},
    "DistilBert": {"model_type": "distilbert", **_DISTIL},
    "ViT": {"model_type": "vit", **_IMAGE},
    "DeiT": {"model_type": "deit", **_IMAGE},
    # As T5 v1.1 and Flan-T5 are.
    "T5": {"model_type": "t5", **_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}
# Key of a config's width -> its sizes when tiny.
_SIZES = {"hidden_size": _ENCODER, "dim": _DISTIL, "d_model": _T5}
_CLASSES = {
    ZERO_SHOT: "CLIPModel",
    "image-classification": "ViTForImageClassification",
    "text-classification": "BertForMaskedLM",
    SEQ2SEQ: "T5ForConditionalGeneration",
    "masked-lm": "BertForMaskedLM",
}
_PAIRS = (("sentence1", "sentence2"), ("question1", "question2"), ("premise", "hypothesis"), ("question", "sentence"))
_SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".json", ".txt")


def tiny(recipe: Recipe, data_dir: Path | None) -> Recipe:
    """The recipe with tiny models, few rows and few steps.

    Args:
        data_dir: folders of real images and texts; a data set that a task names and that is not there is replaced by
            the first one that fits.

    Raises:
        InputError: no data directory, nothing in it fits a task, or a class that has no tiny form here.
    """
    if data_dir is None or not data_dir.is_dir():
        raise InputError("a tiny run needs a data directory (--data-dir) with some images or texts")
    tasks = {name: _tiny_task(one, data_dir) for name, one in recipe.tasks.items()}
    few = recipe.model_copy(update={"tasks": tasks})
    models = {name: _tiny_model(few, name, one, data_dir) for name, one in recipe.models.items()}
    sections = {name: _tiny_section(spec) for name in SECTIONS if (spec := recipe.section(name)) is not None}
    limits = Limits().capped(ROWS)
    return few.model_copy(update={"models": models, "seeds": recipe.seeds[:1], "limit": limits, **sections})


def _tiny_task(task: TaskSpec, data_dir: Path) -> TaskSpec:
    data = _data_at_hand(task, data_dir)
    changes: dict[str, Any] = {"data": data, "batch_size": 8, "max_length": min(task.max_length, 32)}
    if task.targets and len(task.targets) != len(class_names(data, data_dir)):
        changes["targets"] = None  # what stands in has other classes
    return task.model_copy(update=changes)


def _tiny_section(spec: BaseModel) -> BaseModel:
    if isinstance(spec, InterpolationSpec):
        return spec.model_copy(update={"points": 3})
    assert isinstance(spec, CarriedSpec)
    changes: dict[str, Any] = {"methods": [_few_inputs(one) for one in spec.methods]}
    if isinstance(spec, TransportSpec):
        changes["alphas"] = sorted(spec.alphas)[-2:]
    if isinstance(spec, FewShotSpec):
        changes |= {"shots": [1], "steps": STEPS, "tune_steps": STEPS}
    return spec.model_copy(update=changes)


def _few_inputs(method: MethodSpec) -> MethodSpec:
    changes: dict[str, Any] = {
        key: one.model_copy(update={"count": min(one.count, ROWS)})
        for key, one in (("inputs", method.wanted_inputs), ("keep", method.keep))
        if one is not None
    }
    options = {**method.options, **({"polish": STEPS} if method.options.get("polish") else {})}
    if method.row is not None and "train_steps" in method.row.update.takes:
        options["train_steps"] = STEPS
    changes["options"] = options
    return method.model_copy(update=changes)


# --- models -------------------------------------------------------------------------------------------------------


def _tiny_model(recipe: Recipe, name: str, spec: ModelSpec, data_dir: Path) -> ModelSpec:
    if spec.location is None:
        return _smaller(_few_steps(recipe, spec, data_dir))
    tuned = _tuned_from(recipe, name)
    if tuned is not None:
        source, task = tuned
        return ModelSpec(base=source, train=TrainSpec(task=recipe.tasks[task], steps=STEPS, batch_size=8))
    seed = zlib.crc32(name.encode()) % 1000  # source and target are different models
    if spec.convert is not None:
        # As on the hub, the tokenizer lies beside the weights.
        init = InitSpec(config=_OPEN_CLIP, seed=seed, std=0.1, tokenizer=_tokenizer(recipe))
        return ModelSpec(init=init, convert=spec.convert.model_copy(update={"tokenizer": None}))
    kind = spec.architecture or _CLASSES.get(_first_task(recipe, name).kind)
    start = next((one for one in sorted(_CONFIGS, key=len, reverse=True) if (kind or "").startswith(one)), None)
    if kind is None or start is None:
        known = ", ".join(sorted(_CONFIGS))
        raise InputError(f"models.{name}: no tiny form of {kind or 'this class'}; there are those of {known}")
    return ModelSpec(
        init=InitSpec(
            config={**_CONFIGS[start], "architectures": [kind]},
            seed=seed,
            std=0.1,
            tokenizer=_tokenizer(recipe) if start != "ViT" else None,
            image_size=32 if start in ("CLIP", "ViT", "DeiT") else None,
        )
    )


def _smaller(spec: ModelSpec) -> ModelSpec:
    """Random models of a recipe's own, with sizes no larger than those of the tiny ones."""
    if spec.init is None:
        return spec
    return spec.model_copy(update={"init": spec.init.model_copy(update={"config": _shrunk(spec.init.config)})})


def _shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """Widths, depth and heads go together: where the width is small already, all stay."""
    width = next((one for one in _SIZES if one in config), "hidden_size")
    sizes = _SIZES[width] if config.get(width, 0) > _SIZES[width][width] else {}
    return {
        key: _shrunk(value) if isinstance(value, Mapping) else sizes.get(key, value) for key, value in config.items()
    }


def _few_steps(recipe: Recipe, spec: ModelSpec, data_dir: Path) -> ModelSpec:
    if spec.train is None:
        return spec
    task = _tiny_task(spec.train.task, data_dir)
    changes: dict[str, Any] = {"task": task, "steps": STEPS, "epochs": None, "batch_size": 8}
    if (keep := spec.train.keep) is not None:
        kept = _tiny_task(keep.task, data_dir) if isinstance(keep.task, TaskSpec) else keep.task
        changes["keep"] = keep.model_copy(update={"task": kept, "count": min(keep.count, ROWS)})
    return spec.model_copy(update={"train": spec.train.model_copy(update=changes)})


def _tuned_from(recipe: Recipe, name: str) -> tuple[str, str] | None:
    """(source, task) of a model that is somewhere a fine-tune."""
    for spec in (recipe.transport, recipe.worth, recipe.alpha, recipe.fewshot):
        for task, one in spec.tasks.items() if spec else ():
            if one.tuned == name:
                return spec.source if spec else "", task
    return None


def _first_task(recipe: Recipe, name: str) -> TaskSpec:
    """A task that a base is used for."""
    for spec in (recipe.transport, recipe.worth, recipe.alpha, recipe.fewshot):
        if spec and name in (spec.source, *spec.targets.values()):
            return recipe.tasks[next(iter(spec.tasks))]
    line = recipe.interpolation
    return recipe.tasks[line.task] if line else next(iter(recipe.tasks.values()))


def _tokenizer(recipe: Recipe) -> TokenizerSpec:
    """One for all models, so that their vocabularies agree."""
    texts = [template.format("") for task in recipe.tasks.values() for template in task.templates]
    texts += [target for task in recipe.tasks.values() for target in task.targets or ()]
    data = [task.data for task in recipe.tasks.values() if "image" not in task.kind]
    alphabet = " ".join("abcdefghijklmnopqrstuvwxyz0123456789")
    return TokenizerSpec(vocab_size=400, data=data, texts=[*dict.fromkeys(texts), alphabet])


# --- data ---------------------------------------------------------------------------------------------------------


def _data_at_hand(task: TaskSpec, data_dir: Path) -> DataSpec:
    """The task's own data if they are there, maybe with other names of splits; else the first that fit."""
    if (place := data_place(task.data, data_dir)) is not None:
        own = [task.data, *([_with_splits(task.data, place)] if place.is_dir() else [])]
        for spec in own:
            if spec is not None and _fits(task, spec, data_dir):
                return spec
    for pairs in (task.data.text_pair, *_PAIRS, None) if task.data.text_pair else (None,):
        for folder in sorted(one for one in data_dir.iterdir() if one.is_dir()):
            stand_in = DataSpec(path=str(folder), transform=task.data.transform, text_pair=pairs)
            spec = _with_splits(stand_in, folder)
            if spec is not None and _fits(task, spec, data_dir):
                return spec
    wanted = "images by class" if "image" in task.kind else "texts" if task.kind in LANGUAGE else "texts with labels"
    raise InputError(f"nothing in {data_dir} can stand in for {task.data.path}: a folder of {wanted} is needed")


def _with_splits(spec: DataSpec, folder: Path) -> DataSpec | None:
    """A data set whose splits are those that a folder has; None where it has none."""
    stems = [one.stem for one in sorted(folder.iterdir()) if one.suffix in _SUFFIXES or one.is_dir()]
    train = _pick(stems, ("train", "valid", ""))
    test = _pick([one for one in stems if one != train] or stems, ("test", "dev", "valid", ""))
    if train is None:
        return None
    splits = {"train": train, "test": test, "validation": None, "validation_from": None, "validation_share": 0.2}
    return spec.model_copy(update={"path": str(folder), "local": None, "name": None, **splits})


def _pick(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    names = list(names)
    return next((name for part in wanted for name in names if part in name), None)


def _fits(task: TaskSpec, spec: DataSpec, data_dir: Path) -> bool:
    needed = {"image" if "image" in task.kind else "text", *(() if task.kind in LANGUAGE else ("label",))}
    try:
        splits: tuple[Split, ...] = ("train", "test") if spec.train else ("validation", "test")
        return all(needed <= set(load_split(spec, split, data_dir=data_dir, limit=1).column_names) for split in splits)
    except InputError:
        return False
