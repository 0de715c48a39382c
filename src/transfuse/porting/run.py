"""The heart of a port, for models that are open: maps are found (or checked), the task vector is carried."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import VerificationError
from ..evidence.null import NullTest, stored_null
from ..evidence.relation import relation
from ..maps.collection import Maps
from ..methods.match import match_models, open_inputs, recorded
from ..methods.table import Method
from ..models.model import Models
from ..models.plan import Plan
from ..options.requests import PortRequest
from ..running.given import Unlabelled
from ..running.instances import idle_of
from ..update.ported import Ported, transported
from .given import check_maps
from .verify import Equivalence, check_equivalence

log = logging.getLogger(__name__)


@dataclass
class PortResult:
    """A port: its tensors, made when asked for, and everything there is to say about it.

    Attributes:
        report: what `result.json` holds.
        maps: the maps that were used.
        out: where it was written, if it was.
        tensors: the tensors of the ported model, made when asked for.
    """

    report: dict[str, Any]
    maps: Maps
    out: Path | None
    tensors: Ported = field(repr=False)

    def tensor(self, name: str) -> Tensor:
        """One tensor of the ported model, by its name in the output; the caller's own, to change as they like."""
        found = self.tensors.read(name)
        # Only sums are new: what is copied or carried can be the very tensor that an input holds.
        return found if self.tensors.steps[name].action == "add" else found.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of the ported model, in memory."""
        return {name: self.tensor(name) for name in self.tensors.steps}


def carry(
    models: Models,
    plan: Plan,
    method: Method,
    request: PortRequest,
    *,
    maps: Maps | None = None,
    null: Mapping[str, NullTest] | None = None,
    about: Mapping[str, Any] = {},
) -> PortResult:
    """A port of models that are open.

    Args:
        models, plan: what is carried, and what happens to every tensor.
        method: how.
        request: everything else that is asked for.
        maps: those that were found before.
        null: a null test of the bases that was run before; that of the maps comes first.
        about: what the report says beside.

    Raises:
        InputError, VerificationError: see `port`.
    """
    match, change, run = request.match, request.change, request.run
    needs_inputs = maps is None or method.update.needs_inputs
    prepared = (
        open_inputs(models, method, request.inputs, request.data, run, keep=request.keep)
        if needs_inputs
        else Unlabelled()
    )
    if maps is None:
        found = match_models(models, method, match, change, run, inputs=prepared.task, check=request.check)
    else:
        found = check_maps(models, maps)
    checked = request.check.verify and found.spaces and method.gives_mapped_source
    with models.passes.phase("check"):
        equivalence = _checked_equivalence(models, method, found, run.seed, request.check.double) if checked else None
    ported = transported(models, plan, found, change.alpha)
    warnings = method.update.warnings(prepared, {"keep": request.keep.given, "polish": change.polish})
    for line in warnings:
        log.warning("%s", line)
    if ported.heads.passage.warning:
        log.warning("%s", ported.heads.passage.warning)
    with models.passes.phase(method.update.transport):
        tensors = method.update.of(ported, prepared, change, run)
    with models.passes.phase("drift"):
        moved = method.update.drift(tensors, prepared, run)
    report = {**about, "method": method.name, "summary": method.summary, "alpha": change.alpha}
    report |= {**method.update.report(prepared, change), "warnings": [*report.get("warnings", []), *warnings]}
    report |= {} if moved is None else {"drift": moved}
    report |= _options(found, recorded(match, change, run, tie_qkv=found.tie_qkv))
    return PortResult(report | _findings(models, method, found, equivalence, null), found, None, tensors)


# Options that only say how maps are sought.
_SEEKING = ("paper_form", "max_sweeps", "restarts")


def _options(maps: Maps, own: Mapping[str, Any]) -> dict[str, Any]:
    """The options of this run; beside them those that its maps were made with, where they are from another one."""
    made = dict(maps.options)
    if own == made:
        return {"options": made}
    return {"options": {key: one for key, one in own.items() if key not in _SEEKING}, "maps_options": made}


def _checked_equivalence(models: Models, method: Method, maps: Maps, seed: int, double: bool) -> Equivalence:
    """Runs the mapped source against source.

    Raises:
        VerificationError: they differ, although the method promises that they do not.
    """
    found = check_equivalence(models.source, models.layout, maps, seed=seed, double=double, idle=idle_of(models))
    if found.passed is False and not method.exact:
        log.warning("%s does not keep the function: the mapped source is off by %.1e", method.name, found.error)
    elif found.passed is False:
        raise VerificationError(
            f"the mapped source differs from source by {found.error:.1e} in {found.checked}; the maps do not keep the "
            f"function, so nothing was written. Please report this with the model's config. {found.reason}"
        )
    return found


def _findings(
    models: Models,
    method: Method,
    maps: Maps,
    equivalence: Equivalence | None,
    null: Mapping[str, NullTest] | None,
) -> dict[str, Any]:
    return {
        "match": {key: value for key, value in maps.report.items() if key != "null"},
        "relation": relation(models, maps, stored_null(maps) or null).as_dict(),
        "equivalence": None if equivalence is None else equivalence.as_dict(),
        "exportable": method.exportable,
        "lost_updates": None,  # known once every tensor was written
    }
