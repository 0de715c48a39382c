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

from ..errors import InputError
from ..families.table import Family, Row
from ..files.configs import complete_config
from ..files.reading import Known
from ..files.vocabulary import Vocabulary, token_rows
from ..spaces.axes import Axes, parse_axes

if TYPE_CHECKING:
    from ..files.checkpoint import Checkpoint
    from .model import Model

log = logging.getLogger(__name__)

Change = Callable[[Tensor], Tensor]

_SIZES = ("vocab_size", "image_size", "patch_size", "max_position_embeddings", "type_vocab_size")
_POSITIONS = re.compile(r"(^|\.)(position|pos_embed|positional_embedding)|position_embedding")


@dataclass(frozen=True)
class _Inputs:
    """What target's inputs look like: shapes of its tensors; source's row for each of its tokens (-1: none)."""

    family: Family
    target: Model
    tokens: Tensor | None

    def change(self, name: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], Change] | None:
        """What a tensor needs to fit target's inputs, after the shape it has then; None: nothing."""
        partner = self.target.shape(name) if name in self.target else None
        row = self.family.row_of(name)
        axes = None if row is None else _axes(row, name)
        if row is None or axes is None or axes.dims is None or len(axes.dims) != len(shape):
            return None
        vocab = _vocabulary_dim(axes)
        if vocab is not None:
            return self._tokens(vocab, shape, partner)
        if partner is None or len(partner) != len(shape):
            return None
        if len(shape) == 4 and axes.inputs == {1, 2, 3}:
            return _patches(name, shape, partner)
        free = [i for i, axis in enumerate(axes.dims) if i not in axes.inputs and axis.parts[0].space is None]
        changed = [i for i in free if shape[i] != partner[i]]
        if not changed or not (_POSITIONS.search(name) or "token_type" in name):
            return None
        dim = changed[0]
        new = _with(shape, dim, partner[dim])
        if _POSITIONS.search(name) and self._sees(row):
            return new, _grid(name, dim, shape[dim], partner[dim])
        return new, lambda x: _cut_or_filled(x, dim, partner[dim])

    def _tokens(
        self, dim: int, shape: tuple[int, ...], partner: tuple[int, ...] | None
    ) -> tuple[tuple[int, ...], Change] | None:
        wanted = partner[dim] if partner is not None else self._vocabulary() or shape[dim]
        if self.tokens is None and wanted == shape[dim]:
            return None
        rows = torch.arange(wanted) if self.tokens is None else self.tokens
        index = _cut_or_filled(rows + 1, 0, wanted) - 1
        index = torch.where(index < shape[dim], index, -1)
        return _with(shape, dim, wanted), lambda x: _gathered(x, dim, index)

    def _vocabulary(self) -> int | None:
        """Rows of target's own table of tokens."""
        for name in self.target.disk:
            row = self.family.row_of(name)
            dim = None if row is None else _vocabulary_dim(_axes(row, name))
            if dim is not None:
                return self.target.shape(name)[dim]
        return None

    def _sees(self, row: Row) -> bool:
        """Whether the tower of a row has a convolution, hence a grid of patches."""
        kernels = (name for name in self.target.disk if len(self.target.shape(name)) == 4)
        return any(
            found is not None and found.tower.name == row.tower.name
            for found in (self.family.row_of(n) for n in kernels)
        )


def conformed(
    family: Family, models: Mapping[str, Model], vocabularies: Mapping[str, Vocabulary]
) -> tuple[dict[str, Model], list[str]]:
    """The models of a run, source and tuned with target's inputs; and what was done, in words.

    Args:
        family: of all of them.
        models: by role.
        vocabularies: by role, as from `read_vocabulary`.

    Raises:
        InputError: the inputs have nothing to do with each other (most tokens unknown, another number of channels).
    """
    target, notes = models["target"], list[str]()
    found = dict(models)
    tokens = token_rows(vocabularies["source"], vocabularies["target"], notes)
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
    checkpoint = model.checkpoint
    found = {
        on_disk: change
        for name, on_disk in model.disk.items()
        if model.dtype(name).is_floating_point and (change := inputs.change(name, model.shape(name))) is not None
    }
    if not found:
        return model, []
    _check_padding(inputs, checkpoint)
    old = checkpoint.headers
    new = {name: replace(info, shape=found[name][0]) if name in found else info for name, info in old.items()}

    config = _config(checkpoint.config, complete_config(inputs.target.checkpoint.config))
    changes = {name: _in_float32(change) for name, (_, change) in found.items()}
    seen = replace(checkpoint, headers=new, config=config, origin=checkpoint, changes=changes, known=Known())
    names = {on_disk: name for name, on_disk in model.disk.items()}
    differing = [(names[n], old[n].shape, new[n].shape) for n in found if old[n].shape != new[n].shape]
    return replace(model, checkpoint=seen), differing


def _in_float32(change: Change) -> Change:
    """A change that is not rounded to the dtype of what it is given (unless that is float64, which stays).

    What a fine-tune changed is small beside the weights: of two tables that were each rounded to bfloat16 once more,
    the difference would be rounding for a good part.
    """
    return lambda x: change(x.to(torch.promote_types(x.dtype, torch.float32))).contiguous()


def _check_padding(inputs: _Inputs, checkpoint: Checkpoint) -> None:
    """RoBERTa counts positions from the number of its padding token."""
    ids = [complete_config(one.config).get("pad_token_id") for one in (checkpoint, inputs.target.checkpoint)]
    if inputs.family.name == "roberta" and ids[0] != ids[1]:
        raise InputError(
            f"{checkpoint.location}: its padding token is {ids[0]}, target's ({inputs.target.checkpoint.location}) "
            f"{ids[1]}, and positions are counted from that number; the two cannot see one input"
        )


_PARTS = ("text_config", "vision_config")


def _config(config: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    """A config with target's sizes of inputs and ids of special tokens, also inside the configs of towers.

    One of the two may be that of a tower alone.
    """
    own = {key: value for key, value in target.items() if key in _SIZES or str(key).endswith("_token_id")}
    kind = str(config.get("model_type"))
    for part in _PARTS:  # source is a tower of what target is
        if isinstance(target.get(part), Mapping) and part not in config and part.removesuffix("_config") in kind:
            return _config(config, target[part])
    found = {**config, **own}
    for part in _PARTS:
        if isinstance(config.get(part), Mapping):
            whole = isinstance(target.get(part), Mapping)
            is_it = part.removesuffix("_config") in str(target.get("model_type"))
            found[part] = _config(config[part], target[part] if whole else target if is_it else {})
    return found


def _axes(row: Row, name: str) -> Axes:
    axes = parse_axes(row.axes)
    return axes.outputs_only() if name.endswith(".bias") else axes


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


def _with(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


def _cut_or_filled(x: Tensor, dim: int, size: int) -> Tensor:
    if x.shape[dim] >= size:
        return x.narrow(dim, 0, size)
    rest = x.new_zeros([size - x.shape[dim] if i == dim else n for i, n in enumerate(x.shape)])
    return torch.cat([x, rest], dim)


def _patches(name: str, shape: tuple[int, ...], partner: tuple[int, ...]) -> tuple[tuple[int, ...], Change] | None:
    if shape[1] != partner[1]:
        raise InputError(f"tensor {name!r}: images have {shape[1]} channels in source and {partner[1]} in target")
    if shape[2:] == partner[2:]:
        return None
    resize = [_resizing(new, old) for old, new in zip(shape[2:], partner[2:], strict=True)]

    def change(x: Tensor) -> Tensor:
        down, across = (one.to(x.dtype if x.dtype == torch.float64 else torch.float32) for one in resize)
        return torch.einsum("ockl,kp,lq->ocpq", x.to(down.dtype), down, across)

    return (*shape[:2], *partner[2:]), change


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
