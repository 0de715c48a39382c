"""Source, tuned and target seen through one layout: their tensors under the names of the family's table."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from ..errors import InputError
from ..families.binding import bind, canonical_names, is_complete
from ..families.registry import FAMILIES, find_family
from ..families.table import Family
from ..files.checkpoint import Checkpoint
from ..files.configs import complete_config
from ..files.opening import open_checkpoint
from ..files.vocabulary import check_vocabularies, read_vocabulary
from ..spaces.layout import Layout, unmoved_layout
from .conform import conformed
from .model import ConfigLike, Model, ModelLike, Models, _is_head, _is_of, _towers
from .resizing import Unlike, resizing_of

log = logging.getLogger(__name__)


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
        source, target, tuned: directory, file, hub id, state dict, module or open checkpoint.
        family: name of the layout family; read from the config if not given.
        config: added to every model's config (a dict, JSON text or a file).
        need_layout: whether it is an error that there is none; None: only if the family is known.

    Raises:
        InputError: something cannot be read, or the models do not belong together.
    """
    given = {"source": source, "target": target, "tuned": tuned}
    opened = {role: _open(role, one, config) for role, one in given.items() if one is not None or role != "tuned"}
    found = _common_family(opened, family, bool(need_layout))
    vocabularies = {role: read_vocabulary(one.location, one.companions) for role, one in opened.items()}
    # Of a known family rows of target's vocabulary are found by token; of another nobody knows which rows those are.
    compared = [role for role in opened if role == "tuned" or (role == "target" and found is None)]
    check_vocabularies(vocabularies["source"], {role: vocabularies[role] for role in compared})
    models, notes = _named(opened, found), list[str]()
    if found is not None:
        _check_widths(found, {role: one for role, one in models.items() if role != "target"})
        models, notes = conformed(found, models, vocabularies)
    try:
        return replace(_of_one_shape(found, models), notes=tuple(notes))
    except Unlike as error:
        if found is None:
            raise InputError(str(error)) from error
        return replace(_resized(found, models, str(error)), notes=tuple(notes))
    except InputError as error:
        if need_layout or family is not None or (need_layout is None and found is not None):
            raise
        log.warning("no layout, so nothing can be moved: %s", error)
        layout = unmoved_layout(name for model in models.values() for name in model.floats())
        _check_widths(None, models)
        result = Models(None, layout, models["source"], models["target"], models.get("tuned"))
        _check_presence(result)
        return result


def _of_one_shape(family: Family | None, models: Mapping[str, Model]) -> Models:
    """The models under one layout.

    Raises:
        Unlike: source and target are of different shapes.
        InputError: they do not belong together.
    """
    _check_widths(family, models)
    result = Models(family, _bind(family, models), models["source"], models["target"], models.get("tuned"))
    _check_presence(result)
    return result


def _resized(family: Family, models: Mapping[str, Model], why: str) -> Models:
    """The models where source is of another width or depth than target."""
    source, target, tuned = models["source"], models["target"], models.get("tuned")
    pair = {role: one for role, one in models.items() if role != "target"}
    old = _bind(family, pair)
    _check_presence(Models(family, old, source, source, tuned))
    heads = () if tuned is None else [name for name in tuned.floats() if _is_head(family, name)]
    own = {name: target.shape(name) for name in target.floats()}
    owners = _head_owners(family, [one for one in (tuned, source, target) if one is not None])
    architectures = [a for one in owners for a in one.checkpoint.config.get("architectures") or ()]
    config = {**_full_config(family, target), "architectures": architectures}
    towers = _towers(family, target)

    def bound(shapes: Mapping[str, tuple[int, ...]]) -> Layout:
        mine = {name: shape for name, shape in shapes.items() if _is_of(family, name, towers)}
        try:
            return bind(family, mine, config, {*own, *heads})
        except InputError as error:
            raise InputError(f"target {target.checkpoint.location}: {error}") from error

    # Heads that come along take widths of target's, which its own tensors say first.
    resizing = resizing_of(family, bound(own), old, why)
    carried = {name: resizing.shape_in_target(name, tuned.shape(name)) for name in heads if name not in own and tuned}
    layout = bound({**own, **carried})
    return Models(family, layout, source, target, tuned, resizing_of(family, layout, old, why))


def _open(role: str, model: Any, config: ConfigLike) -> Checkpoint:
    """Opens a model; what the caller says may complete the model's own config but not contradict it."""
    plain = open_checkpoint(model, role=role)
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
    try:
        return bind(family, mine, {**_full_config(family, model), "architectures": architectures}, owned)
    except InputError as error:
        raise InputError(f"{model.role} {model.checkpoint.location}: {error}") from error


def _full_config(family: Family, model: Model) -> Mapping[str, Any]:
    config = model.checkpoint.config
    return config if is_complete(family, config) else complete_config(config)


def _check_depths(family: Family, order: Sequence[Model]) -> None:
    first = _depths(family, order[0])
    for model in order[1:]:
        for tower, depth in _depths(family, model).items():
            if first.get(tower, depth) != depth:
                where = f" in the {tower.rstrip('.')} tower" if tower else ""
                raise _unlike(model)(
                    f"the number of layers differs{where}: {first[tower]} in {order[0].role} "
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


def _unlike(other: Model) -> type[InputError]:
    """The error when a model is of another shape: of target it may be dealt with, of a fine-tune it may not."""
    return Unlike if other.role == "target" else InputError


def _check_facts(one: Model, first: Layout, other: Model, second: Layout) -> None:
    for tower, facts in first.facts.items():
        if tower not in second.facts:
            continue
        for key, value in facts.items():
            if None not in (value, second.facts[tower][key]) and second.facts[tower][key] != value:
                raise (InputError if key == "norm" else _unlike(other))(
                    f"{key} differ{' in the ' + tower + ' tower' if tower else ''}: {value} in {one.role} "
                    f"({one.checkpoint.location}), {second.facts[tower][key]} in {other.role} "
                    f"({other.checkpoint.location}); maps between them would not keep the function"
                )


def _check_widths(family: Family | None, models: Mapping[str, Model]) -> None:
    """Whether all tensors but heads have one shape."""
    source = models["source"]
    for other in (models[role] for role in ("tuned", "target") if role in models):
        for name in _union(source.floats(), other.floats()):
            if name not in source or name not in other or source.shape(name) == other.shape(name):
                continue
            if family is None or not _is_head(family, name) or name.endswith("_projection.weight"):
                raise _unlike(other)(
                    f"tensor {name!r} is {source.shape(name)} in source ({source.checkpoint.location}) and "
                    f"{other.shape(name)} in {other.role} ({other.checkpoint.location}): "
                    "another size of the model"
                )


def _check_presence(models: Models) -> None:
    """Whether nothing but heads is in one model only."""
    one = models.source
    for other in (model for model in (models.target, models.tuned) if model is not None):
        for name in _union(one.floats(), other.floats()):
            if (name in one) == (name in other):
                continue
            if models.is_head(name) or (models.family and name in models.family.tied):
                continue
            has, lacks = (one, other) if name in one else (other, one)
            if models.lacks_tower(lacks, name):
                continue
            raise InputError(
                f"tensor {name!r} is in {has.role} ({has.checkpoint.location}) but not in {lacks.role} "
                f"({lacks.checkpoint.location}): another depth or variant of the model, or an incomplete checkpoint"
            )


def _union(first: Iterable[str], second: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*first, *second]))
