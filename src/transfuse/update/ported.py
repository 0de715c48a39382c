"""The output of a port, tensor by tensor: target + alpha * update, under the heads that come along."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InputError
from ..files.checkpoint import is_finite
from ..files.reading import TensorInfo
from ..maps.collection import Maps
from ..models.model import Models
from ..models.plan import Plan, Step, written_steps
from ..models.sums import count_equal, one_thread
from ..spaces.layout import is_embedding
from .objects import Scale, Update, dense
from .passage import Passage
from .transported import Fitted, Transported, Without


@dataclass(frozen=True, eq=False)
class Heads:
    """The heads that come along: tuned's own, in target's coordinates. Alpha does not scale them.

    Attributes:
        passage: from source to target.
        found: canonical name -> head that is known already: fitted, or held in memory.
    """

    passage: Passage
    found: Mapping[str, Tensor] = field(default_factory=dict)

    def of(self, name: str) -> Tensor:
        """One tensor of a head, by its canonical name."""
        if name in self.found:
            return self.found[name]
        assert self.passage.models.tuned is not None
        return self.passage.moved(self.passage.models.tuned, name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what `of` gives."""
        if name in self.found:
            return tuple(self.found[name].shape)
        assert self.passage.models.tuned is not None
        return self.passage.shape(name, self.passage.models.tuned.shape(name))

    def unmoved(self, name: str) -> Tensor:
        """The same as it is in tuned; units in order where target has more or fewer."""
        assert self.passage.models.tuned is not None
        return self.passage.unmoved(self.passage.models.tuned, name)


@dataclass(frozen=True, eq=False)
class Ported:
    """The tensors of the output, made when they are asked for: target + alpha * update (Rinaldi et al. 2025, eq. 13).

    Attributes:
        plan: what happens to every tensor.
        update: what is added at alpha 1; any kind.
        heads: those that come along.
        alpha: its scale.
        lost: (updates that rounding to the dtype of target swallowed, updates that are not zero), as far as `read`.
    """

    plan: Plan
    update: Update
    heads: Heads
    alpha: float = 1.0
    lost: dict[str, tuple[int, int]] = field(default_factory=dict, init=False, repr=False)

    @property
    def models(self) -> Models:
        """The models it is made of."""
        return self.heads.passage.models

    @cached_property
    def steps(self) -> Mapping[str, Step]:
        """Name in the output -> what happens to it."""
        return written_steps(self.plan)

    @property
    def added(self) -> dict[str, str]:
        """Name in the output -> canonical name, of the tensors of target that the update is added to."""
        return self._names("add")

    @property
    def carried(self) -> dict[str, str]:
        """Name in the output -> canonical name, of the heads that come along."""
        return self._names("carry")

    def _names(self, action: str) -> dict[str, str]:
        return {out: step.name for out, step in self.steps.items() if step.action == action}

    # --- other values ---------------------------------------------------------------------------------------------

    def at(self, alpha: Scale) -> Ported:
        """The same at another alpha, or with one for each tensor by canonical name."""
        if isinstance(alpha, Mapping):
            return replace(self, update=self.update.scaled(alpha), alpha=1.0)
        return replace(self, alpha=alpha)

    def with_update(self, update: Update) -> Ported:
        """The same with something else added."""
        return replace(self, update=update)

    def fitted(self, found: Fitted) -> Ported:
        """The same with what fitting found, for the heads that come along too."""
        return replace(self, update=found, heads=replace(self.heads, found=found.tensors))

    def held(self) -> Ported:
        """The same with update and heads in memory, for those who read it at several alphas; as large as target."""
        heads = {name: self.heads.of(name) for name in self.carried.values()}
        return replace(self, update=dense(self.update), heads=replace(self.heads, found=heads))

    # --- tensors --------------------------------------------------------------------------------------------------

    def read(self, out: str) -> Tensor:
        """The tensor of that name in the output, in target's dtype; what rounding swallows is counted (`lost`).

        Raises:
            InputError: it overflows that dtype.
        """
        step = self.steps[out]
        if step.action != "add":
            return self._made(step)
        new, self.lost[out] = self._added(out, self.models.target.tensor(step.name), self.update.of(step.name))
        return new

    def pieces(self, out: str) -> Iterator[Tensor]:
        """`read` in pieces, in the order of its numbers: in blocks where no whole tensor is needed."""
        step = self.steps[out]
        blocks = self.update.blocks(step.name) if step.action == "add" else None
        if step.action == "copy":
            yield from self.models.target.blocks(step.name)
        elif blocks is None:
            yield self.read(out)
        else:
            lost = updates = 0
            for old, change in zip(self.models.target.blocks(step.name), blocks, strict=True):
                with one_thread():
                    new, counted = self._added(out, old, change)
                lost, updates = lost + counted[0], updates + counted[1]
                yield new
            self.lost[out] = lost, updates

    def form(self, out: str) -> TensorInfo:
        """Shape and dtype of the tensor of that name in the output, without reading any."""
        step, target = self.steps[out], self.models.target
        if step.action != "carry":
            return TensorInfo(target.shape(step.name), target.dtype(step.name), "")
        return TensorInfo(self.heads.shape(step.name), self.plan.dtype, "")

    def _added(self, out: str, old: Tensor, change: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Target plus what is added, in target's dtype; how many updates rounding swallowed, of how many."""
        update = change if self.alpha == 1 else self.alpha * change
        wide = old.to(torch.promote_types(old.dtype, update.dtype))
        new = (wide + update).to(old.dtype)
        still = count_equal(update, 0.0)
        unchanged = count_equal(new.to(wide.dtype), wide)  # all that nothing is added to, and what is lost
        return _finite(out, new), (unchanged - still, update.numel() - still)

    def change(self, out: str) -> Tensor:
        """What is added at alpha 1 to the tensor of that name in the output; see `added`."""
        return self.update.of(self.steps[out].name)

    def state(self) -> dict[str, Tensor]:
        """All tensors, in memory and in the order of the output; nothing is counted, and sums may overflow."""
        return {out: self._made(step) for out, step in self.steps.items()}

    def zero_shot(self) -> dict[str, Tensor]:
        """Target as it is, under tuned's own head where one comes along: nothing of the method is in it."""
        return {
            out: self.heads.unmoved(step.name).to(self.plan.dtype)
            if step.action == "carry"
            else self.models.target.tensor(step.name)
            for out, step in self.steps.items()
        }

    def _made(self, step: Step) -> Tensor:
        if step.action == "carry":
            return _finite(step.out, self.heads.of(step.name).to(self.plan.dtype))
        old = self.models.target.tensor(step.name)
        return old if step.action == "copy" else _sum(old, self.alpha * self.update.of(step.name))

    @property
    def lost_share(self) -> float:
        """Share of the updates read so far that rounding swallowed."""
        lost, updates = (sum(pair[i] for pair in self.lost.values()) for i in (0, 1))
        return lost / updates if updates else 0.0


def transported(models: Models, plan: Plan, maps: Maps, alpha: float = 1.0) -> Ported:
    """The task vector of tuned carried over by maps, and the heads that come along."""
    passage = Passage(models, maps)
    return Ported(plan, Transported(passage, tuple(step.name for step in plan.of("add"))), Heads(passage), alpha)


def without_embeddings(ported: Ported) -> Ported:
    """The same with target's own embeddings."""
    return ported.with_update(Without(ported.update, embeddings_of(ported), ported.models.target))


def embeddings_of(ported: Ported) -> frozenset[str]:
    """Canonical names of tables, positions and patches."""
    layout = ported.heads.passage.layout
    return frozenset(name for name in layout.params if is_embedding(name, layout))


def unchanged(ported: Ported) -> Ported:
    """Target as it is, with the heads that come along."""
    still = Without(ported.update, frozenset(ported.update.names), ported.models.target)
    return ported.with_update(still)


def _sum(old: Tensor, update: Tensor) -> Tensor:
    """What is added is added in the wider dtype of both, and rounded once."""
    return (old.to(torch.promote_types(old.dtype, update.dtype)) + update).to(old.dtype)


def _finite(out: str, x: Tensor) -> Tensor:
    """Inputs are finite, but their sum need not be in the dtype of target."""
    if not is_finite(x):
        raise InputError(f"tensor {out!r} of the output overflows {x.dtype}, the dtype of target: is alpha too large?")
    return x
