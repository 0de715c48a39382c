"""Weights as evidence that unit j of source is unit i of target.

For a space s, M_s = sum over all tensors that hold it of <target row i, source row j>, every other axis already mapped.
The objective F(T) = sum over tensors of <target, T source> is what coordinate ascent climbs (Ainsworth et al. 2023).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from ..maps.algebra import Map
from ..maps.transport import SpaceMaps, part_slices, transport
from ..models.folding import NO_FOLDING, Folding
from ..models.model import Models
from ..models.products import Products
from ..models.sums import dot
from ..spaces.layout import Layout, part_of, tower_of

Reader = Callable[[str], Tensor]
Phase = Callable[[str], AbstractContextManager[object]]


class WeightEvidence:
    """Cross-moments of two sets of weights. Tensors are read when needed and never kept.

    Args:
        layout: the layout in the form that is matched (streams tied or not).
        source, target: read a tensor by its canonical name.
        names: tensors that both have.
        device: where the products are computed.
        phase: makes the context in which a phase of a run is measured (`passes.py`).
        known: products of the bases as they are, where these have been taken already.
    """

    def __init__(
        self,
        layout: Layout,
        source: Reader,
        target: Reader,
        names: Iterable[str],
        device: str | torch.device = "cpu",
        *,
        phase: Phase = nullcontext,
        known: Mapping[str, Products] | None = None,
    ):
        self.layout, self.source, self.target = layout, source, target
        self.names = tuple(names)
        self.device, self.phase = torch.device(device), phase
        self._known = known
        self.sizes = {name: space.size for name, space in layout.spaces.items()}
        self._holders: dict[str, list[str]] = {}
        self._fixed: dict[str, Tensor] = {}
        for name in self.names:
            for space in layout.params[name].spaces:
                self._holders.setdefault(space, []).append(name)

    def against(self, target: Reader) -> WeightEvidence:
        """The same evidence with another target (for the null test)."""
        return WeightEvidence(self.layout, self.source, target, self.names, self.device, phase=self.phase)

    def only(self, names: Iterable[str]) -> WeightEvidence:
        """The same evidence of some of the tensors."""
        return WeightEvidence(self.layout, self.source, self.target, names, self.device, phase=self.phase)

    def holders(self, space: str) -> list[str]:
        """Tensors of both models that have an axis in `space`."""
        return self._holders.get(space, [])

    def others(self, name: str, space: str) -> frozenset[str]:
        """The spaces whose maps a tensor's part of M_s depends on: those of its other axes."""
        dims = self.layout.params[name].dims or ()
        held = [frozenset(part.space for part in axis.parts if part.space) for axis in dims]
        beside = [spaces for spaces in held if space not in spaces] if not self.holds_twice(name, space) else held
        return frozenset(s for s in frozenset().union(*beside) if self.layout.spaces[s].moves)

    def cross(self, space: str, maps: SpaceMaps, *, known: frozenset[str] | None = None, rows: bool = False) -> Tensor:
        """M_s, shape (size, size) float64: entry (i, j) speaks for source unit j being target unit i.

        Args:
            maps: the maps of all other spaces.
            known: if given, tensors whose products depend on a map outside this set are left out (anchored start).
            rows: only tensors whose output axis holds the space (the paper's eq. 9 sees q, k, v but not o).
        """
        size = self.sizes[space]
        total = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        for name in self.holders(space):
            others = self.others(name, space)
            if (others or rows) and (known is None or others <= known):
                total += self._cross_of(name, space, maps, rows)
        return total if rows else total + self._fixed_cross(space)

    def rows(
        self, name: str, space: str, *choices: SpaceMaps, outputs: bool = False
    ) -> Iterator[tuple[bool, Tensor, list[Tensor]]]:
        """What a tensor, read once, says of the units of a space.

        Args:
            choices: maps of the other spaces, each of which gives source's rows once.
            outputs: only axes that are outputs.

        Yields:
            Of every part of an axis that is of the space: whether the axis is an input, target's rows, and source's for
            each of the maps: (size, everything else).
        """
        axes = self.layout.params[name]
        target, source = self._pair(name)
        for dim, axis in enumerate(axes.dims or ()):
            if (outputs and dim in axes.inputs) or all(part.space != space for part in axis.parts):
                continue
            moved = [target, *(transport(source, axes, maps, skip=dim) for maps in choices)]
            for part, start, length in part_slices(axis, target.shape[dim], self.sizes):
                if part.space == space:
                    rows = [_unfold(one.narrow(dim, start, length), dim) for one in moved]
                    yield dim in axes.inputs, rows[0], rows[1:]

    def row_squares(self, space: str, maps: SpaceMaps) -> tuple[Tensor, Tensor]:
        """Squared norms, (size,) float64 each, of the rows that `cross(rows=True)` multiplies: of target, of source."""
        totals = [torch.zeros(self.sizes[space], dtype=torch.float64, device=self.device) for _ in range(2)]
        for name in self.holders(space):
            for _, target, (source,) in self.rows(name, space, maps, outputs=True):
                for total, rows in zip(totals, (target, source), strict=True):
                    total += rows.double().square().sum(1)
        return totals[0], totals[1]

    def _fixed_cross(self, space: str) -> Tensor:
        """The part of M_s that no map changes, read once: embeddings, biases, norms, heads in public coordinates."""
        if space not in self._fixed:
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for name in self.holders(space):
                if not self.others(name, space):
                    total = total + self._cross_of(name, space, {}, rows=False)
            self._fixed[space] = total
        return self._fixed[space]

    def holds_twice(self, name: str, space: str) -> bool:
        """Whether two axes of a tensor hold the space, so that the objective is quadratic in its map."""
        dims = self.layout.params[name].dims or ()
        return sum(any(part.space == space for part in axis.parts) for axis in dims) > 1

    def value(self, maps: SpaceMaps, names: Iterable[str] | None = None) -> float:
        """F(T) over all tensors, or over `names`."""
        total = 0.0
        for name in self.names if names is None else names:
            target, source = self._pair(name)
            total += float((target * transport(source, self.layout.params[name], maps)).sum(dtype=torch.float64))
        return total

    def products_as_they_are(self) -> dict[str, Products]:
        """`products` of no maps."""
        return self.products({}) if self._known is None else {name: self._known[name] for name in self.names}

    def products(self, maps: SpaceMaps) -> dict[str, Products]:
        """Inner products of target and mapped source, tensor by tensor, in one pass over both."""
        found = {}
        for name in self.names:
            target, source = self._pair(name)
            moved = transport(source, self.layout.params[name], maps)
            pairs = ((target, moved), (target, target), (moved, moved))
            both, left, right = (dot(x, y) for x, y in pairs)
            found[name] = Products(both, left, right, target.ndim > 1)
        return found

    def spectra(self, space: str, *, output: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Singular values of every head's block, for each projection: lists of (heads, k) for target and source.

        Invariant to any permutation inside the blocks and of the stream (Rinaldi et al. 2025, appendix A.1), so they
        are needed once.

        Args:
            space: a space inside heads.
            output: whether the output projection's blocks count too (the paper takes q, k and v).
        """
        target, source = [], []
        heads = self.layout.spaces[space].heads or 1
        for name in self.holders(space):
            axes = self.layout.params[name]
            if axes.dims is None or len(axes.dims) < 2:
                continue
            for _, left, (right,) in self.rows(name, space, {}, outputs=not output):
                for found, rows in ((target, left), (source, right)):
                    found.append(torch.linalg.svdvals(rows.double().unflatten(0, (heads, -1))))
        return target, source

    def _cross_of(self, name: str, space: str, maps: SpaceMaps, rows: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for _, target, (source,) in self.rows(name, space, maps, outputs=rows):
            total = total + (target @ source.T).double()
        return total

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Target and source tensor, on the device, in float64 if either is, else float32."""
        target, source = self.target(name), self.source(name)
        double = torch.float64 in (target.dtype, source.dtype)
        dtype = torch.float64 if double else torch.float32
        return target.to(self.device, dtype), source.to(self.device, dtype)


Solve = Callable[[WeightEvidence], Mapping[str, Map]]
"""The maps that some matching finds."""


def _unfold(x: Tensor, dim: int) -> Tensor:
    """(n along `dim`, everything else)."""
    return x.movedim(dim, 0).reshape(x.shape[dim], -1)


def weight_evidence(models: Models, layout: Layout, device: str, folding: Folding = NO_FOLDING) -> WeightEvidence:
    """The evidence of two bases.

    Args:
        layout: the form that is matched.
        folding: of norm gains; what was folded is kept, since each step would fold it anew.
    """
    moving = [n for n in models.shared() if any(layout.spaces[s].moves for s in layout.params[n].spaces)]
    source, target = (partial(folding.read, model) for model in (models.source, models.target))
    if folding.factors:
        source, target = keeping(source), keeping(target)
    known = None if folding.factors else models.survey.products  # folded weights are others
    return WeightEvidence(layout, source, target, moving, device, phase=models.passes.phase, known=known)


def keeping(read: Reader, limit: int = 2**30) -> Reader:
    """A reader that keeps what was read, up to `limit` bytes, for tensors that cost more to make than to read."""
    kept: dict[str, Tensor] = {}
    room = [limit]

    def read_kept(name: str) -> Tensor:
        if name in kept:
            return kept[name]
        tensor = read(name)
        if tensor.nbytes <= room[0]:
            room[0] -= tensor.nbytes
            kept[name] = tensor
        return tensor

    return read_kept


def layers_by_tower(evidence: WeightEvidence) -> dict[str, list[str]]:
    """Tensors of the layers, without embeddings and heads, by tower ("model" where there is one)."""
    found: dict[str, list[str]] = {}
    for name in evidence.names:
        spaces = evidence.layout.params[name].spaces
        inside = [space for space in spaces if re.search(r"(^|\.)(heads|mlp)\.\d", space)]
        if inside:
            found.setdefault(tower_of(inside[0]) or "model", []).append(name)
    return found


def by_part(names: Iterable[str]) -> dict[str, list[str]]:
    """Tensors by part of the model: embeddings, each layer, the rest."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(part_of(name), []).append(name)
    return groups
