"""Binding: a table held against the names and shapes of actual tensors and a config, which gives a `Layout`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..spaces.axes import Axes, AxisError, parse_axes
from ..spaces.layout import GROUPS, TOWERS, Layout, Space, forward_position, is_linear, tower_of
from .table import Family, Lookup, Row, Tower, with_tower


@dataclass(frozen=True)
class _Matched:
    """What a tensor's row says: axis text, whether it is the bias of that row, layer, tower, role."""

    text: str
    bias: bool
    layer: int | None
    tower: Tower
    role: str = ""


def canonical_names(family: Family, names: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """On-disk name -> the name the table uses (prefix and old spellings removed); unknown names stay as they are."""
    names = list(names)
    extra = family.model_types.get(str(config.get("model_type")), "")
    prefixes = [*family.prefixes, *_found_prefixes(family, names, config)]
    return {name: _canonical_name(family, name, extra, prefixes) for name in names}


def _found_prefixes(family: Family, names: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """The prefix of a bare stack: the caller's, else what stands before its anchor."""
    if not family.anchor:
        return []
    if "prefix" in config:
        return [str(config["prefix"])]
    found = [name.removesuffix(family.anchor) for name in names if name.endswith(family.anchor)]
    if len(found) > 1:
        raise InputError(f"{len(found)} stacks are in this checkpoint; say which with the config key 'prefix': {found}")
    return found


def _canonical_name(family: Family, name: str, extra: str, prefixes: Sequence[str]) -> str:
    plain = name
    for pattern, replacement in family.aliases:
        plain = re.sub(pattern, replacement, plain)
    stripped = [plain.removeprefix(p) for p in prefixes if p and plain.startswith(p)]
    for candidate in [extra + plain, plain, *stripped] if extra else [plain, *stripped]:
        if any(row.pattern.fullmatch(candidate) for row in family.rows):
            return candidate
    return plain


def is_complete(family: Family, config: Mapping[str, Any]) -> bool:
    """Whether a config says all that a family's towers look up in it."""
    return all(_look_up(config, keys) is not None for t in family.towers for keys in (t.heads, t.norm, t.activation))


def bind(
    family: Family,
    shapes: Mapping[str, Sequence[int]],
    config: Mapping[str, Any],
    owned: Iterable[str] | None = None,
) -> Layout:
    """Holds a family's table against tensors.

    Args:
        shapes: canonical name -> shape of every floating-point tensor.
        owned: names of the tensors of the model whose heads count, for the conditions; None for all.
        config: the model's config; head counts, norm and activation are read from it. Its key "axes" may add rows
            (tensor name -> axis expression) for tensors around a bare stack.

    Raises:
        InputError: a tensor without a row, a shape that does not fit, a head count that is missing or does not divide.
    """
    return _Binder(family, shapes, config, shapes if owned is None else owned).layout()


class _Binder:
    """The steps of `bind`, with what they share."""

    def __init__(
        self, family: Family, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any], owned: Iterable[str]
    ):
        self.family, self.config, self.owned = family, config, frozenset(owned)
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.architectures = " ".join(map(str, config.get("architectures") or ()))
        self.extra = {name: str(text) for name, text in (config.get("axes") or {}).items()}
        self.depths: dict[str, int] = {}
        self.ties: dict[str, str] = {}
        self.sizes: dict[str, int] = {}

    def layout(self) -> Layout:
        if unknown := sorted(self.extra.keys() - self.shapes.keys()):
            raise InputError(f"the config gives axes for {unknown[0]!r}, but there is no such tensor")
        matched = {name: self.match_row(name) for name in self.shapes}
        for found in matched.values():
            if found.layer is not None:
                self.depths[found.tower.name] = max(self.depths.get(found.tower.name, 0), found.layer + 1)
        self.check_depths({(found.tower.name, found.layer) for found in matched.values()})
        self.ties = self.found_ties()
        params = {name: self.axes(name, found) for name, found in matched.items()}
        facts = {tower.name.rstrip("."): self.facts(tower) for tower in self.family.towers if tower.name in self.depths}
        self.solve_sizes(params, facts)
        return Layout(
            family=self.family.name,
            params=params,
            spaces={name: self.space(name, facts) for name in sorted(self.sizes, key=forward_position)},
            outputs=self.outputs(),
            facts=facts,
            roles={name: found.role for name, found in matched.items() if found.role} | self.output_roles(),
            embeddings=self.embeddings(params),
            ties=self.ties,
        )

    def match_row(self, name: str) -> _Matched:
        """The row that `name` matches."""
        if name in self.extra:
            tower = self.family.towers[0]
            text, _, role = self.extra[name].partition(" as ")
            return _Matched(with_tower(text, tower.name), False, None, tower, role.strip())
        for row in self.family.rows:
            found = row.pattern.fullmatch(name)
            if found and self.holds(row):
                groups = found.groupdict()
                layer = int(groups["l"]) if groups.get("l") else None
                return _Matched(row.axes, groups.get("leaf") == "bias", layer, row.tower, row.role)
        raise InputError(
            f"tensor {name!r} {self.shapes[name]} is not in the layout of family {self.family.name!r}, so nobody can "
            "say how it moves. Likely causes: another architecture than the config says, a variant that is not "
            "supported, or a head whose architecture the config does not name. Name it "
            '({"architectures": ["BertForSequenceClassification"]}), or give the axes, e.g. {"axes": {"'
            + name
            + '": "_ <- stream.{last}"}} ("-" for a tensor that stays in place).'
        )

    def holds(self, row: Row) -> bool:
        if not row.condition:
            return True
        if row.condition.endswith("-norm"):
            return row.condition == f"{self.norm(row.tower)}-norm"
        return (row.condition in self.architectures or row.condition in self.owned) != row.negated

    def norm(self, tower: Tower) -> str:
        """ "pre" or "post"; torch says it by `norm_first`."""
        found = _look_up(self.config, tower.norm)
        return {True: "pre", False: "post"}.get(found, str(found))

    def check_depths(self, seen: set[tuple[str, int | None]]) -> None:
        for tower, depth in self.depths.items():
            missing = [layer for layer in range(depth) if (tower, layer) not in seen]
            if missing:
                raise InputError(
                    f"layer {missing[0]} has no tensors although layer {depth - 1} has: a shard is missing?"
                )

    def axes(self, name: str, found: _Matched) -> Axes:
        """The concrete axes of one tensor, rank checked."""
        try:
            axes = parse_axes(found.text.format(**self.places(found.tower.name, found.layer))).rename(self.tie)
            axes = axes.outputs_only() if found.bias else axes
            axes.check_rank(self.shapes[name])
        except (AxisError, KeyError, IndexError, ValueError) as error:
            raise InputError(f"tensor {name!r} {self.shapes[name]}, axes {found.text!r}: {error}") from error
        return axes

    def places(self, tower: str, layer: int | None = None) -> dict[str, int]:
        """The numbers that stand in a row for its layer and for the junctions around it."""
        sums = {name: TOWERS[name.rstrip(".")] for name in (*self.depths, tower)}
        found = {f"{name.rstrip('.')}_last": sums[name] * depth for name, depth in self.depths.items()}
        found |= {"first": 0, "last": sums[tower] * self.depths.get(tower, 0)}
        if layer is not None:
            before, after = sums[tower] * layer, sums[tower] * (layer + 1)
            found |= {"l": layer, "in": before, "next": before + 1, "mid": after - 1, "out": after}
        return found

    def found_ties(self) -> dict[str, str]:
        """The spaces that are the same as others."""
        found = {}
        for tie in self.family.ties:
            tower = tower_of(tie.space)
            if tie.unless not in self.shapes and (not tower or f"{tower}." in self.depths):
                places = self.places(f"{tower}." if tower else "")
                found[tie.space.format(**places)] = tie.same_as.format(**places)
        return found

    def tie(self, space: str) -> str:
        return self.ties.get(space, space)

    def facts(self, tower: Tower) -> dict[str, Any]:
        """Heads, norm and activation of a tower, from the config."""
        heads, said = _look_up(self.config, tower.heads), _look_up(self.config, tower.layers)
        if heads is None:
            keys = [key for key in tower.heads if isinstance(key, str)]
            raise InputError(
                f"the config does not say how many attention heads there are (looked for {', '.join(keys)}); "
                f"give it, e.g. --config '{{\"{keys[-1]}\": 12}}'"
            )
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1:
            raise InputError(f"the config says {heads!r} attention heads; a positive whole number is needed")
        if said is not None and said != self.depths[tower.name]:
            raise InputError(f"the config says {said} layers, the tensors have {self.depths[tower.name]}")
        return {
            "layers": self.depths[tower.name],
            "heads": heads,
            "norm": self.norm(tower),
            "activation": _look_up(self.config, tower.activation),
        }

    def solve_sizes(self, params: Mapping[str, Axes], facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Sizes of all spaces from the shapes: any axis with one unknown space gives it, until all are known."""
        wanted = set().union(*(axes.spaces for axes in params.values()))
        while open_spaces := wanted - self.sizes.keys():
            before = len(self.sizes)
            for name, axes in params.items():
                self.learn_sizes(name, axes)
            if len(self.sizes) == before:
                raise InputError(
                    f"the sizes of {sorted(open_spaces)} do not follow from the shapes: tensors are missing"
                )
        for name, axes in params.items():
            self.check_sizes(name, axes)
        for space, size in self.sizes.items():
            heads = _heads_of(space, facts)
            if heads and size % heads:
                raise InputError(
                    f"{size} units of {space!r} do not divide into {heads} heads: wrong head count in config?"
                )

    def learn_sizes(self, name: str, axes: Axes) -> None:
        for axis, length in zip(axes.dims or (), self.shapes[name], strict=axes.dims is not None):
            spaces = [part.space for part in axis.parts]
            unknown = {space for space in spaces if space and space not in self.sizes}
            if len(unknown) == 1 and None not in spaces:
                (space,) = unknown
                rest = length - sum(self.sizes[s] for s in spaces if s and s != space)
                if rest <= 0 or rest % spaces.count(space):
                    raise InputError(f"tensor {name!r} {self.shapes[name]}: no whole size is left for {space!r}")
                self.sizes[space] = rest // spaces.count(space)

    def check_sizes(self, name: str, axes: Axes) -> None:
        try:
            for axis, length in zip(axes.dims or (), self.shapes[name], strict=axes.dims is not None):
                axis.sizes(length, self.sizes)
        except AxisError as error:
            known = {space: self.sizes[space] for space in sorted(axes.spaces)}
            raise InputError(
                f"tensor {name!r} {self.shapes[name]} does not fit the other tensors, which say {known}: {error}"
            ) from error

    def space(self, name: str, facts: Mapping[str, Mapping[str, Any]]) -> Space:
        root = re.split(r"[/.]", name.removeprefix(f"{tower_of(name)}.").split("/")[-1])[0]
        return Space(name, self.sizes[name], _heads_of(name, facts), GROUPS.get(root, "permutation"))

    def embeddings(self, params: Mapping[str, Axes]) -> dict[str, int]:
        """Weights of modules that give a joint embedding -> its width."""
        found = [(name, axes) for name, axes in params.items() if name.endswith("_projection.weight")]
        public = {name: axes for name, axes in found if is_linear(name, axes) and not axes.outputs_only().spaces}
        return {name: self.shapes[name][1 - next(iter(axes.inputs))] for name, axes in public.items()}

    def outputs(self) -> dict[str, Axes]:
        found = {}
        for name, text in self.family.outputs.items():
            tower = text.split("@")[1].strip() if "@" in text else ""
            if tower in self.depths:
                plain = text.split("@")[0].split(" as ")[0]
                found[name] = parse_axes(plain.format(**self.places(tower))).rename(self.tie)
        return {name: axes for name, axes in found.items() if axes.spaces <= self.sizes.keys()}

    def output_roles(self) -> dict[str, str]:
        """The roles that the family gives to outputs."""
        outputs = {name: text.split("@")[0].split(" as ") for name, text in self.family.outputs.items()}
        return {name: pieces[1].strip() for name, pieces in outputs.items() if len(pieces) > 1}


def _heads_of(space: str, facts: Mapping[str, Mapping[str, Any]]) -> int | None:
    if "/" not in space:
        return None
    tower = tower_of(space)
    return facts[tower]["heads"] if tower in facts else None


def _look_up(config: Mapping[str, Any], keys: Lookup) -> Any:
    for key in keys:
        value = key(config) if callable(key) else _value_at(config, key)
        if value is not None:
            return value
    return None


def _value_at(config: Mapping[str, Any], key: str) -> Any:
    if key.startswith("="):
        return key[1:]
    value: Any = config
    for piece in key.split("."):
        value = value.get(piece) if isinstance(value, Mapping) else None
    return value
