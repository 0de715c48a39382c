"""Source, tuned and target under the names of one layout."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..families.table import Family
from ..files.checkpoint import Checkpoint
from ..spaces.layout import Layout
from .passes import Passes
from .resizing import Resizing
from .survey import Survey, survey

ModelLike = str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module | Checkpoint


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
        return self.checkpoint.tensor(self._on_disk(name))

    def rounded(self, name: str, dtype: torch.dtype) -> Tensor:
        """The same as it would be if it had been stored in that dtype."""
        return self.checkpoint.rounded(self._on_disk(name), dtype)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """Its numbers in order, as `Checkpoint.blocks` gives them."""
        return self.checkpoint.blocks(self._on_disk(name))

    def is_as_stored(self, name: str) -> bool:
        """Whether a tensor is seen as it is stored, and not with the inputs of another model."""
        return self._on_disk(name) not in self.checkpoint.changes

    def __contains__(self, name: str) -> bool:
        return name in self.disk or self.tied.get(name) in self.disk

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self.checkpoint.headers[self._on_disk(name)].shape

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor on disk."""
        return self.checkpoint.headers[self._on_disk(name)].dtype

    def _on_disk(self, name: str) -> str:
        return self.disk.get(name) or self.disk[self.tied.get(name, name)]

    def floats(self) -> list[str]:
        """Canonical names of the floating-point tensors on disk; the others are buffers, never moved."""
        return [name for name in self.disk if self.dtype(name).is_floating_point]


@dataclass(frozen=True)
class Models:
    """The models of one run and the layout they share.

    Attributes:
        family: None when it is unknown (enough for methods that move nothing).
        layout: bound to all their tensors, streams not yet tied.
        source, target: the two bases; source and tuned as they are with target's inputs (`conform.py`).
        tuned: the fine-tune of source, if there is one.
        resizing: how source, which has another width or depth, corresponds to target; None: they are of one shape.
        notes: what was done to see source with target's inputs.
    """

    family: Family | None
    layout: Layout
    source: Model
    target: Model
    tuned: Model | None = None
    resizing: Resizing | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def survey(self) -> Survey:
        """The sums over their weights, from one pass when it is first asked for."""
        with self.passes.phase("survey"):
            return survey(self)

    @cached_property
    def passes(self) -> Passes:
        """How often they were read since this was first asked for."""
        return Passes({model.role: model.checkpoint.origin or model.checkpoint for model in self.all()})

    @cached_property
    def kept(self) -> dict[str, Any]:
        """What floors above make of the models once and keep with them (`running/instances.py`)."""
        return {}

    def source_name(self, name: str) -> str | None:
        """The tensor of source that corresponds to one of target; None: none does."""
        return name if self.resizing is None else self.resizing.names.get(name)

    def about_shapes(self) -> dict[str, Any]:
        """In what source is seen otherwise than it is: with target's inputs, from another width or depth."""
        return {"inputs": list(self.notes), "shapes": None if self.resizing is None else self.resizing.why}

    def need_one_shape(self, what: str) -> None:
        """Raises InputError if source is of another width or depth than target, which `what` cannot do with."""
        if self.resizing is not None:
            raise InputError(
                f"{self.resizing.why}; {what} needs bases of one shape. What the fine-tune does can be carried to "
                "other widths and depths: --method functional, with unlabelled inputs (--inputs)"
            )

    @property
    def source_layout(self) -> Layout:
        """The layout of source and tuned."""
        return self.layout if self.resizing is None else self.resizing.layout

    def is_head(self, name: str) -> bool:
        """Whether a tensor may be in one of the models only: a head, a pooler, a projection."""
        if self.family is None:  # nothing is known but that a fine-tune may have a head of its own
            return name not in self.source and name not in self.target
        return _is_head(self.family, name)

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
        """Floating-point tensors that both bases have in the same shape: the evidence of bases of one shape."""
        both = [
            n for n in self.source.floats() if n in self.target.disk and self.source.shape(n) == self.target.shape(n)
        ]
        return [n for n in both if n not in self.source.tied or self.source.tied[n] not in self.source.disk]


def _is_of(family: Family, name: str, towers: Collection[str | None]) -> bool:
    """Whether a tensor belongs to one of some towers; a head can be one tower's or the other's, an unknown is all's."""
    found = {row.tower.name for row in family.rows if row.pattern.fullmatch(name)}
    return not found or not found.isdisjoint(towers)


def _towers(family: Family, model: Model) -> set[str | None]:
    layers = (row for row in family.rows if "l" in row.pattern.groupindex)
    return {row.tower.name for row in layers if any(row.pattern.fullmatch(name) for name in model.disk)}


def _is_head(family: Family, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in family.optional)
