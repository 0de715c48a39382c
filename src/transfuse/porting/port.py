"""`port`: carry a fine-tune over, from three models to a checked and written fourth."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..files.writing import check_output
from ..maps.collection import Maps
from ..methods.auto import choose
from ..methods.table import METHODS, Method, get_method
from ..models.model import ModelLike, Models
from ..models.opening import open_models
from ..models.plan import Plan, make_plan
from ..options.groups import AUTO
from ..options.requests import PortRequest
from ..running.device import check_device
from ..update.ported import transported
from .about import about_models
from .given import given_maps, method_of_maps, refuse_inputs
from .labelled import choose_by_labels
from .output import write_port
from .run import PortResult, carry

log = logging.getLogger(__name__)


def port(
    source: ModelLike,
    tuned: ModelLike,
    target: ModelLike,
    *,
    request: PortRequest | None = None,
    **options: Any,
) -> PortResult:
    """Carries a fine-tune of `source` over to `target`.

    Args:
        source, tuned, target: old base, its fine-tune, new base: directory, file, hub id, state dict or module.
        request, **options: what is asked for (`PortRequest`), options by name over it (`out`, `method`, `maps`,
            `inputs`, `alpha`, ...). Without `out` the result stays in memory (`PortResult.state_dict`).

    Returns:
        PortResult. The same inputs, options and seed give the same bytes.

    Raises:
        InputError: an input or option cannot be used.
        VerificationError: the mapped source is not source, or the output does not load; nothing is written.
    """
    return port_models(*opened(PortRequest.asked(request, options), source, tuned, target))


def opened(asked: PortRequest, source: ModelLike, tuned: ModelLike, target: ModelLike) -> tuple[Models, PortRequest]:
    """The models of a port, and what is asked for with its maps read; all that can be refused by now is.

    Raises:
        InputError: see `port`.
    """
    check_device(asked.run.device)
    maps, output = given_maps(asked.match), asked.output
    row = _method(asked, maps)
    if output.out is not None and not output.dry_run:
        check_output(output.out, force=output.force)
    needs_layout = None if row is None else row.needs_layout  # auto adds what it has no layout for as it is
    models = open_models(source, target, tuned, **vars(asked.opening), need_layout=needs_layout)
    if output.out is not None:
        refuse_inputs(models, output.out, asked.match.maps)
    return models, asked.changed(maps=maps)


def port_models(models: Models, asked: PortRequest) -> PortResult:
    """`port`, of models that are open.

    Args:
        models, asked: as from `opened`.
    """
    maps, output = asked.match.maps, asked.output
    row = _method(asked, maps)
    plan = make_plan(models)
    about = about_models(models, plan)
    if row is not None and not row.any_shape:
        models.need_one_shape(f"method {row.name}")
    if output.dry_run:
        return _planned(models, plan, row, asked.change.alpha, about)
    null = None
    if row is None:
        with models.passes.phase("choose"):
            choice = choose(models, asked)
        log.info("method %s: %s", choice.method, choice.because)
        row, maps, asked = METHODS[choice.method], choice.maps, asked.changed(inputs=choice.inputs)
        null = choice.null
        about["choice"] = choice.as_dict()
    result = carry(models, plan, row, asked, maps=maps, null=null, about=about)
    if asked.labelled.given:
        result = choose_by_labels(result, asked)
    if output.out is not None:
        result.out = output.out
        write_port(result, output.out, verify=asked.check.verify, force=output.force, progress=asked.run.progress)
    return result


def _method(asked: PortRequest, maps: Maps | None) -> Method | None:
    """The method that is asked for, or that of given maps; None: auto takes one.

    Raises:
        InputError: there is no such method, or labelled examples have nothing to choose.
    """
    named = asked.match.method
    row = method_of_maps(maps) if maps is not None else None if named == AUTO else get_method(named)
    if asked.labelled.given and row is not None:
        raise InputError("labelled examples choose the method and the scale, so they go with method auto alone")
    return row


def _planned(models: Models, plan: Plan, method: Method | None, alpha: float, about: Mapping[str, Any]) -> PortResult:
    """A dry run: what would be done."""
    log.info("%s", models.passes.text())
    name, summary = (AUTO, "takes a method when it runs") if method is None else (method.name, method.summary)
    named = {"method": name, "summary": summary, "alpha": alpha, "dry_run": True}
    return PortResult({**about, **named}, Maps({}), None, transported(models, plan, Maps({}), alpha))
