"""`port`: carry a fine-tune over, from three models to a checked and written fourth."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..files.writing import check_output
from ..maps.collection import Maps
from ..methods.auto import AUTO, Labelled, choose
from ..methods.match import MatchOptions
from ..methods.table import METHODS, Method, get_method
from ..models.model import ConfigLike, ModelLike, Models
from ..models.opening import open_models
from ..models.plan import Plan, make_plan
from ..update.ported import transported
from .about import about_models
from .given import method_of_maps, refuse_inputs
from .labelled import choose_by_labels
from .output import write_port
from .run import PortResult, carry

if TYPE_CHECKING:
    from ..running.unlabelled import Inputs

log = logging.getLogger(__name__)


def port(
    source: ModelLike,
    tuned: ModelLike,
    target: ModelLike,
    *,
    out: str | os.PathLike[str] | None = None,
    method: str = AUTO,
    alpha: float = 1.0,
    maps: Maps | str | os.PathLike[str] | None = None,
    inputs: Inputs | None = None,
    labelled: Labelled | None = None,
    family: str | None = None,
    config: ConfigLike = None,
    null_trials: int = 1,
    verify: bool = True,
    double: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: bool = False,
    **options: Any,
) -> PortResult:
    """Carries a fine-tune of `source` over to `target`.

    Args:
        source, tuned, target: old base, its fine-tune, new base: directory, file, hub id, or state dict.
        out: folder to write; None keeps the result in memory (`PortResult.state_dict`).
        method: a row of `transfuse.METHODS`, or "auto" (`auto.py`), which looks at the models and takes one.
        alpha: scale of the task vector.
        maps: maps (or their file) from an earlier `match` of the same two bases.
        inputs: unlabelled inputs (`evaluate.Inputs`), for methods that go by activations.
        labelled: a few labelled examples, by which auto takes a scale, and naive where that is better.
        family, config: see `match`.
        null_trials: shuffled targets in the null test; 0 leaves it out. Given maps bring what was found with them.
        verify: run the mapped source against source, and load what was written.
        double: do that in float64.
        force: replace an existing output.
        dry_run: stop after planning: nothing is matched or written.
        progress: bars on stderr.
        **options: fields of `MatchOptions`.

    Returns:
        PortResult. The same inputs, options and seed give the same bytes.

    Raises:
        InputError: an input cannot be used.
        VerificationError: the mapped source is not source, or the output does not load; nothing is written.
    """
    if not math.isfinite(alpha):
        raise InputError(f"alpha is {alpha}; a finite number is needed")
    chosen = MatchOptions(**options)
    given = Maps.load(maps) if isinstance(maps, str | os.PathLike) else maps
    row = method_of_maps(given) if given is not None else None if method == AUTO else get_method(method)
    if labelled is not None and row is not None:
        raise InputError("labelled examples choose the method and the scale, so they go with method auto alone")
    place = None if out is None else Path(out)
    if place is not None and not dry_run:
        check_output(place, force=force)
    needs_layout = None if row is None else row.needs_layout  # auto adds what it has no layout for as it is
    models = open_models(source, target, tuned, family=family, config=config, need_layout=needs_layout)
    if place is not None:
        refuse_inputs(models, place, maps)
    plan = make_plan(models)
    about = about_models(models, plan)
    if row is not None and not row.any_shape:
        models.need_one_shape(f"method {row.name}")
    if dry_run:
        return _planned(models, plan, row, alpha, about)
    if row is None:
        with models.passes.phase("choose"):
            choice = choose(models, inputs, chosen, null_trials=null_trials, progress=progress)
        log.info("method %s: %s", choice.method, choice.because)
        row, given, inputs = METHODS[choice.method], choice.maps, choice.inputs
        about["choice"] = choice.as_dict()
    checks = {"null_trials": null_trials, "verify": verify, "double": double, "progress": progress}
    result = carry(models, plan, row, alpha, maps=given, inputs=inputs, options=chosen, about=about, **checks)
    if labelled is not None:
        result = choose_by_labels(result, labelled, chosen)
    if place is not None:
        result.out = place
        write_port(result, place, verify=verify, force=force, progress=progress)
    return result


def _planned(models: Models, plan: Plan, method: Method | None, alpha: float, about: Mapping[str, Any]) -> PortResult:
    """A dry run: what would be done."""
    log.info("%s", models.passes.text())
    name, summary = (AUTO, "takes a method when it runs") if method is None else (method.name, method.summary)
    named = {"method": name, "summary": summary, "alpha": alpha, "dry_run": True}
    return PortResult({**about, **named}, Maps({}), None, transported(models, plan, Maps({}), alpha))
