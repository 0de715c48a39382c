"""Bases of different widths and depths: which tensor, layer and space of source stands where one of target does.

Layers end at the same share of the depth: of 12 layers, those of a 6-layer model are every second one. Where target
has more layers than source, those without a partner keep its weights. Spaces follow from the tensors that lead there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from ..errors import InputError
from ..families.table import Family
from ..maps.algebra import Map, Rectangular
from ..spaces.axes import Axes
from ..spaces.layout import Layout, is_embedding, is_linear, is_stream


class Unlike(InputError):
    """Source and target are of different shapes."""


@dataclass(frozen=True)
class Resizing:
    """How source, of another width or depth, is seen from target.

    Attributes:
        layout: source's own.
        target: target's layout.
        names: tensor of target -> tensor of source, for those that have a partner.
        why: the first difference that was found.
    """

    layout: Layout
    target: Layout
    names: Mapping[str, str]
    why: str

    @property
    def same_shapes(self) -> bool:
        """Whether all widths and depths are the same after all: something else differs, like the activation."""
        mine, its = self.target.spaces, self.layout.spaces
        same = all(mine[one].size == its[other].size for one, other in self.spaces.items())
        return same and len(self.names) == len(self.target.params) == len(self.layout.params)

    @cached_property
    def spaces(self) -> dict[str, str]:
        """Space of target -> space of source (streams at every junction)."""
        found: dict[str, str] = {}
        for name, partner in self.names.items():
            axes, other = self.target.params[name], self.layout.params[partner]
            makes_stream = is_linear(name, axes) or is_embedding(name, self.target)
            for dim, (mine, its) in enumerate(zip(axes.dims or (), other.dims or (), strict=True)):
                for part, partner_part in zip(mine.parts, its.parts, strict=True):
                    if part.space is None or partner_part.space is None:
                        continue
                    # Norms and inputs see the sum before the layer, which need not end where source's does.
                    if not is_stream(part.space) or (makes_stream and dim not in axes.inputs):
                        found.setdefault(part.space, partner_part.space)
        return found

    def heads(self, space: str) -> int | None:
        """Number of source's heads in a space of target inside heads."""
        group = space.split("/")[0]
        partner = next((other for one, other in self.spaces.items() if one.split("/")[0] == group), None)
        return None if partner is None else self.layout.spaces[partner].heads

    def shape_in_target(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that a head of tuned takes in target: its spaces as wide as they are there.

        A space that target does not have (the pooler's, say) is as wide as the stream, if it is so in source.
        """
        axes = self.layout.params[name]
        sizes = {space.name: space.size for space in self.layout.spaces.values()}
        return tuple(
            sum(self._size_in_target(p.space, size) for p, size in zip(axis.parts, axis.sizes(old, sizes), strict=True))
            for axis, old in zip(axes.dims or (), shape, strict=True)
        )

    def _size_in_target(self, space: str | None, size: int) -> int:
        if space is None:
            return size
        mine = next((one for one, other in self.spaces.items() if other == space), None)
        if mine is not None:
            return self.target.spaces[mine].size
        widths = {
            self.layout.spaces[other].size: self.target.spaces[one].size
            for one, other in self.spaces.items()
            if is_stream(one)
        }
        return widths.get(size, size)


def resizing_of(family: Family, target: Layout, source: Layout, why: str) -> Resizing:
    """How source corresponds to target.

    Args:
        target, source: their layouts, streams not yet tied.
        why: the first difference.

    Raises:
        InputError: a tensor has other axes in one than in the other: another variant of the architecture.
    """
    layers = {
        tower: partners(int(facts["layers"]), int(source.facts[tower]["layers"]))
        for tower, facts in target.facts.items()
        if tower in source.facts
    }
    names = {}
    for name, axes in target.params.items():
        partner = _partner(family, name, layers)
        if partner is not None and partner in source.params:
            if _form(axes) != _form(source.params[partner]):
                raise InputError(
                    f"tensor {name!r} has other axes in source than in target: another variant of the model"
                )
            names[name] = partner
        elif partner is not None and not _has_like(family, source, name):
            raise InputError(
                f"tensor {name!r} of target has no counterpart in any layer of source: another variant of the model"
            )
    return Resizing(source, target, names, why)


def _has_like(family: Family, layout: Layout, name: str) -> bool:
    """Whether some layer has a tensor like this one (T5 has biases in one layer), or it is in no layer."""
    row = family.row_of(name)
    if row is None or "l" not in row.pattern.groupindex:
        return True
    leaf = name.rsplit(".", 1)[-1]
    return any(row.pattern.fullmatch(other) and other.endswith(leaf) for other in layout.params)


def partners(target: int, source: int) -> dict[int, int]:
    """Layer of target -> layer of source: those that end at the same share of the depth; the fewer are all matched."""
    few, many = sorted((target, source))
    ends = [((i + 1) * many + few // 2) // few - 1 for i in range(few)]
    return dict(enumerate(ends)) if target <= source else {end: i for i, end in enumerate(ends)}


def in_order(target: int, source: int) -> Map:
    """Unit i onto unit i; what is too many is cut, what is missing is zero."""
    return Rectangular(torch.eye(target, source, dtype=torch.float64))


def _partner(family: Family, name: str, layers: Mapping[str, Mapping[int, int]]) -> str | None:
    row = family.row_of(name)
    found = None if row is None else row.pattern.fullmatch(name)
    if row is None or found is None or "l" not in row.pattern.groupindex:
        return name
    layer = layers.get(row.tower.name.rstrip("."), {}).get(int(found["l"]))
    return None if layer is None else f"{name[: found.start('l')]}{layer}{name[found.end('l') :]}"


def _form(axes: Axes) -> tuple[object, ...]:
    """What two tensors that correspond have in common: how many parts every axis has, and which are inputs."""
    return tuple(len(axis.parts) for axis in axes.dims or ()), axes.inputs
