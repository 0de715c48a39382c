"""Source and tuned as they would be with target's inputs: its vocabulary, its image size, its patches.

A new release often has another tokenizer or another resolution, and the tensors that see inputs differ in shape then.
They are re-made, lazily, in the form that target has, so that everything after this sees models of the same inputs:

- rows of token tables and vocabulary heads go by token, as the tokenizer files name them;
- position tables of images are resized (bicubic) from one grid of patches to the other, special positions kept;
- patch embeddings W are taken for "resize every patch to what W expects, then apply W", which is linear in W;
- other tables that are read by number (positions of tokens, token types) are cut, or filled up with zeros.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from .axes import Axes, parse_axes
from .errors import InputError
from .layout import Family, Row
from .modelling import complete_config
from .vocabulary import token_rows

if TYPE_CHECKING:
    from .models import Model

log = logging.getLogger(__name__)

Change = Callable[[Tensor], Tensor]

_SIZES = ("vocab_size", "image_size", "patch_size", "num_positions", "max_position_embeddings", "type_vocab_size")


@dataclass(frozen=True)
class _Inputs:
    """What target's inputs look like: shapes of its tensors; source's row for each of its tokens (-1: none)."""

    family: Family
    target: Model
    tokens: Tensor | None

    def change(self, name: str, shape: tuple[int, ...], partner: tuple[int, ...] | None) -> Change | None:
        """What a tensor needs to fit target's inputs; None: nothing.

        Args:
            partner: shape of target's tensor of that name, if it has it.
        """
        row = _row(self.family, name)
        axes = None if row is None else _axes(row, name)
        if row is None or axes is None or axes.dims is None or len(axes.dims) != len(shape):
            return None
        vocab = _vocabulary_dim(axes)
        if vocab is not None:
            return self._tokens(vocab, shape[vocab], partner)
        if partner is None or any(re.fullmatch(pattern, name) for pattern in self.family.optional):
            return None  # heads are no inputs
        if len(shape) == 4 and axes.inputs == {1, 2, 3}:
            return _patches(name, shape, partner)
        free = [i for i, axis in enumerate(axes.dims) if i not in axes.inputs and axis.parts[0].space is None]
        changed = [i for i in free if shape[i] != partner[i]]
        if not changed:
            return None
        dim = changed[0]
        if "position" in name and "patch" in row.tower.table:
            return _grid(name, dim, shape[dim], partner[dim])
        return lambda x: _cut_or_filled(x, dim, partner[dim])

    def _tokens(self, dim: int, size: int, partner: tuple[int, ...] | None) -> Change | None:
        wanted = partner[dim] if partner is not None else self._vocabulary()
        index = self.tokens
        if index is None:
            if wanted is None or wanted == size:
                return None
            index = torch.arange(wanted)
        index = _cut_or_filled(index + 1, 0, wanted or len(index)) - 1
        index = torch.where(index < size, index, -1)
        return lambda x: _gathered(x, dim, index)

    def _vocabulary(self) -> int | None:
        """Rows of target's own table of tokens."""
        for name in self.target.disk:
            row = _row(self.family, name)
            dim = None if row is None else _vocabulary_dim(_axes(row, name))
            if dim is not None:
                return self.target.shape(name)[dim]
        return None


def conformed(family: Family, models: Mapping[str, Model]) -> tuple[dict[str, Model], list[str]]:
    """The models of a run, source and tuned with target's inputs; and what was done, in words.

    Raises:
        InputError: the inputs have nothing to do with each other (most tokens unknown, another number of channels).
    """
    target, notes = models["target"], list[str]()
    found = dict(models)
    tokens = token_rows(models["source"].checkpoint.companions, target.checkpoint.companions, notes)
    inputs = _Inputs(family, target, tokens)
    for role in ("source", "tuned"):
        if role in models:
            found[role], changed = _conformed(inputs, models[role])
            notes += [
                f"{role}: {name} {old} is seen as {new}, the shape it has in target" for name, old, new in changed
            ]
    for note in notes:
        log.info("%s", note)
    return found, notes


def _conformed(inputs: _Inputs, model: Model) -> tuple[Model, list[tuple[str, tuple[int, ...], tuple[int, ...]]]]:
    """The model with target's inputs; (name, shape, shape it has now) of every tensor whose shape changed."""
    checkpoint, changes = model.checkpoint, dict[str, Change]()
    for name, on_disk in model.disk.items():
        partner = inputs.target.shape(name) if name in inputs.target else None
        change = inputs.change(name, model.shape(name), partner)
        if change is not None and model.dtype(name).is_floating_point:
            changes[on_disk] = change
    if not changes:
        return model, []
    old = checkpoint.headers
    new = {
        name: replace(info, shape=tuple(changes[name](torch.empty(info.shape, dtype=info.dtype).zero_()).shape))
        if name in changes
        else info
        for name, info in old.items()
    }
    read = checkpoint.tensor

    def changed(name: str) -> Tensor:
        tensor = read(name)
        return changes[name](tensor).to(tensor.dtype).contiguous() if name in changes else tensor

    config = _config(checkpoint.config, complete_config(inputs.target.checkpoint.config))
    seen = replace(checkpoint, headers=new, config=config, _read=changed, _checked=set())
    shapes = {on_disk: name for name, on_disk in model.disk.items()}
    differing = [(shapes[n], old[n].shape, new[n].shape) for n in changes if old[n].shape != new[n].shape]
    return replace(model, checkpoint=seen), differing


def _config(config: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """A config with target's sizes of inputs and ids of special tokens, at every level."""
    found = dict(config)
    for key, value in target.items():
        if isinstance(value, Mapping) and isinstance(config.get(key), Mapping):
            found[key] = _config(config[key], value)
        elif key in _SIZES or key.endswith("_token_id"):
            found[key] = value
    return found


def _axes(row: Row, name: str) -> Axes:
    axes = parse_axes(row.axes)
    return axes.outputs_only() if name.endswith(".bias") else axes


def _row(family: Family, name: str) -> Row | None:
    return next((one for one in family.rows if one.pattern.fullmatch(name)), None)


def _vocabulary_dim(axes: Axes) -> int | None:
    """The dimension that goes by token."""
    spaces = ([part.space or "" for part in axis.parts] for axis in axes.dims or ())
    return next((dim for dim, names in enumerate(spaces) if any(one.split(".")[-1] == "vocab" for one in names)), None)


# --- what is done -----------------------------------------------------------------------------------------------------


def _gathered(x: Tensor, dim: int, index: Tensor) -> Tensor:
    """Entries by index; those of -1 are the mean of all."""
    found = x.index_select(dim, index.clamp_min(0))
    unknown = (index < 0).view([-1 if i == dim else 1 for i in range(x.ndim)])
    return torch.where(unknown, x.float().mean(dim, keepdim=True).to(x.dtype), found)


def _cut_or_filled(x: Tensor, dim: int, size: int) -> Tensor:
    if x.shape[dim] >= size:
        return x.narrow(dim, 0, size)
    rest = x.new_zeros([size - x.shape[dim] if i == dim else n for i, n in enumerate(x.shape)])
    return torch.cat([x, rest], dim)


def _patches(name: str, shape: tuple[int, ...], partner: tuple[int, ...]) -> Change | None:
    if shape[1] != partner[1]:
        raise InputError(f"tensor {name!r}: images have {shape[1]} channels in source and {partner[1]} in target")
    if shape[2:] == partner[2:]:
        return None
    resize = [_resizing(new, old) for old, new in zip(shape[2:], partner[2:], strict=True)]

    def change(x: Tensor) -> Tensor:
        down, across = (one.to(x.dtype if x.dtype == torch.float64 else torch.float32) for one in resize)
        return torch.einsum("ockl,kp,lq->ocpq", x.to(down.dtype), down, across)

    return change


def _resizing(size: int, new: int) -> Tensor:
    """The matrix (new, size) that resizes a line of pixels: linear interpolation, averaging where it shrinks."""
    lines = torch.eye(size, dtype=torch.float64)[None, None]  # every column is a line with one white pixel
    return functional.interpolate(lines, size=(new, size), mode="bilinear", antialias=True)[0, 0]


def _grid(name: str, dim: int, old: int, new: int) -> Change:
    """Resizes a table of positions on a square grid with some special ones before it."""
    extra = next((n for n in range(16) if _is_square(old - n) and _is_square(new - n)), None)
    if extra is None:
        raise InputError(f"tensor {name!r}: {old} and {new} positions are not those of two square grids of patches")
    sides = [math.isqrt(count - extra) for count in (old, new)]

    def change(x: Tensor) -> Tensor:
        lines = x.movedim(dim, 0)
        special, places = lines[:extra], lines[extra:]
        flat = places.flatten(1).T.view(1, -1, sides[0], sides[0])
        wide = flat if flat.dtype == torch.float64 else flat.float()
        smaller = sides[1] < sides[0]  # larger as transformers does it
        resized = functional.interpolate(wide, size=(sides[1], sides[1]), mode="bicubic", antialias=smaller)
        back = resized.view(-1, sides[1] ** 2).T.reshape(-1, *places.shape[1:])
        return torch.cat([special, back.to(x.dtype)]).movedim(0, dim)

    return change


def _is_square(count: int) -> bool:
    return count > 0 and math.isqrt(count) ** 2 == count
