"""Recipes: one YAML file that describes the models, tasks, methods and measurements of a table or figure.

    recipe = load_recipe("table1-clip-vitb16")   # shipped, or the path of a file

What a file may hold is what `spec`, `parts` and `sections` say; a wrong key is an error that names the file, the key
and the keys there are. With `like: other-recipe` a file also has the tasks and models of another one, and its seeds,
limits and quick form where it gives none of its own; so several tables use the same trained models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml

from ...data.splits import BaseModel
from ...errors import InputError
from ...options.declare import near_or_known
from .parts import MethodSpec, ModelSpec, match_options
from .spec import Limits, Recipe

# After `data.splits`, which says how to install it.
from pydantic import ValidationError  # isort: skip


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(one.name.removesuffix(".yaml") for one in _shipped().iterdir() if one.name.endswith(".yaml"))


def _shipped() -> Any:
    return resources.files(__package__ or "transfuse.bench.recipes")


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        name: a file, or the name of a shipped recipe.
        overrides: "key.path=value" each, set before anything is checked; values are YAML.

    Raises:
        InputError: there is no such recipe, or it does not say what it should; the message names file and key.
    """
    where, content = _content_of(name, ())
    for one in overrides:
        _override(content, one, where)
    return parse_recipe(content, where)


def parse_recipe(content: Mapping[str, Any], where: str = "recipe") -> Recipe:
    """A recipe from what a file holds.

    Raises:
        InputError: as `load_recipe`.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{where}: {'; '.join(_explained(one) for one in _told_apart(error))}") from error


def dump_recipe(recipe: Recipe) -> str:
    """A recipe as YAML that `load_recipe` reads; the same recipe gives the same text."""
    return yaml.safe_dump(plain(recipe), sort_keys=False, allow_unicode=True, width=120)


def plain(spec: BaseModel) -> dict[str, Any]:
    """A spec as plain JSON types, without what is not set; null only where it says something (`train: null`)."""
    return _with_nulls(spec, json.loads(spec.model_dump_json(exclude_none=True, by_alias=True)))


def stated(spec: BaseModel) -> dict[str, Any]:
    """What a spec says beyond its defaults, as plain JSON types: for cache keys, which new options must not change."""
    return json.loads(spec.model_dump_json(exclude_defaults=True, by_alias=True))


def _with_nulls(spec: Any, content: Any) -> Any:
    """The same with those nulls that leaving out would turn into a default."""
    if isinstance(spec, BaseModel):
        found = dict(content)
        for name, field in type(spec).model_fields.items():
            key, value = field.alias or name, getattr(spec, name)
            if value is not None:
                found[key] = _with_nulls(value, content[key])
            elif field.get_default(call_default_factory=True) is not None:
                found[key] = None
        return found
    if isinstance(spec, Mapping):
        return {str(key): _with_nulls(value, content[str(key)]) for key, value in spec.items() if value is not None}
    if isinstance(spec, list | tuple):
        return [_with_nulls(one, other) for one, other in zip(spec, content, strict=True)]
    return content


def quick(recipe: Recipe) -> Recipe:
    """The recipe with what its `quick` changes.

    Raises:
        InputError: it says nothing about a quick run.
    """
    how = recipe.quick
    if how is None:
        raise InputError(f"recipe {recipe.name}: it has no key 'quick' that says what a quick run changes")
    models = {name: _scaled(one, how.train_scale) for name, one in recipe.models.items()}
    limit = recipe.limit
    if how.limit is not None:
        limit = Limits(**{**dict(limit), **{k: v for k, v in dict(how.limit).items() if v is not None}})
    return recipe.model_copy(update={"seeds": how.seeds or recipe.seeds, "limit": limit, "models": models})


def _scaled(model: ModelSpec, scale: float) -> ModelSpec:
    if model.train is None:
        return model
    steps, epochs = model.train.steps, model.train.epochs
    changes = {
        "steps": None if steps is None else max(1, round(steps * scale)),
        "epochs": None if epochs is None else epochs * scale,
    }
    return model.model_copy(update={"train": model.train.model_copy(update=changes)})


def _content_of(name: str | Path, before: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """(where, content) of a recipe, with what it takes from the one it is like."""
    where, text = _text_of(name)
    if where in before:
        raise InputError(f"{where}: like: {' -> '.join((*before, where))} leads in a circle")
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}: a recipe is a mapping of keys (name, title, tasks, models, ...)")
    content = json.loads(json.dumps(content, default=str))  # what YAML anchors share is set apart, for overrides
    like = content.pop("like", None)
    if like is None:
        return where, content
    if not isinstance(like, str):
        raise InputError(f"{where}: like: the name of another recipe is needed")
    beside = Path(name).expanduser().parent / like
    _, other = _content_of(beside if beside.is_file() else like, (*before, where))
    taken = {key: other[key] for key in ("seeds", "limit", "quick") if key in other}
    shared = {key: {**_mapping(other, key), **_mapping(content, key)} for key in ("tasks", "models")}
    return where, {**taken, **content, **shared}


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of a recipe; what is no mapping is reported with everything else."""
    return content[key] if isinstance(content.get(key), dict) else {}


def _text_of(name: str | Path) -> tuple[str, str]:
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return str(name), path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{name}: the recipe cannot be read: {getattr(error, 'strerror', None) or error}"
            ) from error
    known = shipped_recipes()
    if str(name) not in known:
        said = near_or_known(str(name), known)
        raise InputError(f"no recipe {str(name)!r}: no such file, and none of that name is shipped; {said}")
    return f"{name}.yaml", (_shipped() / f"{name}.yaml").read_text(encoding="utf-8")


class _Loader(yaml.SafeLoader):
    """Plain YAML that refuses a key given twice, which otherwise drops the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _override(content: dict[str, Any], given: str, where: str) -> None:
    path, sign, text = given.partition("=")
    if not sign or not path:
        raise InputError(f"override {given!r}: key.path=value is needed, e.g. transport.null_trials=0")
    *before, last = path.split(".")
    place: Any = content
    for key in before:
        place = _step(place, key, given, where)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {given!r}: the value is not valid YAML") from error
    if isinstance(place, list):
        _step(place, last, given, where)
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise InputError(f"override {given!r}: in {where}, {'.'.join(before)} is no mapping and no list")


def _step(place: Any, key: str, given: str, where: str) -> Any:
    if isinstance(place, dict):
        if not isinstance(place.get(key), dict | list):
            place[key] = {}  # whether the key may be there is checked with everything else
        return place[key]
    if isinstance(place, list) and key.isdigit() and int(key) < len(place):
        return place[int(key)]
    raise InputError(f"override {given!r}: there is no {key!r} in that place of {where}")


# --- errors -------------------------------------------------------------------------------------------------------


def _told_apart(error: ValidationError) -> list[Any]:
    """The errors, of those in one place the first only, so that one slip is one message."""
    found = {tuple(map(str, one["loc"])): one for one in reversed(error.errors())}
    return list(reversed(found.values()))


def _explained(error: Mapping[str, Any]) -> str:
    place = [str(one) for one in error["loc"]]
    said = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        said = f"there is no such key; allowed: {', '.join(_keys_at(place[:-1])) or 'none'}"
    elif error["type"] == "missing":
        said = "this key is needed"
    return f"{'.'.join(place)}: {said}" if place else said


def _keys_at(path: Sequence[str]) -> list[str]:
    """Keys that a recipe may have at a place, found by walking the classes."""
    spec: Any = Recipe
    for key in path:
        spec = _inside(spec, key)
    if not (isinstance(spec, type) and issubclass(spec, BaseModel)):
        return []
    names = [*(["like"] if spec is Recipe else []), *(one.alias or key for key, one in spec.model_fields.items())]
    return [*names, *(match_options() if spec is MethodSpec else [])]


def _inside(spec: Any, key: str) -> Any:
    """The type behind a key: of a field, or of the values of a mapping or list."""
    if isinstance(spec, type) and issubclass(spec, BaseModel):
        field = spec.model_fields.get(key)
        return _without_none(field.annotation) if field else None
    inner = get_args(spec)
    return _without_none(inner[-1]) if get_origin(spec) in (dict, list) and inner else None


def _without_none(annotation: Any) -> Any:
    """X of `X | None`."""
    choices = [one for one in get_args(annotation) if one is not type(None)]
    return choices[0] if type(None) in get_args(annotation) and len(choices) == 1 else annotation
