"""Source, tuned and target seen through one layout: their tensors under the names of the family's table."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .binding import bind, canonical_names, is_complete
from .checkpoint import Checkpoint, open_checkpoint
from .errors import InputError
from .layout import Family, Layout, unmoved_layout
from .layouts import FAMILIES, find_family
from .modelling import complete_config
from .vocabulary import check_vocabularies

log = logging.getLogger(__name__)

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
        if self.family is None:  # nothing is known but that a fine-tune may have a head of its own
            return name not in self.source and name not in self.target
        return any(re.fullmatch(pattern, name) for pattern in self.family.optional)

    def all(self) -> list[Model]:
        """The models there are, in the order of the command line."""
        return [model for model in (self.source, self.tuned, self.target) if model is not None]

    def towers(self, model: Model) -> set[str | None]:
        """Names of the towers (with their dot) that a model has."""
        return set() if self.family is None else _towers(self.family, model)

    def lacks_tower(self, model: Model, name: str) -> bool:
        """Whether a model has nothing of the whole tower a tensor belongs to (CLIP's image tower alone, say)."""
        return self.family is not None and not _is_of(self.family, name, _towers(self.family, model))

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
    need_layout: bool | None = True,
) -> Models:
    """Opens the models and holds them against one layout.

    Args:
        source, target, tuned: directory, file, hub id, state dict or open checkpoint.
        family: name of the layout family; read from the config if not given.
        config: added to every model's config (a dict, JSON text or a file).
        need_layout: whether it is an error that there is none; None: only if the family is known.

    Raises:
        InputError: something cannot be read, or the models do not belong together.
    """
    given = {"source": source, "target": target, "tuned": tuned}
    opened = {role: _open(one, config) for role, one in given.items() if one is not None}
    found = _common_family(opened, family, bool(need_layout))
    models = _named(opened, found)
    try:
        layout = _bind(found, models)
    except InputError as error:
        if need_layout or family is not None or (need_layout is None and found is not None):
            raise
        log.warning("no layout, so nothing can be moved: %s", error)
        found, layout = None, unmoved_layout(name for model in models.values() for name in model.floats())
    result = Models(found, layout, models["source"], models["target"], models.get("tuned"))
    check_vocabularies({role: one.companions for role, one in opened.items()})
    _check_shapes(result)
    return result


def _open(model: ModelLike, config: ConfigLike) -> Checkpoint:
    """Opens a model; what the caller says may complete a config on disk but not contradict it."""
    plain = open_checkpoint(model)
    merged = open_checkpoint(plain, config=config)
    for key, value in plain.config.items():
        if merged.config[key] != value and key not in ("architectures", "axes", "prefix"):
            raise InputError(
                f"{plain.location}: its config says {key} = {json.dumps(value)}, the given one "
                f"{json.dumps(merged.config[key])}; a config can be completed but not contradicted"
            )
    _check_config(merged)
    return merged


def _check_config(checkpoint: Checkpoint) -> None:
    """Refuses values that the code would trip over."""
    kinds = {"model_type": str, "architectures": list, "axes": Mapping, "prefix": str, "architecture": str}
    kinds |= {key: Mapping for key in ("text_config", "vision_config", "model_cfg", "model_args")}
    for key, kind in kinds.items():
        value = checkpoint.config.get(key)
        if value is not None and not isinstance(value, kind):
            raise InputError(
                f"{checkpoint.location}: the config key {key!r} is {value!r}, which is not a {kind.__name__}"
            )


def _common_family(opened: Mapping[str, Checkpoint], name: str | None, need: bool) -> Family | None:
    found = {role: find_family(one.config, one.kind, name) for role, one in opened.items()}
    known = {role: family for role, family in found.items() if family is not None}
    if len({family.name for family in known.values()}) > 1:
        listed = ", ".join(f"{role} ({opened[role].location}) is {family.name}" for role, family in known.items())
        raise InputError(f"the models are of different architectures: {listed}")
    missing = [role for role in opened if role not in known]
    if missing and need:
        role = missing[0]
        config = opened[role].config
        what = config.get("model_type") or config.get("architecture") or "no model_type in its config"
        raise InputError(
            f"{role} {opened[role].location}: no layout is known for it ({what}). Known families: "
            f"{', '.join(FAMILIES)}; name one with --family and --config, or use --method naive, which needs none."
        )
    return next(iter(known.values()), None)


def _named(opened: Mapping[str, Checkpoint], family: Family | None) -> dict[str, Model]:
    if family is None:
        return _named_alike(opened)
    return {role: _named_by(family, role, checkpoint) for role, checkpoint in opened.items()}


def _named_by(family: Family, role: str, checkpoint: Checkpoint) -> Model:
    names = canonical_names(family, checkpoint.headers, checkpoint.config)
    disk: dict[str, str] = {}
    for on_disk, name in names.items():
        if name in disk:
            raise InputError(f"{checkpoint.location}: tensors {disk[name]!r} and {on_disk!r} are both {name!r}")
        disk[name] = on_disk
    # Of a T5 with a head of its own, newer configs say only that its outputs are not scaled.
    untied = False in (checkpoint.config.get(key) for key in ("tie_word_embeddings", "scale_decoder_outputs"))
    return Model(role, checkpoint, disk, {} if untied else family.tied)


def _named_alike(opened: Mapping[str, Checkpoint]) -> dict[str, Model]:
    """Models of an unknown family: a prefix most of a model's names have goes, where that makes names agree."""
    choices = [[(role, prefix) for prefix in _prefixes(one)] for role, one in opened.items()]

    def agreement(choice: Sequence[tuple[str, str]]) -> int:
        return len(set.intersection(*({n.removeprefix(p) for n in opened[role].headers} for role, p in choice)))

    best = max(product(*choices), key=agreement)  # the first of equals: no prefix removed
    return {
        role: Model(role, opened[role], {name.removeprefix(prefix): name for name in opened[role].headers}, {})
        for role, prefix in best
    }


def _prefixes(checkpoint: Checkpoint) -> list[str]:
    first = Counter(name.split(".")[0] + "." for name in checkpoint.headers if "." in name)
    return ["", *(prefix for prefix, count in first.items() if 2 * count > len(checkpoint.headers))]


def _bind(family: Family | None, models: Mapping[str, Model]) -> Layout:
    order = [models[role] for role in ("tuned", "source", "target") if role in models]
    shapes = {name: model.shape(name) for model in reversed(order) for name in model.floats()}
    if family is None:
        return unmoved_layout(shapes)
    _check_depths(family, order)
    layouts = [_bind_one(family, model, shapes, _head_owners(family, order)) for model in order]
    for model, layout in zip(order[1:], layouts[1:], strict=True):
        _check_facts(order[0], layouts[0], model, layout)
    return max(layouts, key=lambda layout: len(layout.facts))


def _head_owners(family: Family, order: Sequence[Model]) -> Sequence[Model]:
    """The models whose architecture says what the heads are: tuned, if it has any; else all."""
    first = order[0]
    heads = first.role == "tuned" and any(re.fullmatch(p, name) for p in family.optional for name in first.disk)
    return [first] if heads else order


def _bind_one(family: Family, model: Model, shapes: Mapping[str, tuple[int, ...]], owners: Sequence[Model]) -> Layout:
    """The layout as one model's config has it, over the tensors of all models in the towers this one has."""
    towers = _towers(family, model)
    mine = {name: shape for name, shape in shapes.items() if _is_of(family, name, towers)}
    architectures = [a for owner in owners for a in owner.checkpoint.config.get("architectures") or ()]
    owned = {name for owner in owners for name in owner.disk}
    config = model.checkpoint.config
    if not is_complete(family, config):
        config = complete_config(config)
    try:
        return bind(family, mine, {**config, "architectures": architectures}, owned)
    except InputError as error:
        raise InputError(f"{model.role} {model.checkpoint.location}: {error}") from error


def _is_of(family: Family, name: str, towers: Collection[str | None]) -> bool:
    """Whether a tensor belongs to one of some towers; a head can be one tower's or the other's, an unknown is all's."""
    found = {row.tower.name for row in family.rows if row.pattern.fullmatch(name)}
    return not found or not found.isdisjoint(towers)


def _towers(family: Family, model: Model) -> set[str | None]:
    layers = (row for row in family.rows if "l" in row.pattern.groupindex)
    return {row.tower.name for row in layers if any(row.pattern.fullmatch(name) for name in model.disk)}


def _check_depths(family: Family, order: Sequence[Model]) -> None:
    first = _depths(family, order[0])
    for model in order[1:]:
        for tower, depth in _depths(family, model).items():
            if first.get(tower, depth) != depth:
                raise InputError(
                    f"the number of layers differs{' in ' + tower if tower else ''}: {first[tower]} in {order[0].role} "
                    f"({order[0].checkpoint.location}), {depth} in {model.role} ({model.checkpoint.location})"
                )


def _depths(family: Family, model: Model) -> dict[str, int]:
    """How many layers a model has, by tower, from its own tensors."""
    found: dict[str, int] = {}
    for name in model.disk:
        for row in family.rows:
            layer = row.pattern.fullmatch(name) if "l" in row.pattern.groupindex else None
            if layer:
                found[row.tower.name] = max(found.get(row.tower.name, 0), int(layer["l"]) + 1)
    return found


def _check_facts(one: Model, first: Layout, other: Model, second: Layout) -> None:
    for tower, facts in first.facts.items():
        if tower not in second.facts:
            continue
        for key, value in facts.items():
            if None not in (value, second.facts[tower][key]) and second.facts[tower][key] != value:
                raise InputError(
                    f"{key} differ{' in the ' + tower + ' tower' if tower else ''}: {value} in {one.role} "
                    f"({one.checkpoint.location}), {second.facts[tower][key]} in {other.role} "
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
