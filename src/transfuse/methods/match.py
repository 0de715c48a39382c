"""From two bases to maps: the matching half of every method."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..maps.collection import Maps
from ..maps.file import check_file
from ..models.model import ModelLike, Models
from ..models.opening import open_models
from ..models.passes import ASCENT
from ..options.groups import Change, Check, Data, Inputs, Keep, Match, Run
from ..options.requests import MatchRequest
from ..running.device import check_device
from ..running.given import Unlabelled
from .method import Method
from .table import method_for_maps

if TYPE_CHECKING:
    from ..matching.solution import Solution
    from ..running.inputs import Prepared
    from ..spaces.layout import Layout

log = logging.getLogger(__name__)


def match(source: ModelLike, target: ModelLike, *, request: MatchRequest | None = None, **options: Any) -> Maps:
    """Finds which unit of source is which unit of target.

    Args:
        source, target: the two bases: directory, file, hub id, state dict or module.
        request, **options: what is asked for (`MatchRequest`), options by name over it (`method`, `null_trials`, ...).
            Method "auto" is "tied" here; `out` is a file to write.

    Returns:
        Maps, which `port` takes for any number of fine-tunes of source. They bring along what the null test found.

    Raises:
        InputError: the models cannot be read or do not belong together, or an option cannot be used.
    """
    return match_bases(source, target, MatchRequest.asked(request, options))[1]


def match_bases(source: ModelLike, target: ModelLike, asked: MatchRequest) -> tuple[Models, Maps]:
    """`match`, with the models that it opened."""
    check_device(asked.run.device)
    row, out = method_for_maps(asked.match.method), asked.output.out
    if out is not None:
        check_file(out, force=asked.output.force, load=Maps.load)
    opening = asked.opening
    models = open_models(source, target, family=opening.family, config=opening.config, need_layout=row.needs_layout)
    prepared = open_inputs(models, row, asked.inputs, asked.data, asked.run).task
    maps = match_models(models, row, asked.match, asked.change, asked.run, inputs=prepared, check=asked.check)
    if out is not None:
        maps.save(out)
    return models, maps


def open_inputs(
    models: Models, method: Method, inputs: Inputs, data: Data = Data(), run: Run = Run(), *, keep: Keep = Keep()
) -> Unlabelled:
    """The inputs that a method needs, processed for target, if it needs any.

    Raises:
        InputError: it needs some and none are given, or they cannot be read.
    """
    if not method.needs_inputs:
        return Unlabelled()
    if not inputs.given:
        raise InputError(
            f"method {method.name} goes by activations: give unlabelled inputs (--inputs TASK; 'synthetic' draws some, "
            "'generated' lets a masked language model write them; both serve worse)"
        )
    from ..running.instances import let_go, probe_of
    from ..running.live import load_live, of_checkpoint
    from ..running.unlabelled import GENERATED, read_inputs

    checkpoint = models.target.checkpoint
    with models.passes.phase("inputs"):
        if GENERATED in (inputs.task, keep.task):
            live = load_live(checkpoint, device=run.device)  # which insists on a head that was trained
        else:
            live = of_checkpoint(checkpoint, probe_of(models, "target", "cpu").module, checkpoint.config)
    task = read_inputs(inputs, live, data, run)
    keeps = keep.given and keep.weight > 0 and method.update.needs_inputs
    held = read_inputs(keep, live, data, run) if keeps else None
    if held is not None and held.has_images != task.has_images:
        raise InputError(
            "of the inputs of the task and those to keep one are images and the other texts: what the port changes "
            "would not be held to anything"
        )
    found = Unlabelled(task, held, keep.weight)
    if not method.finds_maps:
        let_go(models)  # what comes runs tuned and the output alone
    return found


def match_models(
    models: Models,
    method: Method,
    match: Match = Match(),
    change: Change = Change(),
    run: Run = Run(),
    *,
    inputs: Prepared | None = None,
    check: Check = Check(null_trials=0),
) -> Maps:
    """`match` for models that are open, by a method of the table.

    Args:
        models, method: the two bases, and how they are matched.
        match, run: how maps are sought.
        change: what is asked of the port, which maps remember beside.
        inputs: as from `open_inputs`.
        check: the null test.
    """
    if not method.any_shape:
        models.need_one_shape(f"method {method.name}")
    form = method.form.with_inner_maps(match.tie_qkv)
    about = {
        "family": models.layout.family,
        "method": method.name,
        "streams": form.streams,
        "tie_qkv": form.tie_qkv,
        "norms": form.norms,
        "source": models.survey.fingerprints["source"],
        "target": models.survey.fingerprints["target"],
        "options": recorded(match, change, run, tie_qkv=form.tie_qkv),
    }
    if not method.finds_maps:
        return Maps({}, **about)
    split = _split_heads(models.layout) if form.tie_qkv else {}
    with models.passes.phase("match"):
        gathered = method.evidence.gather(models, form, inputs, run)

        def solve(evidence: Any) -> Solution:
            with models.passes.phase(ASCENT):
                return method.solver.solve(evidence, form, match, run)

        found = solve(gathered)
        report = method.evidence.report(gathered, found, solve, trials=check.null_trials, seed=run.seed)
    if method.evidence.needs_inputs and not method.update.needs_inputs:
        from ..running.instances import let_go

        let_go(models)
    return Maps(found.maps, **about, report=report | split)


def _split_heads(layout: Layout) -> dict[str, Any]:
    """For the report: heads in which q, k and v cannot share one inner map, as the method has it."""
    found = layout.unequal_heads()
    if found:
        places = ", ".join(f"{name.split('/')[0]} ({' and '.join(map(str, sizes))})" for name, sizes in found.items())
        log.warning(
            "q and k have another number of units than v, so they cannot share one map inside heads as this method has "
            "it, and keep one each: %s",
            places,
        )
    return {"split_heads": sorted(found)} if found else {}


def recorded(match: Match, change: Change, run: Run, *, tie_qkv: bool) -> dict[str, Any]:
    """The options that maps files and reports record; `tie_qkv` as it was in the end."""
    return {
        "tie_qkv": tie_qkv,
        "paper_form": match.paper_form,
        "max_sweeps": match.max_sweeps,
        "restarts": match.restarts,
        "ridge": change.ridge,
        "keep_embeddings": change.keep_embeddings,
        "seed": run.seed,
        "device": run.device,
    }
