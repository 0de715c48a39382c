"""Layouts: which space every axis of every parameter of a model belongs to.

A `Family` is a table, one declarative file each in `layouts/`. `bind` holds the table against the tensor names and
shapes of actual checkpoints and their config, and gives a `Layout`: the concrete spaces and the axes of each tensor.
Nothing here imports a model class.

The table: one row a module or tensor, `name  axes  [as role]  [if condition | unless condition]`; the first that holds
counts.

    encoder.layer.{l}.attention.self.query.*    heads.{l}/qk.{l} <- stream.{in}
    encoder.layer.{l}.layernorm_before.*        stream.{in}           as norm
    classifier.*                                _ <- stream.{last}    if TokenClassification

`name.*` stands for `name.weight` with these axes and `name.bias` with their output axes. `{l}` is the layer. The
residual stream is one space for each junction: `{in}`, `{mid}`, `{out}` are those before, inside and after layer l,
`{first}` and `{last}` the ends. A condition is "pre-norm" or "post-norm", part of the name of an architecture in the
config, or the name of a tensor that the model with the heads (tuned, if there is one) has. A role says what cannot be
seen from axes, and what folding norms has to know (`canonical.py`); in pre-norm towers:

    norm          a norm through which everything reads that junction of the stream
    normed        lies behind that norm, like its bias: a probe that meets what the norm gives
    raw           reads the junction before that norm
    scale         multiplies what a branch adds to the stream (LayerScale)
    stream-norm   a norm whose output is the stream itself, so that its gains cannot be folded into what reads it
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from .axes import UNMOVED, Axes, AxisError, parse_axes
from .errors import InputError

# The largest group that keeps the function exactly, by the root of a space's name (after the last "/").
# LayerNorm allows its stream permutations only; an element-wise activation the same for its units; inside a head
# q.k and v->o allow any invertible pair. What a user of the model sees (logits, token ids, embeddings) is not a
# space at all: it is `_`, except the vocabulary, which is named so that other vocabularies can be mapped one day.
GROUPS = {"qk": "invertible", "vo": "invertible", "vocab": "identity"}

Lookup = tuple[str | Callable[[Mapping[str, Any]], Any], ...]


@dataclass(frozen=True)
class Tower:
    """One stack of transformer layers and what hangs on it.

    Attributes:
        table: rows as in the module docstring.
        name: prefix of its spaces (`vision.` in a model of two towers, else empty).
        heads, layers, norm, activation: where the config says it. Keys to look up in order (dotted for nested ones,
            "=pre" for a value that is always the same), or functions of the config.
    """

    table: str
    name: str = ""
    heads: Lookup = ("num_attention_heads",)
    layers: Lookup = ("num_hidden_layers",)
    norm: Lookup = ("=pre",)
    activation: Lookup = ("hidden_act",)


@dataclass(frozen=True)
class Tie:
    """Two spaces that are one, unless a tensor between them is there."""

    space: str
    same_as: str
    unless: str


@dataclass(frozen=True)
class Family:
    """A model family: everything that has to be known about its parameters.

    Attributes:
        name: as in `--family`.
        model_types: `model_type` of configs it serves, each with a prefix that its bare checkpoints lack.
        towers: one or two.
        prefixes: leading parts of on-disk names that may or may not be there.
        aliases: (regular expression, replacement) for names of old releases.
        outputs: axes of the outputs that are not in public coordinates, by name ("as normed": behind the last norm).
        tied: tensors that may be left out on disk since they equal another one.
        ties: spaces that coincide in some variants.
        optional: what may be missing in one of two bases: names of heads, as regular expressions.
        anchor: a tensor every member has; what stands before it on disk is a prefix of all the stack's names.
    """

    name: str
    model_types: Mapping[str, str]
    towers: tuple[Tower, ...]
    prefixes: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    outputs: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    ties: tuple[Tie, ...] = ()
    optional: tuple[str, ...] = ()
    anchor: str = ""

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """All rows of all towers."""
        return tuple(row for tower in self.towers for row in _parse_table(tower))


@dataclass(frozen=True)
class Row:
    """One line of a table, parsed."""

    pattern: re.Pattern[str]
    axes: str
    role: str
    condition: str
    negated: bool
    tower: Tower


@dataclass(frozen=True)
class _Matched:
    """What a tensor's row says: axis text, whether it is the bias of that row, layer, tower, role."""

    text: str
    bias: bool
    layer: int | None
    tower: Tower
    role: str = ""


@dataclass(frozen=True)
class Space:
    """A set of units that move together.

    Attributes:
        name: as in the axes.
        size: number of units (over all heads).
        heads: how many heads it is split into, for a space inside heads.
        group: the largest group that keeps the function: "identity", "permutation" or "invertible" (inside a head).
    """

    name: str
    size: int
    heads: int | None
    group: str

    @property
    def moves(self) -> bool:
        """Whether any map but the identity keeps the function."""
        return self.group != "identity"


@dataclass(frozen=True)
class Layout:
    """A family bound to concrete tensors.

    Attributes:
        family: its name ("" where no layout is needed: every tensor stays in place).
        params: canonical tensor name -> axes.
        spaces: name -> space.
        outputs: axes of the outputs that are not in public coordinates ("vision.pooler_output" where towers differ).
        facts: layers, heads, norm, activation by tower, for checks and reports.
        roles: tensor name, or name of an output, -> its role, where it has one.
    """

    family: str
    params: Mapping[str, Axes]
    spaces: Mapping[str, Space]
    outputs: Mapping[str, Axes] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    def with_ties(self, *, streams: str = "tied", tie_qkv: bool = False, flat_heads: bool = False) -> Layout:
        """The layout in which spaces are united.

        Args:
            streams: "tied": one residual stream a tower, exact in a stock model. "junction": one at every residual
                sum, exact only with permuted skips (Rinaldi et al. 2025, eq. 12).
            tie_qkv: one inner map for q, k and v of a head (the paper's), instead of one for q and k, one for v and o.
            flat_heads: the units of all heads are one set, as if attention were a plain linear layer (Git Re-Basin).
        """

        def new_name(space: str) -> str:
            if streams == "tied":
                space = re.sub(r"(^|\.)stream\.\d+$", r"\1stream", space)
            return re.sub(r"/(qk|vo)\.", "/head.", space) if tie_qkv else space

        spaces: dict[str, Space] = {}
        for space in self.spaces.values():
            heads = None if flat_heads else space.heads
            spaces.setdefault(new_name(space.name), replace(space, name=new_name(space.name), heads=heads))
        return replace(
            self,
            params={name: axes.rename(new_name) for name, axes in self.params.items()},
            spaces=spaces,
            outputs={name: axes.rename(new_name) for name, axes in self.outputs.items()},
        )


def unmoved_layout(names: Iterable[str]) -> Layout:
    """The layout of a model nobody knows: nothing moves. Enough for `naive` and `random`."""
    return Layout(family="", params=dict.fromkeys(names, UNMOVED), spaces={})


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
        self.sizes: dict[str, int] = {}

    def layout(self) -> Layout:
        if unknown := sorted(self.extra.keys() - self.shapes.keys()):
            raise InputError(f"the config gives axes for {unknown[0]!r}, but there is no such tensor")
        matched = {name: self.match_row(name) for name in self.shapes}
        for found in matched.values():
            if found.layer is not None:
                self.depths[found.tower.name] = max(self.depths.get(found.tower.name, 0), found.layer + 1)
        self.check_depths({(found.tower.name, found.layer) for found in matched.values()})
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
        )

    def match_row(self, name: str) -> _Matched:
        """The row that `name` matches."""
        if name in self.extra:
            tower = self.family.towers[0]
            return _Matched(_with_tower(self.extra[name], tower.name), False, None, tower)
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
        fields = {"first": 0, "last": 2 * self.depths.get(found.tower.name, 0)}
        if (layer := found.layer) is not None:
            fields |= {"l": layer, "in": 2 * layer, "mid": 2 * layer + 1, "out": 2 * layer + 2}
        try:
            axes = parse_axes(found.text.format(**fields)).rename(self.tie)
            axes = axes.outputs_only() if found.bias else axes
            axes.check_rank(self.shapes[name])
        except (AxisError, KeyError, IndexError, ValueError) as error:
            raise InputError(f"tensor {name!r} {self.shapes[name]}, axes {found.text!r}: {error}") from error
        return axes

    def tie(self, space: str) -> str:
        for tie in self.family.ties:
            if space == tie.space and tie.unless not in self.shapes:
                last = 2 * self.depths.get(space.split(".")[0] + "." if "." in space else "", 0)
                return tie.same_as.format(first=0, last=last)
        return space

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

    def outputs(self) -> dict[str, Axes]:
        found = {}
        for name, text in self.family.outputs.items():
            tower = text.split("@")[1].strip() if "@" in text else ""
            if tower in self.depths:
                fields = {"first": 0, "last": 2 * self.depths[tower]}
                plain = text.split("@")[0].split(" as ")[0]
                found[name] = parse_axes(plain.format(**fields)).rename(self.tie)
        return {name: axes for name, axes in found.items() if axes.spaces <= self.sizes.keys()}

    def output_roles(self) -> dict[str, str]:
        """The roles that the family gives to outputs."""
        outputs = {name: text.split("@")[0].split(" as ") for name, text in self.family.outputs.items()}
        return {name: pieces[1].strip() for name, pieces in outputs.items() if len(pieces) > 1}


def part_of(name: str) -> str:
    """The part of a model a tensor is counted under in reports: its layer, or its first name."""
    found = re.search(r"^(.*?)(layers?|resblocks|blocks)\.(\d+)\.", name)
    return f"{found.group(1)}{found.group(2)}.{found.group(3)}" if found else name.split(".")[0]


def tower_of(space: str) -> str:
    """The name of the tower a space belongs to: "text", "vision", or "" in a model of one."""
    return next((tower for tower in ("text", "vision") if space.startswith(f"{tower}.")), "")


def forward_position(space: str) -> tuple[str, float, str]:
    """Where in the forward pass a space lies, as a sort key: tower, junction (2 a layer), name."""
    tower = tower_of(space)
    root, _, number = space.removeprefix(f"{tower}.").split("/")[0].partition(".")
    after = {"heads": 0.5, "mlp": 1.5}
    if root == "stream":
        return tower, float(number or 0), space
    if root in after and number.isdigit():
        return tower, 2 * int(number) + after[root], space
    return tower, -1.0 if root in ("vocab", "embed") else float("inf"), space


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


def _parse_table(tower: Tower) -> list[Row]:
    rows = []
    for line in filter(None, map(str.strip, tower.table.splitlines())):
        found = re.fullmatch(r"(\S+)\s+(.*?)(?:\s+as\s+(\S+))?(?:\s+(if|unless)\s+(\S+))?", line)
        assert found, line
        name, axes, role, word, condition = found.groups()
        axes = _with_tower(axes, tower.name)
        rows.append(Row(_name_pattern(name), axes, role or "", condition or "", word == "unless", tower))
    return rows


def _with_tower(axes: str, tower: str) -> str:
    """Puts the tower's name before every space: "stream.0" -> "vision.stream.0"."""
    return re.sub(r"(?<![\w.{/])([A-Za-z])", rf"{tower}\1", axes)


def _name_pattern(name: str) -> re.Pattern[str]:
    name, leaf = (name[:-2], r"\.(?P<leaf>weight|bias)") if name.endswith(".*") else (name, "")
    return re.compile(re.escape(name).replace(r"\{l\}", r"(?P<l>\d+)", 1).replace(r"\{l\}", r"(?P=l)") + leaf)
