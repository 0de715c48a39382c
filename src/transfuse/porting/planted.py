"""Random group elements: planted truths for tests, benchmarks and the demo."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import InputError
from ..files.opening import open_checkpoint
from ..files.writing import Weights, check_output, plan_like, write_checkpoint
from ..maps.collection import Maps
from ..maps.random import random_maps
from ..models.folding import NO_FOLDING, Folding, map_tensor, norm_folding, rotatable_layout
from ..models.model import ModelLike, Models
from ..models.opening import open_models
from ..spaces.layout import Layout

PLANTED_MAPS = "planted_maps.safetensors"


def plant(
    model: ModelLike,
    out: str | os.PathLike[str],
    *,
    group: str = "permutation",
    tie_qkv: bool = True,
    seed: int = 0,
    like: ModelLike | None = None,
    force: bool = False,
) -> Path:
    """Writes a model that computes the same in other coordinates, and the maps that lead to it: a known truth.

    Args:
        model: directory, hub id or state dict.
        out: the folder to write.
        group: "permutation", or "rotation": norm gains folded, the stream and the insides of heads rotated.
        tie_qkv: one inner order for q, k, v of a head, which the paper's form can express; False: one for q and k, one
            for v and the output. Rotations always have two.
        seed: of the maps.
        like: a model in the coordinates of `model` (what it was trained on from): the maps are accepted for ports from
            it. Default: `model` itself.
        force: replace an existing folder.

    Returns:
        `out`; the maps are in it as `planted_maps.safetensors`.

    Raises:
        InputError: the model cannot be read, `out` exists, or a rotation is asked for where a norm that cannot be
            folded (CLIP's pre_layrnorm, any post-norm) rules it out.
    """
    place = Path(out)
    check_output(place, force=force)
    opened = open_models(like if like is not None else model, model)
    target = opened.target
    form, folding = _form(opened, group, tie_qkv=tie_qkv)
    maps = _drawn(opened, form, group, tie_qkv=tie_qkv, seed=seed)
    names = {on_disk: name for name, on_disk in target.disk.items()}

    def read(on_disk: str) -> torch.Tensor:
        moved = map_tensor(target, names[on_disk], form, maps.spaces, torch.float64, folding)
        return moved.to(target.dtype(names[on_disk]))

    def finish(folder: Path) -> dict[str, str]:
        replace(maps, target=open_checkpoint(folder).fingerprint()).save(folder / PLANTED_MAPS)
        return {}

    config = target.checkpoint.config
    write_checkpoint(
        place,
        Weights(
            plan_like(target.checkpoint, {on_disk: on_disk for on_disk in names}, []),
            target.checkpoint.headers.__getitem__,
            read,
        ),
        files={"config.json": json.dumps(dict(config), indent=2, sort_keys=True) + "\n"} if config else {},
        copy_from=target.checkpoint.companions,
        finish=finish,
        force=force,
    )
    return place


def _drawn(models: Models, form: Layout, group: str, *, tie_qkv: bool, seed: int) -> Maps:
    """Random maps of a layout, as a match of source would have given them."""
    rotated = group == "rotation"
    return Maps(
        random_maps(form, torch.Generator().manual_seed(seed), group=group),
        family=form.family,
        method="orthogonal" if rotated else "tied",
        tie_qkv=tie_qkv and not rotated,
        norms="folded" if rotated else "kept",
        source=models.source.checkpoint.fingerprint(),
    )


def _form(models: Models, group: str, *, tie_qkv: bool) -> tuple[Layout, Folding]:
    """The layout that maps are drawn for, and what has to be folded first.

    Raises:
        InputError: a rotation is asked for where no stream can be rotated.
    """
    if group != "rotation":
        return models.layout.with_ties(tie_qkv=tie_qkv), NO_FOLDING
    folding = norm_folding(models.layout, [models.target])
    if not folding.rotatable:
        raise InputError(
            f"{models.target.checkpoint.location}: no stream of it can be rotated: a norm whose output is the "
            "stream itself (post-norm, or a norm on the embeddings) has gains that differ, or a bias"
        )
    return rotatable_layout(models.layout.with_ties(), folding), folding
