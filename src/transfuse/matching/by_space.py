"""Maps of all spaces at once, from scores that depend on no other map: activations, unlike weights, need no ascent."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..maps.algebra import Map, Orthogonal, PerHead, Permutation, Rectangular
from ..spaces.layout import Layout, Space
from .assignment import best_permutation
from .heads import identity_heads, inner_maps, joint_heads, resized_heads
from .procrustes import best_rotation
from .protocols import SpaceMoments
from .solution import Solution


@dataclass(frozen=True)
class BySpace:
    """The solver: every space by itself.

    Attributes:
        group: see `best_maps`.
        keep_spreads: maps between different numbers of units give activations of target's size, not of source's.
    """

    group: str
    keep_spreads: bool = False

    def solve(self, evidence: SpaceMoments) -> Solution:
        """The best map of every space that something is known of."""
        form = evidence.layout
        maps = best_maps(evidence.scores, form, self.group, evidence.source_heads)
        if self.keep_spreads:
            maps = {name: _scaled(one, form.spaces[name], evidence) for name, one in maps.items()}
        return Solution(maps)


def _scaled(found: Map, space: Space, evidence: SpaceMoments) -> Map:
    """A map between different numbers of units, times the ratio of the spreads of both.

    Of queries and keys instead so that their products keep their size: those are divided by the root of a head's width.
    """
    if evidence.source_heads is None or not isinstance(found, Rectangular):
        return found
    spreads = evidence.spreads(space.name)
    if spreads is None:
        return found
    if re.search(r"/(qk|head)\b", space.name):
        widths = space.size / (space.heads or 1), found.source_size / (evidence.source_heads(space.name) or 1)
        return Rectangular(found.weight * (widths[0] / widths[1]) ** 0.25)
    return Rectangular(found.weight * (spreads[0] / spreads[1].clamp_min(1e-30)).sqrt())


def best_maps(
    scores: Mapping[str, Tensor], form: Layout, group: str, source_heads: Callable[[str], int | None] | None = None
) -> dict[str, Map]:
    """The best map of every space.

    Args:
        scores: space -> (target units, source units), as from `activations.scores_of`.
        form: whose spaces they are.
        group: "permutation"; "orthogonal": rotations where the layout allows them, permutations elsewhere; "rotation":
            rotations everywhere, heads whole.
        source_heads: space -> number of source's heads, where its sizes are others; rotations only.
    """
    known = {space: one for space, one in scores.items() if form.spaces[space].moves and one.any()}
    found: dict[str, Map] = {s: _best(known[s], form, s, group) for s in known if form.spaces[s].heads is None}
    inside = sorted((space for space in form.spaces.values() if space.heads and space.moves), key=_heads_of)
    for _, sharing in groupby(inside, key=_heads_of):
        spaces = list(sharing)
        if source_heads is not None:
            found |= _resized_heads(known, spaces, source_heads)
        else:
            found |= _best_heads(known, spaces, "permutation" if group == "permutation" else "orthogonal")
    return found


def _resized_heads(
    scores: Mapping[str, Tensor], spaces: list[Space], source_heads: Callable[[str], int | None]
) -> Mapping[str, Map]:
    known = {space.name: scores[space.name] for space in spaces if space.name in scores}
    count, other = spaces[0].heads, source_heads(spaces[0].name)
    return resized_heads(known, count, other) if known and count and other else {}


def _heads_of(space: Space) -> str:
    """Spaces inside the same heads have this in common."""
    return space.name.split("/")[0]


def _best_heads(scores: Mapping[str, Tensor], spaces: list[Space], inner: str) -> dict[str, PerHead]:
    """The maps of spaces inside the same heads.

    Units without scores (T5's position biases) have to go where their heads go, so those stay then.
    """
    count = spaces[0].heads or 0
    known = {space.name: scores[space.name] for space in spaces if space.name in scores}
    if len(known) == len(spaces):
        return joint_heads(known, count, inner)
    order = torch.arange(count)
    found = {space: inner_maps(one, order, inner) for space, one in known.items()}
    rest = [space for space in spaces if known and space.name not in known]
    return found | {space.name: identity_heads(count, space.size // count) for space in rest}


def _best(scores: Tensor, form: Layout, space: str, group: str) -> Map:
    if group == "rotation":
        found = best_rotation(scores)
        return Orthogonal(found) if found.shape[0] == found.shape[1] else Rectangular(found)
    if group == "orthogonal" and form.spaces[space].group == "rotation":
        return Orthogonal(best_rotation(scores, keep_ones=True))
    return Permutation(best_permutation(scores))
