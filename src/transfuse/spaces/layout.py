"""Layouts: which space every axis of every parameter of a model belongs to.

A `Family` is a table, one declarative file each in `layouts/`. `binding.bind` holds it against the tensor names and
shapes of actual checkpoints and their config, and gives a `Layout`: the concrete spaces and the axes of each tensor.
Nothing here imports a model class.

The table: one row a module or tensor, `name  axes  [as role]  [if condition | unless condition]`; the first that holds
counts.

    encoder.layer.{l}.attention.self.query.*    heads.{l}/qk.{l} <- stream.{in}
    encoder.layer.{l}.layernorm_before.*        stream.{in}           as norm
    classifier.*                                _ <- stream.{last}    if TokenClassification

`name.*` stands for `name.weight` with these axes and `name.bias` with their output axes. `{l}` is the layer. The
residual stream is one space for each junction: `{in}`, `{mid}`, `{out}` are those before, inside and after layer l,
`{first}` and `{last}` the ends. In a decoder's layer cross-attention leads from `{next}`, the sum after `{in}`, to
`{mid}`. A space of another tower has that tower's name before it; the last junction there is `{encoder_last}`.

A condition is "pre-norm" or "post-norm", part of the name of an architecture in the config, or the name of a tensor
that the model with the heads (tuned, if there is one) has. A role says what cannot be seen from axes, and what folding
norms has to know (`canonical.py`); in pre-norm towers:

    norm          a norm through which everything reads that junction of the stream
    normed        lies behind that norm, like its bias: a probe that meets what the norm gives
    raw           reads the junction before that norm
    scale         multiplies what a branch adds to the stream (LayerScale)
    stream-norm   a norm whose output is the stream itself, so that its gains cannot be folded into what reads it
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

from .axes import UNMOVED, Axes, Axis, Part

# The largest group that keeps the function exactly, by the root of a space's name (after the last "/").
# LayerNorm allows its stream permutations (rotations, once its gains are folded: canonical.py); an element-wise
# activation permutations of its units; inside a head q.k and v->o allow any invertible pair. What a user of the model
# sees (logits, token ids, embeddings) is not a space at all: it is `_`, except the vocabulary, which is named so that
# other vocabularies can be mapped one day.
GROUPS = {"qk": "invertible", "vo": "invertible", "vocab": "identity"}

# The towers that can stand beside another one ("" where there is one), in the order of the forward pass, and how many
# residual sums a layer of them has: attention and MLP, or attention, cross-attention and MLP.
TOWERS = {"": 2, "text": 2, "vision": 2, "encoder": 2, "decoder": 3}


@dataclass(frozen=True)
class Space:
    """A set of units that move together.

    Attributes:
        name: as in the axes.
        size: number of units (over all heads).
        heads: how many heads it is split into, for a space inside heads.
        group: the largest group that keeps the function: "identity", "permutation", "invertible" (inside a head), or
            "rotation" (a stream of a model whose norm gains are folded).
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
        embeddings: weights of modules that give a joint embedding (public, but in coordinates of each model's own, as
            CLIP's projections) -> its width.
        ties: space that has no name of its own -> the one it is the same as (a decoder's first junction is the
            encoder's where they share the embeddings).
    """

    family: str
    params: Mapping[str, Axes]
    spaces: Mapping[str, Space]
    outputs: Mapping[str, Axes] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    embeddings: Mapping[str, int] = field(default_factory=dict)
    ties: Mapping[str, str] = field(default_factory=dict)

    def tied_stream(self, space: str) -> str:
        """The one stream that a junction belongs to when streams are tied; other spaces as they are."""
        same = {_whole_stream(one): _whole_stream(other) for one, other in self.ties.items()}
        return same.get(_whole_stream(space), _whole_stream(space))

    def unequal_heads(self) -> dict[str, tuple[int, ...]]:
        """Heads whose q and k are of another width than v: name they would have as one space -> their sizes."""
        sizes: dict[str, dict[int, None]] = {}
        for name, space in self.spaces.items():
            sizes.setdefault(_whole_head(name), {})[space.size] = None
        return {name: tuple(found) for name, found in sizes.items() if len(found) > 1}

    def with_ties(self, *, streams: str = "tied", tie_qkv: bool = False, flat_heads: bool = False) -> Layout:
        """The layout in which spaces are united.

        Args:
            streams: "tied": one residual stream a tower (one for two that share their embeddings), exact in a stock
                model. "junction": one at every residual sum, exact only with permuted skips (Rinaldi et al. 2025, eq.
                12). "module": every linear module has an input and an output space of its own, so that maps need not
                agree (Theseus), a norm moves with what reads it; what is between modules keeps its junction.
            tie_qkv: one inner map for q, k and v of a head (the paper's), instead of one for q and k, one for v and o.
                Where q and k are of another width than v there is no such map, and they keep one each.
            flat_heads: the units of all heads are one set, as if attention were a plain linear layer (Git Re-Basin).
        """

        unequal = self.unequal_heads()

        def new_name(space: str) -> str:
            if streams == "tied":
                space = self.tied_stream(space)
            return _whole_head(space) if tie_qkv and _whole_head(space) not in unequal else space

        spaces: dict[str, Space] = {}
        for space in self.spaces.values():
            heads = None if flat_heads else space.heads
            spaces.setdefault(new_name(space.name), replace(space, name=new_name(space.name), heads=heads))
        tied = replace(
            self,
            params={name: axes.rename(new_name) for name, axes in self.params.items()},
            spaces=spaces,
            outputs={name: axes.rename(new_name) for name, axes in self.outputs.items()},
        )
        return _by_module(tied) if streams == "module" else tied


def _by_module(layout: Layout) -> Layout:
    """The layout in which both ends of every linear module are spaces of their own ("layer.0.fc1:in").

    A joint embedding is an end like others; what a norm multiplies and adds moves with what it gives, as its readers
    get it.
    """
    params, spaces = dict(layout.params), dict(layout.spaces)
    for name, axes in layout.params.items():
        if not is_linear(name, axes):
            continue
        module = name.removesuffix(".weight")
        dims = tuple(
            _end(axis, f"{module}:in" if dim in axes.inputs else f"{module}:out", spaces)
            for dim, axis in enumerate(axes.dims or ())
        )
        if name in layout.embeddings:
            dims = tuple(dims[dim] if dim in axes.inputs else Axis((Part(f"{module}:out"),)) for dim in range(2))
            spaces[f"{module}:out"] = Space(f"{module}:out", layout.embeddings[name], None, "invertible")
        params[name] = Axes(dims, axes.inputs)
        if f"{module}.bias" in params:
            params[f"{module}.bias"] = params[name].outputs_only()
    for name, reader in _read_norms(layout).items():
        params[name] = Axes((Axis((Part(f"{reader.removesuffix('.weight')}:in"),)),))
    return replace(layout, params=params, spaces=spaces, embeddings={})


def _end(axis: Axis, end: str, spaces: dict[str, Space]) -> Axis:
    """An axis at an end of a module, its parts renamed to spaces of that end, which are added to `spaces`."""
    parts = []
    for i, part in enumerate(axis.parts):
        if part.space is not None:
            name = f"{end}.{i}" if len(axis.parts) > 1 else end
            spaces[name] = replace(spaces[part.space], name=name, heads=None)
            part = Part(name, part.dual)
        parts.append(part)
    return Axis(tuple(parts))


def _read_norms(layout: Layout) -> dict[str, str]:
    """Gains and biases of norms -> the weight of the module that reads what the norm gives; of several the nearest."""
    readers: dict[str, list[str]] = {}
    for name, axes in layout.params.items():
        if is_linear(name, axes) and layout.roles.get(name) != "raw":
            (axis,) = ((axes.dims or ())[dim] for dim in axes.inputs)
            if len(axis.parts) == 1 and axis.parts[0].space is not None:
                readers.setdefault(axis.parts[0].space, []).append(name)
    norms = {name: next(iter(layout.params[name].spaces)) for name in layout.params if _is_norm(name, layout)}
    return {
        name: max(readers[space], key=lambda reader: shared_path(reader, name))
        for name, space in norms.items()
        if space in readers
    }


def _is_norm(name: str, layout: Layout) -> bool:
    """Whether a tensor is the gain or the bias of a norm between modules, the stream not being its output itself."""
    axes = layout.params[name]
    if len(axes.dims or ()) != 1 or len(axes.spaces) != 1 or layout.roles.get(name, "norm") != "norm":
        return False
    weight = f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else name
    inside = layout.spaces[next(iter(axes.spaces))].heads is not None
    is_own = weight.endswith(".weight") and len(layout.params.get(weight, axes).dims or ()) == 1
    return is_own and not inside


def shared_path(one: str, other: str) -> int:
    """How many modules, from the outermost on, two tensors are both in."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def is_linear(name: str, axes: Axes) -> bool:
    """Whether a tensor is the matrix of a linear module."""
    return name.endswith(".weight") and len(axes.dims or ()) == 2 and len(axes.inputs) == 1


def is_embedding(name: str, layout: Layout) -> bool:
    """Whether a tensor makes the stream from inputs: a table of tokens or positions, a class token, a convolution."""
    axes = layout.params[name]
    if axes.dims is None or is_linear(name, axes) or layout.roles.get(name):
        return False
    weight = f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else name
    siblings = len(layout.params[weight].dims or ()) if weight in layout.params else 1
    is_vector = len(axes.dims) == 1 and name.rpartition(".")[2] in ("weight", "bias") and siblings == 1
    return not is_vector and not (weight in layout.params and is_linear(weight, layout.params[weight]))


def is_stream(space: str) -> bool:
    """Whether a space is the residual stream, at a junction or as a whole."""
    return re.search(r"(^|\.)stream(\.\d+)?$", space) is not None


def of_module(space: str) -> bool:
    """Whether a space is one end of a module."""
    return ":" in space


def unmoved_layout(names: Iterable[str]) -> Layout:
    """The layout of a model nobody knows: nothing moves. Enough for `naive` and `random`."""
    return Layout(family="", params=dict.fromkeys(names, UNMOVED), spaces={})


def part_of(name: str) -> str:
    """The part of a model a tensor is counted under in reports: its layer, or its first name."""
    found = re.search(r"^(.*?)(layers?|resblocks|blocks?)\.(\d+)\.", name)
    return f"{found.group(1)}{found.group(2)}.{found.group(3)}" if found else name.split(".")[0]


def tower_of(space: str) -> str:
    """The name of the tower a space belongs to: one of `TOWERS`, "" in a model of one."""
    return next((tower for tower in TOWERS if tower and space.startswith(f"{tower}.")), "")


def forward_position(space: str) -> tuple[int, float, str]:
    """Where in the forward pass a space lies, as a sort key: tower, junction (two or three a layer), name."""
    tower = tower_of(space)
    place, sums = list(TOWERS).index(tower), TOWERS[tower]
    root, number, *cross = [*space.removeprefix(f"{tower}.").split("/")[0].split("."), ""]
    if root == "stream":
        return place, float(number or 0), space
    if root in ("heads", "mlp") and number.isdigit():
        after = sums - 0.5 if root == "mlp" else 1.5 if "cross" in cross else 0.5
        return place, sums * int(number) + after, space
    return place, -1.0 if root in ("vocab", "embed") else float("inf"), space


def _whole_stream(space: str) -> str:
    return re.sub(r"(^|\.)stream\.\d+$", r"\1stream", space)


def _whole_head(space: str) -> str:
    return re.sub(r"/(qk|vo)\.", "/head.", space)
