"""The heart of a port, for models that are open: maps are found (or checked), the task vector is carried."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..errors import VerificationError
from ..maps.collection import Maps
from ..methods.match import MatchOptions, match_models, open_inputs, stored_null
from ..methods.relation import relation
from ..methods.table import Method
from ..models.model import Models
from ..models.plan import Plan
from ..update.objects import Noise
from ..update.ported import Ported, transported, without_embeddings
from .given import check_maps
from .verify import Equivalence, check_equivalence

if TYPE_CHECKING:
    from ..running.inputs import Prepared
    from ..running.unlabelled import Inputs

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
        """One tensor of the ported model, by its name in the output."""
        return self.tensors.read(name)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of the ported model, in memory."""
        return {name: self.tensor(name) for name in self.tensors.steps}


def carry(
    models: Models,
    plan: Plan,
    method: Method,
    alpha: float,
    *,
    options: MatchOptions,
    maps: Maps | None = None,
    inputs: Inputs | None = None,
    about: Mapping[str, Any] = {},
    null_trials: int = 0,
    verify: bool = False,
    double: bool = False,
    progress: bool = False,
) -> PortResult:
    """A port of models that are open.

    Args:
        models, plan: what is carried, and what happens to every tensor.
        method, alpha, options, maps, inputs, null_trials, verify, double, progress: see `port`.
        about: what the report says beside.

    Raises:
        InputError, VerificationError: see `port`.
    """
    needs_inputs = maps is None or method.transport != "maps"
    prepared = open_inputs(models, method, inputs, options.seed) if needs_inputs else None
    if maps is None:
        found = match_models(models, method, options, inputs=prepared, null_trials=null_trials, progress=progress)
    else:
        found = check_maps(models, maps)
    checked = verify and found.spaces and method.group != "rotation"
    equivalence = _checked_equivalence(models, method, found, options.seed, double) if checked else None
    tensors = _updated(transported(models, plan, found, alpha), method, prepared, options, progress=progress)
    report = {**about, "method": method.name, "summary": method.summary, "alpha": alpha}
    return PortResult(report | _findings(models, method, found, equivalence), found, None, tensors)


def _updated(
    ported: Ported, method: Method, inputs: Prepared | None, options: MatchOptions, *, progress: bool
) -> Ported:
    """The port with the update of a method in the place of the plain task vector."""
    if ported.heads.passage.warning:
        log.warning("%s", ported.heads.passage.warning)
    if method.control:
        ported = ported.with_update(Noise(ported.update, options.seed))
    if method.transport == "maps":
        return without_embeddings(ported) if options.keep_embeddings else ported
    assert inputs is not None
    return _fitted(ported, method.transport, inputs, options, progress=progress)


def _fitted(ported: Ported, transport: str, inputs: Prepared, options: MatchOptions, *, progress: bool) -> Ported:
    """The same with target's modules fitted, or trained, to do what tuned does."""
    from ..update.distillation import DistilOptions, distil_port  # both need what evaluation needs
    from ..update.functional import FitOptions, fit_port

    about = {"device": options.device, "progress": progress}
    if transport == "train":
        return ported.fitted(distil_port(ported, inputs, DistilOptions(seed=options.seed), **about))
    start = without_embeddings(ported) if options.keep_embeddings else ported
    fitted = ported.fitted(fit_port(start, inputs, FitOptions(ridge=options.ridge), **about))
    return without_embeddings(fitted) if options.keep_embeddings else fitted


def _checked_equivalence(models: Models, method: Method, maps: Maps, seed: int, double: bool) -> Equivalence:
    """Runs the mapped source against source.

    Raises:
        VerificationError: they differ, although the method promises that they do not.
    """
    found = check_equivalence(models.source, models.layout, maps, seed=seed, double=double)
    if found.passed is False and not method.exact:
        log.warning("%s does not keep the function: the mapped source is off by %.1e", method.name, found.error)
    elif found.passed is False:
        raise VerificationError(
            f"the mapped source differs from source by {found.error:.1e} in {found.checked}; the maps do not keep the "
            f"function, so nothing was written. Please report this with the model's config. {found.reason}"
        )
    return found


def _findings(models: Models, method: Method, maps: Maps, equivalence: Equivalence | None) -> dict[str, Any]:
    return {
        "options": dict(maps.options),
        "match": {key: value for key, value in maps.report.items() if key != "null"},
        "relation": relation(models, maps, stored_null(maps)).as_dict(),
        "equivalence": None if equivalence is None else equivalence.as_dict(),
        "exportable": method.exportable,
        "lost_updates": None,  # known once every tensor was written
    }
