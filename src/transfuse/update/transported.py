"""Updates that are read from models: the task vector under maps, and what fitting or training found."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.delta import difference, task_vector
from ..models.model import Model
from .objects import Update
from .passage import Passage


@dataclass(frozen=True, eq=False)
class Transported(Update):
    """The task vector, tuned - source, contracted with maps (Rinaldi et al. 2025, eq. 13).

    Attributes:
        passage: from source to target.
        added: the tensors of target that have a partner in source and tuned.
    """

    passage: Passage
    added: tuple[str, ...]

    @property
    def names(self) -> Collection[str]:
        return self.added

    def of(self, name: str) -> Tensor:
        models, folding = self.passage.models, self.passage.folding
        partner = models.source_name(name)
        assert partner is not None and models.tuned is not None  # else there is nothing to add
        delta, base = task_vector(models.source, models.tuned, partner)
        if name in folding.factors:  # the gains are other ones in tuned, so the difference is taken after
            delta = folding.fold(models.tuned, name, base + delta) - folding.fold(models.source, name, base)
        return self.passage.move(name, delta)

    def blocks(self, name: str) -> Iterator[Tensor] | None:
        models, partner = self.passage.models, self.passage.models.source_name(name)
        assert partner is not None and models.tuned is not None
        both = models.source, models.tuned
        if self.passage.moves(name) or not all(model.is_as_stored(partner) for model in both):
            return None
        pairs = zip(*(model.blocks(partner) for model in both), strict=True)
        return (difference(base, new)[0] for base, new in pairs)


@dataclass(frozen=True, eq=False)
class Without(Update):
    """An update that leaves some tensors as they are.

    Attributes:
        still: their names.
        target: the model that the update is for.
    """

    update: Update
    still: frozenset[str]
    target: Model

    @property
    def names(self) -> Collection[str]:
        return self.update.names

    def of(self, name: str) -> Tensor:
        if name not in self.still:
            return self.update.of(name)
        return torch.zeros(self.target.shape(name), dtype=_wide_dtype(self.target.dtype(name)))


@dataclass(frozen=True, eq=False)
class Fitted(Update):
    """What fitting or training made of target's tensors.

    Attributes:
        target: the model as it was.
        tensors: canonical name -> tensor as it was found to be best; heads that come along may be among them.
        rest: the change to all others.
    """

    target: Model
    tensors: Mapping[str, Tensor]
    rest: Update

    @property
    def names(self) -> Collection[str]:
        return self.rest.names

    def of(self, name: str) -> Tensor:
        if name not in self.tensors:
            return self.rest.of(name)
        old = _wide(self.target, name)
        return self.tensors[name].to(old.dtype) - old


def _wide(target: Model, name: str) -> Tensor:
    """One tensor of target, float32 or float64."""
    return target.tensor(name).to(_wide_dtype(target.dtype(name)))


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
