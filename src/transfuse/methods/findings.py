"""What matching by weights has to say about what it found, for reports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..evidence.weights import by_part
from ..maps.algebra import Map, PerHead
from ..matching.solution import Solution
from ..models.products import Products, cosine


def findings(found: Solution, before: Mapping[str, Products], after: Mapping[str, Products]) -> dict[str, Any]:
    """How a climb went, how alike the models are before and after, and where heads and units went.

    Args:
        found: what a solver found.
        before, after: products of the evidence with the bases as they are, and with the maps.
    """
    products = {"identity": before, "matched": after}
    similarity = {when: _similarity(one) for when, one in products.items()}
    return {
        "objective": found.objective,
        "sweeps": len(found.objective) - 1,
        "converged": found.converged,
        "similarity_identity": similarity["identity"],
        "similarity_matched": similarity["matched"],
        "identity_is_as_good": all(m.is_identity for m in found.maps.values())
        or similarity["identity"] > 0.999 * similarity["matched"],
        "fixed_points": {name: _fixed_points(one) for name, one in found.maps.items()},
        "heads": {
            key: {"order": head.tolist(), "spectral": found.spectral[key].tolist() if key in found.spectral else None}
            for key, head in _head_orders(found.maps).items()
        },
        "layers": {
            part: {when: cosine(one[name] for name in names) for when, one in products.items()}
            for part, names in by_part(before).items()
        },
    }


def _similarity(products: Mapping[str, Products]) -> float:
    """Cosine over all tensors, the objective's own scale."""
    both, target, source = (sum(one[i] for one in products.values()) for i in range(3))
    return both / (target * source) ** 0.5 if target and source else 0.0


def _head_orders(maps: Mapping[str, Map]) -> dict[str, Tensor]:
    return {name.split("/")[0]: one.heads.index for name, one in maps.items() if isinstance(one, PerHead)}


def _fixed_points(one: Map) -> float:
    """Share of the units that stay where they are; of matrices, of their weight."""
    flat = one.flat() if isinstance(one, PerHead) else one
    index = getattr(flat, "index", None)
    if index is not None:
        return float((index == torch.arange(len(index))).double().mean())
    return float(one.matrix().diagonal().clamp(0, 1).mean())
