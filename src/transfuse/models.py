"""Source, tuned and target seen through one layout: their tensors under the names of the family's table."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoint import Checkpoint, open_checkpoint
from .errors import InputError
from .layout import Family, Layout, bind, canonical_names, unmoved_layout
from .layouts import FAMILIES, find_family

ModelLike = str | os.PathLike[str] | Mapping[str, Tensor] | Checkpoint
ConfigLike = Mapping[str, Any] | str | os.PathLike[str] | None


@dataclass(frozen=True)
class Model:
    """A checkpoint under canonical names.

    Attributes:
        role: "source", "tuned" or "target", for messages.
        checkpoint: the files behind it.
        disk: canonical name -> name on disk.
        tied: canonical names of tensors that equal another one and may be left out on disk.
    """

    role: str
    checkpoint: Checkpoint
    disk: Mapping[str, str]
    tied: Mapping[str, str]

    def tensor(self, name: str) -> Tensor:
        """The tensor of that canonical name, read from disk; a tied one that is left out is its partner."""
        if name not in self.disk and self.tied.get(name) in self.disk:
            name = self.tied[name]
        return self.checkpoint.tensor(self.disk[name])

    def __contains__(self, name: str) -> bool:
        return name in self.disk or self.tied.get(name) in self.disk

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self.checkpoint.headers[self.disk.get(name) or self.disk[self.tied[name]]].shape

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor on disk."""
        return self.checkpoint.headers[self.disk.get(name) or self.disk[self.tied[name]]].dtype

    def floats(self) -> list[str]:
        """Canonical names of the floating-point tensors on disk; the others are buffers, never moved."""
        return [name for name in self.disk if self.dtype(name).is_floating_point]


@dataclass(frozen=True)
class Models:
    """The models of one run and the layout they share.

    Attributes:
        family: None when it is unknown (enough for methods that move nothing).
        layout: bound to all their tensors, streams not yet tied.
        source, target: the two bases.
        tuned: the fine-tune of source, if there is one.
    """

    family: Family | None
    layout: Layout
    source: Model
    target: Model
    tuned: Model | None = None

    def is_head(self, name: str) -> bool:
        """Whether a tensor may be in one of the models only: a head, a pooler, a projection."""
        return self.family is None or any(re.fullmatch(pattern, name) for pattern in self.family.optional)

    def lacks_tower(self, model: Model, name: str) -> bool:
        """Whether a model has nothing of the whole tower a tensor belongs to (CLIP's image tower alone, say)."""
        return self.family is not None and _tower_of(self.family, name) not in _towers(self.family, model)

    def shared(self) -> list[str]:
        """Floating-point tensors that both bases have in the same shape: the evidence."""
        both = [
            n for n in self.source.floats() if n in self.target.disk and self.source.shape(n) == self.target.shape(n)
        ]
        return [n for n in both if n not in self.source.tied or self.source.tied[n] not in self.source.disk]


def open_models(
    source: ModelLike,
    target: ModelLike,
    tuned: ModelLike | None = None,
    *,
    family: str | None = None,
    config: ConfigLike = None,
    need_layout: bool = True,
) -> Models:
    """Opens the models and holds them against one layout.

    Args:
        source, target, tuned: directory, file, hub id, state dict or open checkpoint.
        family: name of the layout family; read from the config if not given.
        config: added to every model's config (a dict, JSON text or a file).
        need_layout: whether an unknown family is an error.

    Raises:
        InputError: something cannot be read, or the models do not belong together.
    """
    given = {"source": source, "target": target, "tuned": tuned}
    opened = {role: open_checkpoint(one, config=config) for role, one in given.items() if one is not None}
    found = _common_family(opened, family, need_layout)
    models = {role: _named(role, checkpoint, found) for role, checkpoint in opened.items()}
    layout = _bind(found, models)
    result = Models(found, layout, models["source"], models["target"], models.get("tuned"))
    _check_shapes(result)
    return result


def _common_family(opened: Mapping[str, Checkpoint], name: str | None, need: bool) -> Family | None:
    found = {role: find_family(one.config, one.kind, name) for role, one in opened.items()}
    known = {role: family for role, family in found.items() if family is not None}
    if len({family.name for family in known.values()}) > 1:
        listed = ", ".join(f"{role} ({opened[role].location}) is {family.name}" for role, family in known.items())
        raise InputError(f"the models are of different architectures: {listed}")
    missing = [role for role in opened if role not in known]
    if missing and (need or known):
        role = missing[0]
        what = (
            opened[role].config.get("model_type")
            or opened[role].config.get("architecture")
            or "no model_type in its config"
        )
        raise InputError(
            f"{role} {opened[role].location}: no layout is known for it ({what}). Known families: "
            f"{', '.join(FAMILIES)}; name one with --family and --config, or use --method naive, which needs none."
        )
    return next(iter(known.values()), None)


def _named(role: str, checkpoint: Checkpoint, family: Family | None) -> Model:
    if family is None:
        return Model(role, checkpoint, {name: name for name in checkpoint.headers}, {})
    names = canonical_names(family, checkpoint.headers, checkpoint.config)
    disk: dict[str, str] = {}
    for on_disk, name in names.items():
        if name in disk:
            raise InputError(f"{checkpoint.location}: tensors {disk[name]!r} and {on_disk!r} are both {name!r}")
        disk[name] = on_disk
    untied = checkpoint.config.get("tie_word_embeddings") is False
    return Model(role, checkpoint, disk, {} if untied else family.tied)


def _bind(family: Family | None, models: Mapping[str, Model]) -> Layout:
    order = [models[role] for role in ("tuned", "source", "target") if role in models]
    shapes = {name: model.shape(name) for model in reversed(order) for name in model.floats()}
    if family is None:
        return unmoved_layout(shapes)
    heads_from = [models["tuned"]] if "tuned" in models else order
    architectures = [a for model in heads_from for a in model.checkpoint.config.get("architectures") or ()]
    layouts = [_bind_one(family, model, shapes, architectures) for model in order]
    for model, layout in zip(order[1:], layouts[1:], strict=True):
        _check_facts(order[0], layouts[0], model, layout)
    return max(layouts, key=lambda layout: len(layout.facts))


def _bind_one(family: Family, model: Model, shapes: Mapping[str, tuple[int, ...]], architectures: list[str]) -> Layout:
    """The layout as one model's config has it, over the tensors of all models in the towers this one has."""
    towers = _towers(family, model)
    mine = {name: shape for name, shape in shapes.items() if _tower_of(family, name) in (*towers, None)}
    try:
        return bind(family, mine, {**model.checkpoint.config, "architectures": architectures})
    except InputError as error:
        raise InputError(f"{model.role} {model.checkpoint.location}: {error}") from error


def _tower_of(family: Family, name: str) -> str | None:
    """The tower a layer's tensor belongs to; None for a tensor outside the layers, or unknown."""
    found = next((row for row in family.rows if row.pattern.fullmatch(name)), None)
    return found.tower.name if found else None


def _towers(family: Family, model: Model) -> set[str | None]:
    layers = (row for row in family.rows if "l" in row.pattern.groupindex)
    return {row.tower.name for row in layers if any(row.pattern.fullmatch(name) for name in model.disk)}


def _check_facts(one: Model, first: Layout, other: Model, second: Layout) -> None:
    for tower, facts in first.facts.items():
        if tower not in second.facts:
            continue
        for key, value in facts.items():
            if second.facts.get(tower, {}).get(key) != value:
                raise InputError(
                    f"{key} differ{' in the ' + tower + ' tower' if tower else ''}: {value} in {one.role} "
                    f"({one.checkpoint.location}), {second.facts.get(tower, {}).get(key)} in {other.role} "
                    f"({other.checkpoint.location}); maps between them would not keep the function"
                )


def _check_shapes(models: Models) -> None:
    pairs: list[tuple[Model, Model]] = [(models.source, models.target)]
    if models.tuned is not None:
        pairs.append((models.source, models.tuned))
    for one, other in pairs:
        for name in _union(one.floats(), other.floats()):
            _check_shape(models, one, other, name)


def _check_shape(models: Models, one: Model, other: Model, name: str) -> None:
    if name in one and name in other:
        if one.shape(name) != other.shape(name) and not (models.family and models.is_head(name)):
            raise InputError(
                f"tensor {name!r} is {one.shape(name)} in {one.role} ({one.checkpoint.location}) and "
                f"{other.shape(name)} in {other.role} ({other.checkpoint.location}): "
                "another size of the model, or a resized vocabulary"
            )
    elif not (models.is_head(name) or (models.family and name in models.family.tied)):
        has, lacks = (one, other) if name in one else (other, one)
        if models.lacks_tower(lacks, name):
            return
        raise InputError(
            f"tensor {name!r} is in {has.role} ({has.checkpoint.location}) but not in {lacks.role} "
            f"({lacks.checkpoint.location}): another depth or variant of the model, or an incomplete checkpoint"
        )


def _union(first: Iterable[str], second: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*first, *second]))
