"""Activations as evidence: what two bases compute on the same inputs, as cross-moments of every space.

For a space s, M_s = sum over inputs of <target activation i, source activation j>, both centred, of all modules whose
output lies in s or that read it, each in units of its own spread. Unlike weights, activations say which unit is which
without any other map, so one pass over the inputs is enough. Nothing but the moments is kept: memory does not grow with
the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from ..maps.algebra import Map
from ..maps.transport import part_slices
from ..models.model import Models
from ..running.inputs import Prepared
from ..running.instances import probe_of
from ..running.probes import Probe, batches, mask_of, rows_of
from ..running.taps import Seen, Site
from ..spaces.layout import Layout, is_stream, of_module


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
    target: Tensor = field(default_factory=lambda: torch.zeros(0))
    source: Tensor = field(default_factory=lambda: torch.zeros(0))
    cross: Tensor = field(default_factory=lambda: torch.zeros(0))
    squares: tuple[float, float] = (0.0, 0.0)

    def add(self, target: Tensor, source: Tensor) -> None:
        """Adds (rows, units) of both models on the same inputs; products in their dtype, sums in float64."""
        self.rows += len(target)
        if not self.cross.numel():
            self.target, self.source, self.cross = zeros(target, 1), zeros(source, 1), zeros(target, 1, source)
        self.target += target.sum(0)
        self.source += source.sum(0)
        self.cross += target.T @ source
        squares = (float(one.square().sum(dtype=torch.float64)) for one in (target, source))
        self.squares = (self.squares[0] + next(squares), self.squares[1] + next(squares))

    @property
    def spreads(self) -> tuple[float, float]:
        """Sums of squared distances to the mean, of target and of source."""
        left, right = (
            max(total - float(one.square().sum()) / self.rows, 0.0)
            for total, one in zip(self.squares, (self.target, self.source), strict=True)
        )
        return left, right

    def normalised(self) -> Tensor:
        """Centred cross-moments over the product of both spreads: nuclear norm 1 where a rotation fits exactly."""
        left, right = self.target / self.rows, self.source / self.rows
        centred = self.cross - self.rows * torch.outer(left, right)
        scale = (self.spreads[0] * self.spreads[1]) ** 0.5
        return (centred / scale if scale > 0 else torch.zeros_like(centred)).cpu()


def zeros(x: Tensor, dim: int, other: Tensor | None = None) -> Tensor:
    """Float64 zeros as long as a dimension of x, or (as long, as long as that of another tensor), beside x."""
    shape = (x.shape[dim],) if other is None else (x.shape[dim], other.shape[dim])
    return torch.zeros(shape, dtype=torch.float64, device=x.device)


Collected = dict[str, dict[str, Moments]]
"""Space -> module -> moments."""


@dataclass(frozen=True)
class ActivationEvidence:
    """Cross-moments of what two bases compute on the same inputs.

    Attributes:
        layout: whose spaces they are.
        moments: of each space, by module.
        scores: space -> (target units, source units), for the spaces of the layout.
        examples: number of inputs.
        source_heads: space -> number of source's heads, where it is of another width or depth; else None.
    """

    layout: Layout
    moments: Collected
    scores: Mapping[str, Tensor]
    examples: int
    source_heads: Callable[[str], int | None] | None = None

    def spreads(self, space: str) -> Tensor | None:
        """Sums of squared distances to the mean in a space, (2,): of target, of source; None where nothing was seen."""
        found = self.moments.get(space)
        return torch.tensor([one.spreads for one in found.values()]).sum(0) if found else None

    def alignment(self, maps: Mapping[str, Map]) -> dict[str, float]:
        """By space, what share of the two spreads a map brings together: 1 where one is the other, moved."""
        known = [space for space in maps if space in self.scores]
        return {
            space: float((maps[space].matrix() * self.scores[space]).sum()) / len(self.moments[space])
            for space in known
        }


def activation_evidence(
    models: Models, layout: Layout, inputs: Prepared, *, device: str = "cpu", progress: bool = False
) -> ActivationEvidence:
    """What the two bases of some models compute on unlabelled inputs.

    Args:
        models: the two bases.
        layout: the form that is matched: its spaces are those that maps are sought for.
        inputs: unlabelled.

    Raises:
        InputError: a base cannot be run here.
    """
    source, target = (probe_of(models, role, device) for role in ("source", "target"))
    resizing = models.resizing
    partners = None if resizing is None else resizing.spaces
    found = collect(source, target, layout, inputs, spaces=partners, progress=progress)
    scores = {space: one for space, one in scores_of(found).items() if space in layout.spaces}
    return ActivationEvidence(layout, found, scores, len(inputs), None if resizing is None else resizing.heads)


def collect(
    source: Probe,
    target: Probe,
    form: Layout,
    inputs: Prepared,
    *,
    names: Collection[str] | None = None,
    spaces: Mapping[str, str] | None = None,
    progress: bool = False,
) -> Collected:
    """Runs both bases on the same inputs, batch by batch.

    Args:
        source, target: the bases.
        form: the layout that maps are sought for, in the form that is matched.
        inputs: unlabelled.
        names: of the sites that are looked at; None: all.
        spaces: space of target -> space of source, where source has another width or depth.

    Returns:
        Moments of all spaces that the inputs reach.
    """
    found: Collected = {}
    shared = [name for name in target.sites if name in source.sites and (names is None or name in names)]
    if not shared:
        return found
    starts = _starts(target, source, shared, spaces or {}) if names is None else []
    seen_there, seen_here = [*shared, *(one for _, _, one in starts)], [*shared, *(one for _, one, _ in starts)]
    size = target.size_of(inputs, seen_here)
    for batch in tqdm(
        batches(inputs, size), total=-(-len(inputs) // size), desc="activations", unit="batch", disable=not progress
    ):
        right, left = source.see(batch, seen_there), target.see(batch, seen_here)
        for space, mine, its in starts:
            if mine in left and its in right:
                _add(found, space, mine, (left[mine].carry, right[its].carry), mask_of(batch, target.sites[mine]))
        for name in shared:
            if name in left and name in right:
                sites = target.sites[name], source.sites[name]
                begins = spaces is None or spaces.get(str(sites[0].carried)) == sites[1].carried
                for space, pair in _activations(form, sites, left[name], right[name], begins=begins):
                    _add(found, space, name, pair, mask_of(batch, sites[0]))
    return found


def _add(
    found: Collected, space: str, name: str, pair: tuple[Tensor | None, Tensor | None], mask: Tensor | None
) -> None:
    target, source = pair
    if target is not None and source is not None:
        if target.shape[:-1] != source.shape[:-1]:
            raise InputError(
                f"at {name!r} target sees {tuple(target.shape[:-1])} rows and source {tuple(source.shape[:-1])}: they "
                "cut one input into other pieces (register tokens, for one), so nothing corresponds"
            )
        found.setdefault(space, {}).setdefault(name, Moments()).add(rows_of(target, mask), rows_of(source, mask))


def _starts(
    target: Probe, source: Probe, shared: Collection[str], spaces: Mapping[str, str]
) -> list[tuple[str, str, str]]:
    """Where sums correspond but the layers behind them do not, as before all layers.

    Returns:
        (space, a site of target that adds to it, one of source).
    """
    known = {
        target.sites[n].carried for n in shared if spaces.get(str(target.sites[n].carried)) == source.sites[n].carried
    }
    found = []
    for space, partner in spaces.items():
        mine = next((name for name, site in target.sites.items() if site.carried == space), None)
        its = next((name for name, site in source.sites.items() if site.carried == partner), None)
        if space not in known and mine is not None and its is not None:
            found.append((space, mine, its))
    return found


def scores_of(evidence: Collected) -> dict[str, Tensor]:
    """Space -> its cross-moments (target units, source units), every module in units of its own spread."""
    return {
        space: torch.stack([one.normalised() for one in found.values()]).sum(0) for space, found in evidence.items()
    }


def _activations(
    form: Layout, sites: tuple[Site, Site], target: Seen, source: Seen, *, begins: bool
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """(space, (target's, source's)) of all that is seen at a site.

    Args:
        sites: target's and source's.
        begins: whether the sum before the module is the same one in both.
    """
    site = sites[0]
    axes = form.params[site.name]
    if site.name in form.embeddings:
        yield site.name, (target.y, source.y)
    sizes = {name: space.size for name, space in form.spaces.items()}
    for dim, axis in enumerate(axes.dims or ()):
        for space, start, length in ((p.space, *where) for p, *where in part_slices(axis, site.widths[dim], sizes)):
            if space is None or not form.spaces[space].moves or (dim in axes.inputs and is_stream(space)):
                continue  # the stream is seen where modules add to it
            if dim in axes.inputs:
                pair = target.x, source.x
            elif of_module(space):
                pair = target.own, source.own
            else:
                pair = target.y, source.y
            its_start, its_length = (n * sites[1].widths[dim] // site.widths[dim] for n in (start, length))
            yield space, (pair[0].narrow(-1, start, length), pair[1].narrow(-1, its_start, its_length))
    carries = target.carry, source.carry
    if begins and site.carried in form.spaces and carries[0] is not None and carries[1] is not None:
        yield str(site.carried), (carries[0], carries[1])
