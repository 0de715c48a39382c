"""What happens to each tensor of a port: added to, carried over, copied or dropped, and where it is written."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from ..files.checkpoint import Checkpoint
from ..files.writing import plan_like
from ..spaces.layout import Layout
from .model import Model, Models

# What a carried head needs to be told about in the config.
HEAD_KEYS = (
    "architectures",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "classifier_dropout",
    "seq_classif_dropout",
    "tie_word_embeddings",
)


# Heads whose rows are tokens, and those whose rows are labels of a task.
LANGUAGE_HEAD = re.compile(r"(cls\.predictions|lm_head|generator_)")
LABEL_HEAD = re.compile(r"(classifier|cls_classifier|distillation_classifier|pre_classifier|score|head|head_dist)\.")


@dataclass(frozen=True)
class Step:
    """One tensor of the output.

    Attributes:
        name: canonical name.
        out: name in the output; "" when dropped.
        action: "add" (target + alpha * moved delta), "carry" (tuned's own, moved), "copy" (target's) or "drop".
    """

    name: str
    out: str
    action: str


@dataclass(frozen=True)
class Plan:
    """All steps, and the form of the output.

    Attributes:
        steps: one for each tensor of target or carried over.
        as_tuned: whether a head came along, so that the output takes tuned's architecture and names.
        dtype: of carried tensors: the commonest floating dtype of target.
    """

    steps: tuple[Step, ...]
    as_tuned: bool
    dtype: torch.dtype

    def count(self) -> dict[str, int]:
        """Number of tensors by action."""
        return dict(Counter(step.action for step in self.steps))

    def of(self, action: str) -> list[Step]:
        """The steps with one action."""
        return [step for step in self.steps if step.action == action]


def make_plan(models: Models) -> Plan:
    """Decides what happens to every tensor.

    Raises:
        InputError: there is no fine-tune, or nothing would be moved.
    """
    if models.tuned is None:
        raise InputError("tuned is given as NoneType, which is no model: give the fine-tune that is to be carried over")
    new_heads = _new_heads(models) if models.family else set()
    own = models.tuned.disk if models.resizing is None else filter(models.is_head, models.tuned.disk)
    actions = {name: _action(models, name, new_heads) for name in [*models.target.disk, *own]}
    as_tuned = "carry" in actions.values() and models.family is not None
    if as_tuned:
        actions = {n: "drop" if _is_left_behind(models, n) and a in ("copy", "add") else a for n, a in actions.items()}
    steps = tuple(Step(n, _out_name(models, n, as_tuned), a) for n, a in actions.items() if a != "skip")
    if not any(step.action in ("add", "carry") for step in steps):
        raise InputError(f"no tensor of {models.tuned.checkpoint.location} can be moved: there is nothing to port")
    floats = Counter(models.target.dtype(name) for name in models.target.floats())
    return Plan(steps, as_tuned, floats.most_common(1)[0][0])


def _new_heads(models: Models) -> set[str]:
    """Heads that all three models have but that mean something else in tuned: other labels, or trained from scratch.

    Target's head plus the difference would be the sum of two unrelated heads, so tuned's own is carried instead.
    """
    source, tuned, target = models.source, models.tuned, models.target
    assert tuned is not None
    labels = [_raw_config(model.checkpoint)[1].get("id2label") for model in (tuned, source, target)]
    found = set()
    for name in tuned.floats():
        head = name.split(".")[0]
        if not LABEL_HEAD.match(name) or len(tuned.shape(name)) < 2 or name not in source or name not in target:
            continue
        if any(other != labels[0] for other in labels[1:]):
            found.add(head)
        elif tuned.shape(name) == source.shape(name):
            change = models.survey.changes.get(name)
            found |= {head} if change is not None and change.delta > change.base else set()
    return found


def _action(models: Models, name: str, new_heads: set[str]) -> str:
    source, tuned, target = models.source, models.tuned, models.target
    assert tuned is not None
    if name in target.disk and not target.dtype(name).is_floating_point:
        return "copy"
    if name not in target.disk and models.towers(tuned) - models.towers(target):
        return "skip"  # target is one tower of tuned's two: it stays what it is
    body = not models.is_head(name) or not LABEL_HEAD.match(name)  # a projection stays where it is
    if models.resizing is not None and name in target.disk and body:
        partner = models.source_name(name)
        if partner is not None and partner in source and partner in tuned:
            return "add"
        if not models.is_head(name):
            return "copy"
    if name not in tuned:
        return "copy"
    if name in tuned.disk and not tuned.dtype(name).is_floating_point:
        return "skip"
    if name in tuned.tied and name not in target.disk and tuned.tied[name] in tuned.disk:
        return "skip"  # it equals another tensor, which is written
    # A decoder of tuned's own meets embeddings only where they serve as one; a bare target has none to add to.
    meets = _has_head if name in tuned.disk and name not in tuned.tied else Model.__contains__
    three = (source, tuned, target)
    shapes = {model.shape(name) if meets(model, name) else None for model in three}
    if models.resizing is not None and None not in shapes:
        layouts = (models.source_layout, models.source_layout, models.layout)
        shapes = {_public_shape(layout, name, model.shape(name)) for layout, model in zip(layouts, three, strict=True)}
    return "add" if len(shapes) == 1 and name.split(".")[0] not in new_heads else "carry"


def _public_shape(layout: Layout, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The lengths of a head along the axes, or their parts, that are in no space: its labels."""
    dims = layout.params[name].dims
    if dims is None:
        return shape
    sizes = {space.name: space.size for space in layout.spaces.values()}
    split = (zip(axis.parts, axis.sizes(length, sizes), strict=True) for axis, length in zip(dims, shape, strict=True))
    return tuple(size for parts in split for part, size in parts if part.space is None)


def _has_head(model: Model, name: str) -> bool:
    """Whether a model has a tensor, or has it tied to another one in a head whose other tensors are there."""
    head = name.rsplit(".", 2)[0]
    return name in model.disk or (name in model and any(other.startswith(f"{head}.") for other in model.disk))


def _is_left_behind(models: Models, name: str) -> bool:
    """A head of target that tuned's architecture has no place for."""
    assert models.tuned is not None
    return not _has_head(models.tuned, name) and (models.is_head(name) or models.lacks_tower(models.tuned, name))


def _out_name(models: Models, name: str, as_tuned: bool) -> str:
    assert models.tuned is not None
    first, second = (models.tuned, models.target) if as_tuned else (models.target, models.tuned)
    return first.disk.get(name) or _as_other_layer(first, name) or second.disk[name]


def _as_other_layer(model: Model, name: str) -> str | None:
    """The name that a tensor of a layer would have in a model that is not so deep, after that of another layer."""
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        return None
    first = f"{name[: found.start()]}.0.{name[found.end() :]}"
    if first not in model.disk:
        return None
    return re.sub(r"\.0\.", f".{found[1]}.", model.disk[first], count=1)


def output_files(plan: Plan, target: Model) -> dict[str, list[str]]:
    """Weight file -> names of the tensors in it, following target's shards."""
    by_name = {step.name: step for step in plan.steps}
    names = {}
    for name, on_disk in target.disk.items():
        step = by_name.get(name)
        names[on_disk] = None if step is None or step.action == "drop" else step.out
    extra = [step.out for step in plan.steps if step.name not in target.disk and step.action != "drop"]
    return plan_like(target.checkpoint, names, extra)


def output_config(plan: Plan, models: Models) -> tuple[str, dict[str, Any]]:
    """(file name, content) of the output's config: target's own, with tuned's head when one was carried."""
    assert models.tuned is not None
    file, config = _raw_config(models.target.checkpoint)
    if plan.as_tuned:
        _, tuned = _raw_config(models.tuned.checkpoint)
        if config.get("model_type") != tuned.get("model_type"):
            config = _as_tower(config, tuned)
        config = {k: v for k, v in config.items() if k not in HEAD_KEYS} | {
            k: tuned[k] for k in HEAD_KEYS if k in tuned
        }
    untied = models.tuned.checkpoint.config.get("tie_word_embeddings") is False
    if untied and models.family and any(step.name in models.family.tied for step in plan.steps):
        config["tie_word_embeddings"] = False  # a decoder of its own is written
    return file, config


def _as_tower(target: dict[str, Any], tuned: dict[str, Any]) -> dict[str, Any]:
    """A config of tuned's kind, where one of them is a tower of the other ("clip_text_model" in "clip").

    Tuned's with target's own in the place of the tower that target is; or target's own for the tower that tuned is.
    """
    if (key := _tower_key(tuned, target)) is not None:
        own = {k: v for k, v in target.items() if k not in HEAD_KEYS}
        return tuned | {key: {**tuned[key], **own}}
    if (key := _tower_key(target, tuned)) is not None:
        public = {"projection_dim": tuned["projection_dim"]} if "projection_dim" in tuned else {}
        return {**target[key], **public, "model_type": tuned["model_type"]}
    return target


def _tower_key(whole: Mapping[str, Any], part: Mapping[str, Any]) -> str | None:
    """Where the config of a model of two towers holds that of one of them."""
    kind = str(part.get("model_type"))
    return next((k for k in ("text_config", "vision_config") if k in whole and k.removesuffix("_config") in kind), None)


def _raw_config(checkpoint: Checkpoint) -> tuple[str, dict[str, Any]]:
    """The config as on disk, without what the caller added for this run."""
    file = "open_clip_config.json" if checkpoint.kind == "open_clip" else "config.json"
    path = checkpoint.companions / file if checkpoint.companions else None
    if path is not None and path.exists():
        return file, json.loads(path.read_text(encoding="utf-8"))
    return file, {key: value for key, value in checkpoint.config.items() if key not in ("axes", "prefix")}


def written_steps(plan: Plan) -> Mapping[str, Step]:
    """Output name -> step, for everything that is written."""
    return {step.out: step for step in plan.steps if step.action != "drop"}
