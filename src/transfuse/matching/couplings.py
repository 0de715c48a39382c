"""Optimal transport in place of assignment: one pass forward, one coupling for each space (Imfeld et al. 2024).

The ground cost of two units is the squared distance of the weights that compute them, whose inputs are mapped already.
Where the residual stream adds a branch to what comes in, the two maps are averaged (the paper's policy "averaging").
The coupling, times the number of units, carries weights; its transpose stands in for its inverse.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..maps.algebra import Coupling, Map
from ..spaces.layout import forward_position
from .protocols import CrossMoments
from .solution import Solution

# The value is that of the authors' code; here it is a share of the largest cost, so that it means the same for every
# space. Distances between rows of many weights are nearly equal, so this is soft, also between models that agree.
REGULARISATION = 0.08
ACCURACY = 1e-6  # of the sums of rows and columns, at which the iteration stops
_STREAM = re.compile(r"^(.*stream\.)(\d+)$")


@dataclass(frozen=True)
class Couplings:
    """The solver: a coupling for every space that moves, in the order of the forward pass.

    Attributes:
        solver: "sinkhorn" (entropic) or "emd" (exact).
    """

    solver: str

    def solve(self, evidence: CrossMoments) -> Solution:
        """The couplings, with the objective before and after.

        Args:
            evidence: of a layout with one stream a junction and flat heads.

        Raises:
            InputError: the package POT is not installed.
        """
        maps: dict[str, Map] = {}
        moving = [s.name for s in evidence.layout.spaces.values() if s.moves and evidence.holders(s.name)]
        for space in sorted(moving, key=forward_position):
            found = _solve(_costs(evidence, space, maps), self.solver)
            before = _STREAM.sub(lambda m: f"{m[1]}{int(m[2]) - 1}", space)
            before = evidence.layout.ties.get(before, before)
            if before != space and isinstance(incoming := maps.get(before), Coupling):
                found = (found + incoming.weight) / 2
            maps[space] = Coupling(found)
        return Solution(maps, [evidence.value(one) for one in ({}, maps)])


def _costs(evidence: CrossMoments, space: str, maps: dict[str, Map]) -> Tensor:
    """Squared distances (target unit, source unit) over the rows that compute the units."""
    products = evidence.cross(space, maps, rows=True)
    target, source = evidence.row_squares(space, maps)
    return (target[:, None] + source[None, :] - 2 * products).clamp_min(0).cpu()


def _solve(costs: Tensor, solver: str) -> Tensor:
    ot, size = _pot(), len(costs)
    costs = costs / costs.max().clamp_min(1e-30)
    mass = torch.full((size,), 1 / size, dtype=torch.float64)
    if solver == "emd":
        plan = ot.emd(mass.numpy(), mass.numpy(), costs.numpy())
    else:
        options = {"method": "sinkhorn_log", "stopThr": ACCURACY, "warn": False}
        plan = ot.sinkhorn(mass.numpy(), mass.numpy(), costs.numpy(), REGULARISATION, **options)
    return (torch.from_numpy(plan) * size).contiguous()


def _pot() -> Any:
    try:
        return importlib.import_module("ot")
    except ImportError as error:
        raise InputError(
            "optimal transport needs POT, which cannot be imported: pip install 'transfuse[ot]'"
        ) from error
