"""How a tensor gets from the coordinates of source into those of target: maps, folded norms, other shapes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..maps.algebra import Map, Orthogonal
from ..maps.collection import Maps
from ..maps.transport import SpaceMaps, is_moved, moved_shape, transport
from ..models.folding import NO_FOLDING, Folding, norm_folding
from ..models.model import Model, Models
from ..models.resizing import in_order
from ..spaces.layout import Layout


@dataclass(frozen=True)
class Passage:
    """The way of tensors from source to target under some maps.

    Attributes:
        models: the models, streams of their layout not yet tied.
        maps: between source and target.
    """

    models: Models
    maps: Maps

    @cached_property
    def layout(self) -> Layout:
        """The layout in the form of the maps."""
        return self.models.layout.with_ties(streams=self.maps.streams, tie_qkv=self.maps.tie_qkv)

    @cached_property
    def folding(self) -> Folding:
        """What is folded before tensors move, and unfolded with target's own gains after."""
        folded = self.maps.norms == "folded"
        return norm_folding(self.models.layout, self.models.all()) if folded else NO_FOLDING

    @cached_property
    def in_order(self) -> SpaceMaps:
        """For source of another width: the maps that leave units in order, of the spaces of another size there."""
        return _in_order(self.models, self.layout)

    @cached_property
    def spaces(self) -> SpaceMaps:
        """Space -> map; spaces of another size that have none leave units in order."""
        return {**self.in_order, **self.maps.spaces}

    @property
    def warning(self) -> str | None:
        """What keeps it from being exact although its maps are."""
        rotated = {name for name, one in self.maps.spaces.items() if isinstance(one, Orthogonal)}
        if self.maps.norms != "folded" or rotated <= self.folding.rotatable:
            return None
        return (
            "the stream is rotated, but the fine-tune changed a norm that lies on it, which no rotation keeps: the "
            "port is approximate"
        )

    def move(self, name: str, x: Tensor) -> Tensor:
        """A tensor of source's coordinates, norms folded where the maps ask for it, in those of target.

        Of a change that has no place there (other public widths: a joint embedding, say) nothing is left.
        """
        if self.models.resizing is not None and not self._has_place(name, tuple(x.shape)):
            return torch.zeros(self.models.target.shape(name), dtype=x.dtype)
        moved = transport(x, self.layout.params[name], self.spaces)
        return self.folding.unfold(self.models.target, name, moved)

    def moved(self, model: Model, name: str) -> Tensor:
        """One tensor of a model in source's coordinates, in those of target; float32 or float64."""
        own = model.tensor(name)
        # Rounded once, at the end: in a narrow dtype every gain and every map would round again.
        return self.move(name, self.folding.fold(model, name, own.to(torch.promote_types(own.dtype, torch.float32))))

    def unmoved(self, model: Model, name: str) -> Tensor:
        """One tensor of a model in source's coordinates as it is; units in order where target has more or fewer."""
        return transport(model.tensor(name), self.layout.params[name], self.in_order)

    def moves(self, name: str) -> bool:
        """Whether anything at all happens to a tensor on the way."""
        other = name in self.folding.factors or self.models.resizing is not None
        return other or is_moved(self.layout.params[name], self.spaces)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that `move` gives a tensor of this one."""
        if self.models.resizing is not None and not self._has_place(name, shape):
            return self.models.target.shape(name)
        return moved_shape(shape, self.layout.params[name], self.spaces)

    def reaches(self, name: str) -> bool:
        """Whether every space of a tensor that can move has a map."""
        spaces = self.layout.params[name].spaces
        return bool(spaces) and all(one in self.maps.spaces or not self.layout.spaces[one].moves for one in spaces)

    def _has_place(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether every axis is as long as its spaces are in source, and comes out as long as it is in target."""
        if name not in self.models.target:
            return True  # a head of tuned's own
        layout, target = self.layout, self.models.target.shape(name)
        for dim, axis in enumerate(layout.params[name].dims or ()):
            known = [part.space for part in axis.parts if part.space is not None]
            if len(known) == len(axis.parts):
                sizes = [self.spaces[s].source_size if s in self.spaces else layout.spaces[s].size for s in known]
                if sum(sizes) != shape[dim]:
                    return False
            elif shape[dim] != target[dim]:
                return False
        return layout.params[name].dims is not None or shape == target


def _in_order(models: Models, layout: Layout) -> dict[str, Map]:
    if models.resizing is None:
        return {}
    found: dict[str, Map] = {}
    made: dict[tuple[int, int], Map] = {}  # layers share them
    for name, axes in layout.params.items():
        its = models.source_name(name) or name
        model = models.source if its in models.source else models.tuned
        if model is None or its not in model:
            continue
        for dim, (axis, length) in enumerate(zip(axes.dims or (), model.shape(its), strict=axes.dims is not None)):
            if name in models.layout.embeddings and dim not in axes.inputs:
                continue  # public: in another width there is no order to keep
            known = [part.space for part in axis.parts if part.space is not None]
            sizes = {space: layout.spaces[space].size for space in known}
            total = sum(sizes[space] for space in known)
            for space, size in sizes.items():
                if len(known) == len(axis.parts) and length != total:
                    pair = size, length * size // total
                    if pair not in made:
                        made[pair] = in_order(*pair)
                    found[space] = made[pair]
    return found
