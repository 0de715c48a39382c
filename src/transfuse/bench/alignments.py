"""What matching finds between two bases, made once for all tasks and kept with its maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..evidence.null import stored_null
from ..evidence.relation import relation
from ..maps.collection import Maps
from ..methods.match import match_models
from ..methods.table import METHODS
from ..models.opening import open_models
from ..options.groups import Check, Run
from ..options.requests import MethodRequest
from ..porting.planted import PLANTED_MAPS
from ..porting.verify import check_equivalence
from ..report.records import Alignment
from .recipes.parts import ORACLE, MethodSpec


def find_maps(source: str, target: str, method: MethodSpec, *, null_trials: int, seed: int, device: str) -> Maps:
    """The maps of a method, with their null test; of the oracle those that were planted."""
    if method.label == ORACLE:
        return Maps.load(Path(target) / PLANTED_MAPS)
    row = METHODS[method.method]
    models = open_models(source, target, need_layout=row.finds_maps)
    asked, run = MethodRequest.of(**method.options), Run(seed=seed, device=device)
    return match_models(models, row, asked.match, asked.change, run, check=Check(null_trials=null_trials))


def are_alike(source: str, target: str) -> bool:
    """Whether two bases are of one shape, so that weights can be matched."""
    return open_models(source, target, need_layout=None).resizing is None


def describe(source: str, target: str, maps: Maps, *, seed: int, regime: str, method: str) -> Alignment:
    """What there is to say about maps before any data: relation, equivalence, alignment by layer, heads."""
    row, report = METHODS[maps.method], maps.report
    models = open_models(source, target, need_layout=bool(maps.spaces))
    related = relation(models, maps, stored_null(maps))
    checked = check_equivalence(models.source, models.layout, maps) if maps.spaces else None
    return Alignment(
        seed=seed,
        regime=regime,
        method=method,
        exact=row.exact,
        exportable=row.exportable,
        verdict=related.verdict,
        text=related.text,
        null=_null_lines(report.get("null")),
        equivalence=None if checked is None else checked.as_dict(),
        layers=_layers(report),
        heads=_heads(report.get("heads", {})),
        towers=related.towers,
        similarity=(report["similarity_identity"], report["similarity_matched"]) if "sweeps" in report else None,
    )


def _null_lines(found: Mapping[str, Any] | None) -> dict[str, dict[str, float]] | None:
    """Of each tower what a table shows, and p-values; chance is the stricter of the two shuffles."""
    if not found:
        return None
    return {
        tower: {
            **{key: one[key] for key in ("identity", "matched", "excess", "z")},
            "chance": max(sum(one[key]) / len(one[key]) for key in ("entries", "orders")),
            **{key: value for key, value in (one.get("shared") or {}).items() if key.startswith("p_")},
        }
        for tower, one in found.items()
    }


def _layers(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    chance: dict[str, float] = {}
    for one in (report.get("null") or {}).values():
        chance |= one.get("layers", {})
    return {
        part: {**values, **({"chance": chance[part]} if part in chance else {})}
        for part, values in report.get("layers", {}).items()
    }


def _heads(found: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    shares = {}
    for group, one in found.items():
        order, spectral = one["order"], one.get("spectral")
        shares[group] = {"moved": sum(i != j for i, j in enumerate(order)) / len(order)}
        if spectral:
            shares[group]["as_spectra"] = sum(i == j for i, j in zip(order, spectral, strict=True)) / len(order)
    return shares
