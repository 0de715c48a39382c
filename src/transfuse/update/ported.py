"""The tensors of a port, made when they are asked for: target plus the transported task vector."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import InputError
from ..maps.algebra import Map, Orthogonal
from ..maps.collection import Maps
from ..maps.random import tensor_generator
from ..maps.transport import transport
from ..models.delta import task_vector
from ..models.folding import NO_FOLDING, norm_folding
from ..models.model import Models
from ..models.plan import Plan, Step, written_steps
from ..models.resizing import in_order
from ..spaces.layout import Layout, is_embedding

log = logging.getLogger(__name__)


class PortedTensors:
    """The tensors of the output: target + alpha * T(tuned - source) (Rinaldi et al. 2025, eq. 13), one at a time.

    Attributes:
        steps: name in the output -> what happens to it.
        fitted: canonical name -> tensor that fitting found, for methods that fit (`functional.py`).
        spaces: space -> map; spaces of another size that have none leave units in order.
        lost: (updates that rounding to the dtype of target swallowed, updates that are not zero), as far as read.
    """

    def __init__(
        self,
        models: Models,
        plan: Plan,
        maps: Maps,
        alpha: float,
        noise_seed: int | None,
        fitted: Mapping[str, Tensor] | None = None,
        keep_embeddings: bool = False,
    ):
        self.fitted, self.keep_embeddings = fitted, keep_embeddings
        self.models, self.plan, self.maps = models, plan, maps
        self.layout = models.layout.with_ties(streams=maps.streams, tie_qkv=maps.tie_qkv)
        self.folding = norm_folding(models.layout, models.all()) if maps.norms == "folded" else NO_FOLDING
        self.alpha, self.noise_seed = alpha, noise_seed
        self.in_order = _in_order(models, self.layout)
        self.spaces = {**self.in_order, **maps.spaces}
        rotated = {name for name, one in maps.spaces.items() if isinstance(one, Orthogonal)}
        if maps.norms == "folded" and not rotated <= self.folding.rotatable:
            log.warning(
                "the stream is rotated, but the fine-tune changed a norm that lies on it, which no rotation keeps: the "
                "port is approximate"
            )
        self.steps: Mapping[str, Step] = written_steps(plan)
        self.lost: dict[str, tuple[int, int]] = {}

    def read(self, out: str) -> Tensor:
        """The tensor of that name in the output, in target's dtype."""
        step = self.steps[out]
        assert self.models.tuned is not None
        if step.action == "copy":
            return self.models.target.tensor(step.name)
        if step.action == "carry":
            carried = (self.fitted or {}).get(step.name)
            if carried is None:
                own = self.models.tuned.tensor(step.name)
                # Rounded once, at the end: in a narrow dtype every gain and every map would round again.
                own = own.to(torch.promote_types(own.dtype, torch.float32))
                carried = self.move(step.name, self.folding.fold(self.models.tuned, step.name, own))
            return _finite(out, carried.to(self.plan.dtype))
        old = self.models.target.tensor(step.name)
        update = self.alpha * self.delta(step.name)
        new = (old.to(update.dtype) + update).to(old.dtype)
        nonzero = update != 0
        self.lost[out] = (int((nonzero & (new == old)).sum()), int(nonzero.sum()))
        return _finite(out, new)

    def delta(self, name: str) -> Tensor:
        """The task vector of one tensor in the coordinates of target, float32 or float64."""
        source, tuned = self.models.source, self.models.tuned
        assert tuned is not None
        if self.keep_embeddings and is_embedding(name, self.layout):
            return torch.zeros_like(self._old(name))
        if self.fitted is not None:
            return self._fitted_delta(name)
        partner = self.models.source_name(name)
        assert partner is not None  # else it is copied
        delta, base = task_vector(source, tuned, partner)
        if self.noise_seed is not None:
            delta = self.move(name, delta) if self.models.resizing else delta  # for its shape
            return _random_like(delta, name, self.noise_seed)
        if name in self.folding.factors:  # the gains are other ones in tuned, so the difference is taken after
            delta = self.folding.fold(tuned, name, base + delta) - self.folding.fold(source, name, base)
        return self.move(name, delta)

    def _fitted_delta(self, name: str) -> Tensor:
        """What fitting changed; embeddings that maps reach are contracted with them, all else stays as in target."""
        assert self.fitted is not None and self.models.tuned is not None
        old = self._old(name)
        if name in self.fitted:
            return self.fitted[name].to(old.dtype) - old
        partner = self.models.source_name(name)
        if partner is not None and is_embedding(name, self.layout) and self._is_mapped(name):
            return self.move(name, task_vector(self.models.source, self.models.tuned, partner)[0])
        return torch.zeros_like(old)

    def _old(self, name: str) -> Tensor:
        """One tensor of target, float32 or float64."""
        old = self.models.target.tensor(name)
        return old if old.dtype == torch.float64 else old.float()

    def _is_mapped(self, name: str) -> bool:
        """Whether every space of a tensor that can move has a map."""
        spaces = self.layout.params[name].spaces
        return bool(spaces) and all(one in self.maps.spaces or not self.layout.spaces[one].moves for one in spaces)

    def move(self, name: str, x: Tensor) -> Tensor:
        """A tensor of source's coordinates, norms folded where the maps ask for it, in those of target.

        Of a change that has no place there (other public widths: a joint embedding, say) nothing is left.
        """
        if self.models.resizing is not None and not self._has_place(name, x):
            return torch.zeros(self.models.target.shape(name), dtype=x.dtype)
        moved = transport(x, self.layout.params[name], self.spaces)
        return self.folding.unfold(self.models.target, name, moved)

    def _has_place(self, name: str, x: Tensor) -> bool:
        """Whether every axis is as long as its spaces are in source, and comes out as long as it is in target."""
        if name not in self.models.target:
            return True  # a head of tuned's own
        layout, target = self.layout, self.models.target.shape(name)
        for dim, axis in enumerate(layout.params[name].dims or ()):
            known = [part.space for part in axis.parts if part.space is not None]
            if len(known) == len(axis.parts):
                sizes = [self.spaces[s].source_size if s in self.spaces else layout.spaces[s].size for s in known]
                if sum(sizes) != x.shape[dim]:
                    return False
            elif x.shape[dim] != target[dim]:
                return False
        return layout.params[name].dims is not None or tuple(x.shape) == target

    def unmoved(self, name: str) -> Tensor:
        """A head of tuned as it is; units in order where target has more or fewer."""
        assert self.models.tuned is not None
        return transport(self.models.tuned.tensor(name), self.layout.params[name], self.in_order)

    @property
    def lost_share(self) -> float:
        """Share of the updates read so far that rounding swallowed."""
        lost, updates = (sum(pair[i] for pair in self.lost.values()) for i in (0, 1))
        return lost / updates if updates else 0.0


def _in_order(models: Models, layout: Layout) -> dict[str, Map]:
    """For source of another width: the maps that leave units in order, of the spaces that have another size there."""
    if models.resizing is None:
        return {}
    found: dict[str, Map] = {}
    made: dict[tuple[int, int], Map] = {}  # layers share them
    for name, axes in layout.params.items():
        its = models.source_name(name) or name
        model = models.source if its in models.source else models.tuned
        if model is None or its not in model:
            continue
        for axis, length in zip(axes.dims or (), model.shape(its), strict=axes.dims is not None):
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


def _finite(out: str, x: Tensor) -> Tensor:
    """Inputs are finite, but their sum need not be in the dtype of target."""
    if x.numel() and not torch.isfinite(torch.stack(x.aminmax())).all():
        raise InputError(f"tensor {out!r} of the output overflows {x.dtype}, the dtype of target: is alpha too large?")
    return x


def _random_like(delta: Tensor, name: str, seed: int) -> Tensor:
    """A Gaussian tensor of the same norm, from a generator of this tensor's own."""
    noise = torch.randn(delta.shape, generator=tensor_generator(seed, name), dtype=torch.float64).to(delta.dtype)
    return noise * (delta.norm() / noise.norm().clamp_min(1e-30))
