"""`port`: carry a fine-tune over, from three models to a checked and written fourth."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from .._version import __version__
from ..errors import InputError, VerificationError
from ..evidence.null import stored_null
from ..evidence.relation import DeltaReport, delta_report, is_nearer_to_target, relation
from ..families.binding import canonical_names
from ..files.checkpoint import open_checkpoint
from ..files.configs import Unavailable
from ..files.writing import check_output, write_checkpoint
from ..maps.algebra import PerHead, Rectangular
from ..maps.collection import Maps
from ..methods.auto import AUTO, Labelled, choose
from ..methods.match import MatchOptions, match_models, open_inputs
from ..methods.table import METHODS, Method, get_method
from ..models.model import ConfigLike, ModelLike, Models
from ..models.opening import open_models
from ..models.plan import LABEL_HEAD, LANGUAGE_HEAD, Plan, make_plan, output_config, output_files
from ..running.building import load_transformers
from ..update.ported import PortedTensors
from .card import model_card
from .verify import Equivalence, check_equivalence

if TYPE_CHECKING:
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
    tensors: PortedTensors = field(repr=False)

    def tensor(self, name: str) -> Tensor:
        """One tensor of the ported model, by its name in the output; the caller's own, to change as they like."""
        found = self.tensors.read(name)
        # Only sums are new: what is copied or carried can be the very tensor that an input holds.
        return found if self.tensors.steps[name].action == "add" else found.clone()

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors of the ported model, in memory."""
        return {name: self.tensor(name) for name in self.tensors.steps}


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
        source, tuned, target: old base, its fine-tune, new base: directory, file, hub id, state dict or module. What is
            in memory is copied: changing it afterwards does not change the result.
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
    delta = delta_report(models, heads_come=bool(plan.of("carry")))
    about = _about(models, plan, delta)
    if row is not None and not row.any_shape:
        models.need_one_shape(f"method {row.name}")
    if dry_run:
        tensors = PortedTensors(models, plan, Maps({}), alpha, None)
        log.info("%s", models.passes.text())
        name, summary = (AUTO, "takes a method when it runs") if row is None else (row.name, row.summary)
        named = {"method": name, "summary": summary, "alpha": alpha, "dry_run": True}
        return PortResult(about | named, Maps({}), None, tensors)
    if row is None:
        with models.passes.phase("choose"):
            choice = choose(models, inputs, chosen, null_trials=null_trials, progress=progress)
        log.info("method %s: %s", choice.method, choice.because)
        row, given, inputs = METHODS[choice.method], choice.maps, choice.inputs
        about["choice"] = choice.as_dict()
    checks = {"null_trials": null_trials, "verify": verify, "double": double, "progress": progress}
    result = carry(models, plan, row, alpha, maps=given, inputs=inputs, options=chosen, about=about, **checks)
    if labelled is not None:
        from .labelled import choose_by_labels  # builds on this module

        result = choose_by_labels(result, labelled, chosen)
    if place is not None:
        result.out = place
        write_port(result, place, verify=verify, force=force, progress=progress)
    return result


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
    """The heart of `port`, for models that are open: maps are found (or checked), the task vector is carried.

    Args:
        models, plan: what is carried, and what happens to every tensor.
        method, alpha, options, maps, inputs, null_trials, verify, double, progress: see `port`.
        about: what the report says beside.

    Raises:
        InputError, VerificationError: see `port`.
    """
    needs_inputs = maps is None or method.update.needs_inputs
    prepared = open_inputs(models, method, inputs, options.seed) if needs_inputs else None
    if maps is None:
        found = match_models(models, method, options, inputs=prepared, null_trials=null_trials, progress=progress)
    else:
        found = check_maps(models, maps)
    checked = verify and found.spaces and method.gives_mapped_source
    with models.passes.phase("check"):
        equivalence = _checked_equivalence(models, method, found, options.seed, double) if checked else None
    with models.passes.phase(method.update.transport):
        tensors = method.update.tensors(models, plan, found, alpha, prepared, options, progress=progress)
    report = {**about, "method": method.name, "summary": method.summary, "alpha": alpha}
    return PortResult(report | _findings(models, method, found, equivalence), found, None, tensors)


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


def write_port(
    result: PortResult,
    out: Path,
    *,
    card: Callable[[Models, Mapping[str, Any]], str] = model_card,
    verify: bool,
    force: bool,
    progress: bool,
) -> None:
    """Writes a result: weights, config, companions, `result.json` and a model card, all or nothing.

    Args:
        card: makes README.md from the models and the report.
        verify, force, progress: see `port`.

    Raises:
        InputError: it cannot be written there.
        VerificationError: what was written does not load.
    """
    tensors = result.tensors
    models, plan = tensors.models, tensors.plan
    file, config = output_config(plan, models)
    bar = tqdm(total=len(tensors.steps), desc="writing", unit="tensor", disable=not progress)

    def read(name: str) -> Tensor:
        bar.update()
        return tensors.read(name)

    def finish(folder: Path) -> dict[str, str]:
        result.report["lost_updates"] = tensors.lost_share
        if verify and models.target.checkpoint.kind == "transformers":
            result.report["loads"] = _check_loads(folder, config, models, [s.out for s in plan.of("carry")])
        report = json.dumps(result.report, indent=2, sort_keys=True) + "\n"
        return {"result.json": report, "README.md": card(models, result.report)}

    with models.passes.phase("write"):
        write_checkpoint(
            out,
            plan=output_files(plan, models.target),
            read=read,
            files={file: json.dumps(config, indent=2, sort_keys=True) + "\n"} if config else {},
            copy_from=models.target.checkpoint.companions,
            finish=finish,
            force=force,
        )
    bar.close()
    log.info("%s", models.passes.text())


def _check_loads(folder: Path, config: Mapping[str, Any], models: Models, carried: Iterable[str]) -> str:
    """Loads what was written in its real class; the name of that class.

    Raises:
        VerificationError: weights are missing that target or tuned has.
    """
    written = open_checkpoint(folder)
    try:
        model, loading = load_transformers(config, {name: written.tensor(name) for name in written})
    except Unavailable as error:
        return f"not checked: {error}"
    name = type(model).__name__
    if lost := sorted(one for one in loading.missing if _is_known(models, config, one)):
        raise VerificationError(f"the ported model does not load: {name} misses {lost[:5]}")
    if loading.mismatched:
        raise VerificationError(
            f"the ported model does not load: shapes differ in {name}: {sorted(loading.mismatched)}"
        )
    if ignored := sorted(loading.unexpected & set(carried)):
        raise VerificationError(
            f"{name} has no place for the carried {ignored[:5]}, so the head would be lost: tuned's config does not "
            'name its architecture; give it, e.g. --config \'{"architectures": ["BertForSequenceClassification"]}\''
        )
    return name


def _is_known(models: Models, config: Mapping[str, Any], name: str) -> bool:
    """Whether target or tuned has a weight of the model class; a body is often saved without its pooler."""
    known = canonical_names(models.family, [name], config)[name] if models.family else name
    return any(model is not None and known in model.disk for model in (models.target, models.tuned))


def refuse_inputs(models: Models, out: Path, maps: Maps | str | os.PathLike[str] | None) -> None:
    """An output in the place of an input, or around one, would destroy what it is made of.

    Raises:
        InputError: it would.
    """
    places = [(model.role, model.checkpoint.root) for model in models.all() if model.checkpoint.root is not None]
    if isinstance(maps, str | os.PathLike):
        places.append(("maps file", Path(maps)))
    for role, place in places:
        if place.resolve().is_relative_to(out.resolve()):
            raise InputError(f"{out} is where the {role} lies ({place}); give another place for the output")


def method_of_maps(maps: Maps) -> Method:
    """The method that made some maps.

    Raises:
        InputError: it is unknown here.
    """
    if maps.method not in METHODS:
        raise InputError(f"the maps were made by method {maps.method!r}, which this version does not know")
    return METHODS[maps.method]


def check_maps(models: Models, maps: Maps) -> Maps:
    """The maps, if they were made for these bases.

    Raises:
        InputError: they were made for others.
    """
    for model, wanted in ((models.source, maps.source), (models.target, maps.target)):
        if wanted != model.checkpoint.fingerprint():
            raise InputError(
                f"the maps were made for another {model.role} than {model.checkpoint.location} (fingerprints differ): "
                "match these two bases again"
            )
    if maps.family != models.layout.family:
        raise InputError(f"the maps are of family {maps.family!r}, the models of {models.layout.family!r}")
    spaces = models.layout.with_ties(streams=maps.streams, tie_qkv=maps.tie_qkv).spaces
    for name, one in maps.spaces.items():
        heads = len(one.inner) if isinstance(one, PerHead) else None
        wanted = None if METHODS[maps.method].form.flattens_heads else spaces[name].heads if name in spaces else None
        sized = isinstance(one, Rectangular) and models.resizing is not None
        fits = name in spaces and one.size == spaces[name].size and (sized or heads == wanted)
        if not fits:
            raise InputError(f"the map of space {name!r} does not fit the models: the maps file is damaged")
    return maps


def _about(models: Models, plan: Plan, delta: DeltaReport) -> dict[str, Any]:
    opened = {model.role: model.checkpoint.origin or model.checkpoint for model in models.all()}
    return {
        "transfuse": __version__,
        "family": models.layout.family,
        "facts": dict(models.layout.facts),
        "models": {role: {"location": one.location, "fingerprint": one.fingerprint()} for role, one in opened.items()},
        "tensors": plan.count(),
        "carried": [step.out for step in plan.of("carry")],
        "dropped": [step.name for step in plan.of("drop")],
        "delta": delta.as_dict(),
        "resized": models.about_shapes(),
        "warnings": _warnings(models, plan, delta),
    }


def _warnings(models: Models, plan: Plan, delta: DeltaReport) -> list[str]:
    """What looks like a mistake but need not be one; said on stderr too."""
    assert models.tuned is not None
    source, tuned, target = models.source, models.tuned, models.target
    found = []
    if delta.verdict in ("large", "unrelated"):
        found.append(
            f"the task vector is {delta.relative_norm:.2f} of the weights' norm, much for a fine-tune: "
            f"is {source.checkpoint.location} really the base of {tuned.checkpoint.location}?"
        )
    if models.resizing is None and is_nearer_to_target(models):
        found.append(
            f"{tuned.checkpoint.location} is nearer to {target.checkpoint.location} than to "
            f"{source.checkpoint.location}: are the arguments in order (OLD_BASE TUNED NEW_BASE)?"
        )
    if any(LABEL_HEAD.match(n) for n in source.disk) and not any(LABEL_HEAD.match(n) for n in tuned.disk):
        found.append("source has a classifier and tuned has none: are OLD_BASE and TUNED swapped?")
    heads = [one.name for one in plan.of("carry") if LANGUAGE_HEAD.match(one.name)]
    if models.resizing is not None and heads:
        found.append(
            f"the head of a language model ({heads[0]}, ...) is carried to another shape but not fitted there: train "
            "it further before use"
        )
    for line in found:
        log.warning("%s", line)
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
