"""Activations as evidence: what two bases compute on the same inputs, as cross-moments of every space.

For a space s, M_s = sum over inputs of <target activation i, source activation j>, both centred, of all modules whose
output lies in s or that read it, each in units of its own spread. Unlike weights, activations say which unit is which
without any other map, so one pass over the inputs is enough. Nothing but the moments is kept: memory does not grow with
the inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .canonical import norm_folding, rotatable_layout
from .evaluate.inputs import Prepared
from .layout import Layout, is_stream, of_module
from .maps import Map
from .matching.by_space import best_maps
from .methods import Method
from .models import Models
from .probes import Probe, batches, probe_of_model, rows_of
from .taps import Seen, Site
from .transport import part_slices


@dataclass
class Moments:
    """Running sums over rows of (target, source) activations.

    Attributes:
        rows: how many were seen.
        target, source: sums, (units,) float64.
        cross: sum of outer products, (target units, source units).
        squares: sums of squared norms, of target and of source.
    """

    rows: int = 0
    target: Tensor = field(default_factory=lambda: torch.zeros(()))
    source: Tensor = field(default_factory=lambda: torch.zeros(()))
    cross: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: tuple[float, float] = (0.0, 0.0)

    def add(self, target: Tensor, source: Tensor) -> None:
        """Adds (rows, units) of both models on the same inputs; products in their dtype, sums in float64."""
        self.rows += len(target)
        self.target = self.target.to(target.device) + target.sum(0).double()
        self.source = self.source.to(source.device) + source.sum(0).double()
        self.cross = self.cross.to(target.device) + (target.T @ source).double()
        squares = (float(one.square().sum(dtype=torch.float64)) for one in (target, source))
        self.squares = (self.squares[0] + next(squares), self.squares[1] + next(squares))

    def normalised(self) -> Tensor:
        """Centred cross-moments over the product of both spreads: nuclear norm 1 where a rotation fits exactly."""
        left, right = self.target / self.rows, self.source / self.rows
        spread = [
            max(total - self.rows * float(mean.square().sum()), 0.0)
            for total, mean in zip(self.squares, (left, right), strict=True)
        ]
        centred = self.cross - self.rows * torch.outer(left, right)
        scale = (spread[0] * spread[1]) ** 0.5
        return (centred / scale if scale > 0 else torch.zeros_like(centred)).cpu()


def match_activations(
    models: Models, method: Method, inputs: Prepared, *, tie_qkv: bool, device: str, progress: bool
) -> tuple[dict[str, Map], dict[str, Any]]:
    """The maps of a method that goes by activations, and what there is to say about them.

    Args:
        models: the two bases.
        method: its row says which spaces there are, and from which group their maps come.
        inputs: unlabelled.

    Returns:
        Space -> map; and a report: by space, what share of the two spreads the map brings together (1: source's
        activations are target's, moved).

    Raises:
        InputError: a base cannot be run here.
    """
    form = activation_form(models, method, tie_qkv=tie_qkv)
    source, target = (probe_of_model(model, models.layout, device) for model in (models.source, models.target))
    evidence = collect(source, target, form, inputs, progress=progress)
    scores = {space: one for space, one in scores_of(evidence).items() if space in form.spaces}
    maps = best_maps(scores, form, method.group)
    known = [space for space in maps if space in scores]
    fits = {space: float((maps[space].matrix() * scores[space]).sum()) / len(evidence[space]) for space in known}
    return maps, {"examples": len(inputs), "alignment": fits}


def activation_form(models: Models, method: Method, *, tie_qkv: bool) -> Layout:
    """The layout that a method which goes by activations is matched in."""
    form = models.layout.with_ties(streams=method.streams, tie_qkv=tie_qkv, flat_heads=method.heads == "flat")
    if method.group != "orthogonal":
        return form
    return rotatable_layout(form, norm_folding(models.layout, [models.source, models.target]))


Evidence = dict[str, dict[str, Moments]]
"""Space -> module -> moments."""


def collect(
    source: Probe,
    target: Probe,
    form: Layout,
    inputs: Prepared,
    *,
    names: Collection[str] | None = None,
    progress: bool = False,
) -> Evidence:
    """Runs both bases on the same inputs, batch by batch.

    Args:
        source, target: the bases.
        form: the layout that maps are sought for, as from `activation_form`.
        inputs: unlabelled.
        names: of the sites that are looked at; None: all.

    Returns:
        Moments of all spaces that the inputs reach.
    """
    found: Evidence = {}
    shared = [name for name in target.sites if name in source.sites and (names is None or name in names)]
    if not shared:
        return found
    size = target.size_of(inputs, shared)
    for batch in tqdm(
        batches(inputs, size), total=-(-len(inputs) // size), desc="activations", unit="batch", disable=not progress
    ):
        mask = batch.get("attention_mask")
        right, left = (probe.see(batch, shared) for probe in (source, target))
        for name in shared:
            if name in left and name in right:
                for space, pair in _activations(form, target.sites[name], left[name], right[name]):
                    moments = found.setdefault(space, {}).setdefault(name, Moments())
                    moments.add(*(rows_of(x, mask) for x in pair))
    return found


def scores_of(evidence: Evidence) -> dict[str, Tensor]:
    """Space -> its cross-moments (target units, source units), every module in units of its own spread."""
    return {
        space: torch.stack([one.normalised() for one in found.values()]).sum(0) for space, found in evidence.items()
    }


def _activations(form: Layout, site: Site, target: Seen, source: Seen) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """(space, (target's, source's)) of all that is seen at a site."""
    axes = form.params[site.name]
    if embeds(form, site.name):
        yield site.name, (target.y, source.y)
    sizes = {name: space.size for name, space in form.spaces.items()}
    for dim, axis in enumerate(axes.dims or ()):
        for space, start, length in ((p.space, *where) for p, *where in part_slices(axis, site.widths[dim], sizes)):
            if space is None or (dim in axes.inputs and is_stream(space)):
                continue  # the stream is seen where modules add to it
            if dim in axes.inputs:
                pair = target.x, source.x
            elif of_module(space):
                pair = target.own, source.own
            else:
                pair = target.y, source.y
            yield space, (pair[0].narrow(-1, start, length), pair[1].narrow(-1, start, length))
    carries = target.carry, source.carry
    if site.carried in form.spaces and carries[0] is not None and carries[1] is not None:
        yield str(site.carried), (carries[0], carries[1])


def embeds(form: Layout, name: str) -> bool:
    """Whether a module gives a joint embedding: public, but in coordinates of each model's own (CLIP's projections)."""
    return name.split(".")[-2].endswith("_projection") and not form.params[name].outputs_only().spaces
