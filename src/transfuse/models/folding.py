"""Norm gains folded into the weights that read through them: the form in which a stream may be rotated.

A LayerNorm commutes with a rotation of the stream that keeps the vector of ones only if its gains are all one. In a
pre-norm model they can be made so without changing the function: W (g * n + b) = (W diag g) (n + b / g). The bias stays
in the norm, so that nothing needs a bias it has not; LayerScale folds into the weights of its branch in the same way.
Folding is undone with the gains of target, so that what is written keeps target's own norms.

Ashkboos et al. 2024 (2401.15024) for RMSNorm and GPT-like models; here for LayerNorm too, by the roles of `layout.py`.
RMSNorm, which does not need the ones to stay, gets the same rotations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InputError
from ..maps.transport import SpaceMaps, transport
from ..spaces.axes import Axes, Axis, Part
from ..spaces.layout import Layout, tower_of
from .model import Model

_JUNCTION = re.compile(r"(?:^|\.)stream\.(\d+)$")


@dataclass(frozen=True)
class Factor:
    """One vector that a tensor is multiplied (`power` 1) or divided (-1) by when it is folded.

    Attributes:
        by: name of the tensor that holds the vector: norm gains or LayerScale.
        dim, start: where it lies along the tensor, from the end if negative: only the tensor itself says how long a
            part is that nobody moves.
        power: 1 or -1.
        size: its length.
        first: where it begins in the tensor that holds it, as `start` does.
    """

    by: str
    dim: int
    start: int
    power: int
    size: int
    first: int


@dataclass(frozen=True)
class Folding:
    """Which tensors take which factors.

    Attributes:
        factors: tensor name, or name of an output -> its factors.
        rotatable: the tied streams ("stream", "vision.stream") that may be rotated once folded.
    """

    factors: Mapping[str, tuple[Factor, ...]]
    rotatable: frozenset[str]

    def fold(self, model: Model, name: str, x: Tensor) -> Tensor:
        """A tensor of a model, folded with that model's own gains; float32 at least.

        Raises:
            InputError: a gain of zero, which cannot be folded.
        """
        return self._apply(model, name, x, 1)

    def unfold(self, model: Model, name: str, x: Tensor) -> Tensor:
        """The inverse of `fold`; `name` may be that of an output of the model."""
        return self._apply(model, name, x, -1)

    def read(self, model: Model, name: str) -> Tensor:
        """One tensor of a model, folded."""
        return self.fold(model, name, model.tensor(name))

    def _apply(self, model: Model, name: str, x: Tensor, sign: int) -> Tensor:
        for factor in self.factors.get(name, ()):
            if factor.by not in model:
                continue
            gain = _gain(model, factor).to(torch.promote_types(x.dtype, torch.float32))
            shape = [-1 if dim == factor.dim % x.ndim else 1 for dim in range(x.ndim)]
            whole = torch.ones(x.shape[factor.dim], dtype=gain.dtype)
            whole.narrow(0, factor.start % len(whole), factor.size).copy_(gain)
            x, whole = x.to(gain.dtype), whole.view(shape)
            x = x * whole if sign * factor.power > 0 else x / whole  # a gain over itself is exactly one
        return x


NO_FOLDING = Folding({}, frozenset())


def norm_folding(layout: Layout, models: Sequence[Model]) -> Folding:
    """What folding does to models of one layout.

    Args:
        layout: streams not yet tied.
        models: all that take part; a stream can be rotated only where norms that cannot be folded (CLIP's
            pre_layrnorm, BERT's) have equal gains and no bias in every one of them.
    """
    norms, scalings = _on_junctions(layout, "norm"), _on_junctions(layout, "scale")
    gains, scales = ({space: names[0] for space, names in one.items() if len(names) == 1} for one in (norms, scalings))
    factors = {name: _factors(layout, name, axes, gains, scales) for name, axes in layout.params.items()}
    for name, axes in layout.outputs.items():
        if layout.roles.get(name) == "normed":
            factors[name] = tuple(
                _factor(layout, gains[part.space], part.space, dim - len(axes.dims or ()), start, -1)
                for dim, axis in enumerate(axes.dims or ())
                for part, start in _starts(layout, axis)
                if part.space in gains
            )
    # Two norms behind each other: the first one's gains cannot be folded past the second. Or two side by side, of
    # towers that share a junction: which reader is behind which of them, the axes do not say.
    stacked = [space for one in (norms, scalings) for space, names in one.items() if len(names) > 1]
    rotatable = frozenset(stream for stream in _tied_streams(layout) if _is_rotatable(layout, stream, stacked, models))
    return Folding({name: found for name, found in factors.items() if found}, rotatable)


def _on_junctions(layout: Layout, role: str) -> dict[str, list[str]]:
    """Junction -> the tensors of that role on it (of norms the gains), in pre-norm towers."""
    found: dict[str, list[str]] = {}
    for name, said in layout.roles.items():
        if said != role or name not in layout.params or name.endswith(".bias"):
            continue
        for space in layout.params[name].spaces:
            if _JUNCTION.search(space) and layout.facts.get(tower_of(space), {}).get("norm") == "pre":
                found.setdefault(space, []).append(name)
    return found


def _factors(
    layout: Layout, name: str, axes: Axes, gains: Mapping[str, str], scales: Mapping[str, str]
) -> tuple[Factor, ...]:
    role, found = layout.roles.get(name), []
    if role == "raw":
        return ()
    for dim, axis in enumerate(axes.dims or ()):
        for part, start in _starts(layout, axis):
            gain, scale = gains.get(part.space or ""), scales.get(part.space or "")
            if dim in axes.inputs:
                found.append((gain, part.space, dim, start, 1))
            elif role in ("norm", "normed"):
                found.append((gain, part.space, dim, start, -1))
            elif role == "scale":
                found.append((scale, part.space, dim, start, -1))
            elif role is None:
                found.append((scale, part.space, dim, start, 1))
    return tuple(_factor(layout, by, *where) for by, *where in found if by is not None)


def _factor(layout: Layout, by: str, space: str, dim: int, start: int, power: int) -> Factor:
    axis = next(axis for axis in layout.params[by].dims or () if any(part.space == space for part in axis.parts))
    first = next(start for part, start in _starts(layout, axis) if part.space == space)
    return Factor(by, dim, start, power, layout.spaces[space].size, first)


def _starts(layout: Layout, axis: Axis) -> list[tuple[Part, int]]:
    """Where every part of an axis begins; behind the one that nobody moves, counted from the end."""
    sizes = [layout.spaces[part.space].size if part.space else 0 for part in axis.parts]
    unmoved = next((i for i, part in enumerate(axis.parts) if part.space is None), len(sizes))
    return [(part, sum(sizes[:i]) if i <= unmoved else -sum(sizes[i:])) for i, part in enumerate(axis.parts)]


def _tied_streams(layout: Layout) -> set[str]:
    return {layout.tied_stream(name) for name in layout.spaces if _JUNCTION.search(name)}


def _is_rotatable(layout: Layout, stream: str, stacked: Sequence[str], models: Sequence[Model]) -> bool:
    pre_norm = layout.facts.get(tower_of(stream), {}).get("norm") == "pre"
    if not pre_norm or any(layout.tied_stream(space) == stream for space in stacked):
        return False
    kept = [
        name
        for name, axes in layout.params.items()
        if layout.roles.get(name) == "stream-norm" and any(layout.tied_stream(one) == stream for one in axes.spaces)
    ]
    return all(_is_uniform(name, model.tensor(name)) for name in kept for model in models if name in model)


def _is_uniform(name: str, x: Tensor) -> bool:
    """Whether a norm's gains are all equal, or its bias zero."""
    return not x.any() if name.endswith(".bias") else bool((x == x[0]).all())


def _gain(model: Model, factor: Factor) -> Tensor:
    whole = model.tensor(factor.by)
    gain = whole.narrow(0, factor.first % len(whole), factor.size)
    if not bool(gain.all()):
        raise InputError(
            f"tensor {factor.by!r} of {model.role} ({model.checkpoint.location}) has a gain of exactly zero, which "
            "cannot be folded into the next weights: use --method tied"
        )
    return gain


def map_tensor(
    model: Model, name: str, layout: Layout, maps: SpaceMaps, dtype: torch.dtype, folding: Folding = NO_FOLDING
) -> Tensor:
    """One tensor of a model in `dtype`, folded if asked for, carried by maps; integer buffers stay."""
    tensor = model.tensor(name)
    if not tensor.is_floating_point():
        return tensor
    wide = tensor.to(torch.promote_types(dtype, torch.float32))  # what is narrow is rounded once, at the end
    return transport(folding.fold(model, name, wide), layout.params[name], maps).to(dtype)


def map_state(
    model: Model, layout: Layout, maps: SpaceMaps, dtype: torch.dtype, folding: Folding = NO_FOLDING
) -> dict[str, Tensor]:
    """All tensors of a model, as `map_tensor` gives them, by on-disk name."""
    return {
        on_disk: map_tensor(model, name, layout, maps, dtype, folding).contiguous()
        for name, on_disk in model.disk.items()
    }


def rotatable_layout(layout: Layout, folding: Folding) -> Layout:
    """A layout with tied streams in which those that may be rotated say so (group "rotation")."""
    spaces = {
        name: replace(space, group="rotation") if name in folding.rotatable else space
        for name, space in layout.spaces.items()
    }
    return replace(layout, spaces=spaces)
