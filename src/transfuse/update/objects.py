"""Updates: what a port adds to target at alpha 1, tensor by tensor in target's coordinates, made when it is asked for.

Whatever finds a change (a contraction with maps, a fit, training, a draw) gives an `Update`, and whatever works on one
(scaling, masking, adding up, merging, writing) takes any. An update is a small frozen value: it holds what its tensors
are made of, and can be pickled as far as that can.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..maps.random import tensor_generator

Scale = float | Mapping[str, float]  # one for all tensors, or one for each by its canonical name


class Update(ABC):
    """The change to target at alpha 1."""

    @property
    @abstractmethod
    def names(self) -> Collection[str]:
        """Canonical names of the tensors that it has a say in, in order."""

    @abstractmethod
    def of(self, name: str) -> Tensor:
        """The change to one of these tensors, in the shape of target's; float32 or float64."""

    def blocks(self, name: str) -> Iterator[Tensor] | None:
        """The numbers of `of(name)` in order, `reading.BLOCK` at a time; None where that needs the whole tensor."""
        return None

    def scaled(self, by: Scale) -> Update:
        """This update, scaled: as a whole, or with a scale for each of its tensors."""
        return Scaled(self, by)

    def __add__(self, other: Update) -> Update:
        """Both one after the other."""
        return Sum((self, other))


@dataclass(frozen=True, eq=False)
class Dense(Update):
    """Tensors that are there.

    Attributes:
        tensors: canonical name -> what is added.
    """

    tensors: Mapping[str, Tensor]

    @property
    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def of(self, name: str) -> Tensor:
        return self.tensors[name]


def dense(update: Update) -> Dense:
    """All tensors of an update in memory, each made once."""
    return Dense({name: update.of(name) for name in update.names})


@dataclass(frozen=True, eq=False)
class Scaled(Update):
    """An update times a number, or each of its tensors times its own."""

    update: Update
    by: Scale

    @property
    def names(self) -> Collection[str]:
        return self.update.names

    def of(self, name: str) -> Tensor:
        return scale_of(self.by, name) * self.update.of(name)


def scale_of(by: Scale, name: str) -> float:
    """The scale of one tensor; 1 for one that is not named."""
    return by.get(name, 1.0) if isinstance(by, Mapping) else by


@dataclass(frozen=True, eq=False)
class Masked(Update):
    """An update of which masks leave a part.

    Attributes:
        masks: canonical name -> mask of the tensor's shape: bool (which entries stay) or weights to multiply with. A
            tensor without one stays whole.
    """

    update: Update
    masks: Mapping[str, Tensor]

    @property
    def names(self) -> Collection[str]:
        return self.update.names

    def of(self, name: str) -> Tensor:
        whole, mask = self.update.of(name), self.masks.get(name)
        if mask is None:
            return whole
        if mask.shape != whole.shape:
            raise InputError(f"the mask of tensor {name!r} is {tuple(mask.shape)}, the tensor {tuple(whole.shape)}")
        return whole.where(mask, 0.0) if mask.dtype == torch.bool else whole * mask


@dataclass(frozen=True, eq=False)
class Sum(Update):
    """Updates added up: task arithmetic (Ilharco et al. 2023, 2212.04089). One that lacks a tensor adds nothing."""

    updates: tuple[Update, ...]

    @property
    def names(self) -> Collection[str]:
        return names_of(self.updates)

    def of(self, name: str) -> Tensor:
        return torch.stack([one.of(name) for one in self.updates if name in one.names]).sum(0)


def names_of(updates: Collection[Update]) -> Collection[str]:
    """The tensors that any of some updates has a say in, each once, in order."""
    return dict.fromkeys(name for one in updates for name in one.names).keys()


@dataclass(frozen=True, eq=False)
class Noise(Update):
    """The control: a Gaussian tensor in the place of each, of the same norm, from a generator of its own.

    Attributes:
        like: whose norms, shapes and dtypes it has.
        seed: of the draws.
    """

    like: Update
    seed: int

    @property
    def names(self) -> Collection[str]:
        return self.like.names

    def of(self, name: str) -> Tensor:
        like = self.like.of(name)
        drawn = torch.randn(like.shape, generator=tensor_generator(self.seed, name), dtype=torch.float64).to(like.dtype)
        return drawn * (like.norm() / drawn.norm().clamp_min(1e-30))
