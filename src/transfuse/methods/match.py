"""From two bases to maps: the matching half of every method."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError
from ..maps.collection import Maps
from ..models.model import ConfigLike, ModelLike, Models
from ..models.opening import open_models
from ..models.passes import ASCENT
from .method import Method
from .table import DEFAULT_METHOD, get_method

if TYPE_CHECKING:
    from ..matching.solution import Solution
    from ..running.inputs import Prepared
    from ..running.unlabelled import Inputs
    from .forms import Form


@dataclass(frozen=True)
class MatchOptions:
    """How maps are sought.

    Attributes:
        tie_qkv: one inner map for q, k and v of a head; None for the method's own choice.
        paper_form: heads and the units inside them are matched by q, k and v alone, as the equations of Rinaldi et al.
            2025 say (7 to 9); else the output projection counts in both, as in the authors' code.
        max_sweeps: sweeps at most.
        restarts: further climbs, each from the best maps so far, in part drawn anew; the best by objective is taken.
        ridge: of methods that fit: pull toward target's own weights (`functional.FitOptions`); None: chosen on inputs.
        keep_embeddings: of the port: no task vector for tables, positions and patches, as in Theseus (2602.12952).
        seed: of restarts and of the null test.
        device: where products are computed.

    Raises:
        InputError: a device that is not there.
    """

    tie_qkv: bool | None = None
    paper_form: bool = False
    max_sweeps: int = 100
    restarts: int = 0
    ridge: float | None = None
    keep_embeddings: bool = False
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        try:
            torch.zeros(1, device=self.device).cpu()
        except (RuntimeError, AssertionError, ImportError) as error:  # AssertionError: torch without CUDA
            raise InputError(f"device {self.device!r} cannot be used here: {str(error).splitlines()[0]}") from error


def match(
    source: ModelLike,
    target: ModelLike,
    *,
    method: str = DEFAULT_METHOD,
    family: str | None = None,
    config: ConfigLike = None,
    inputs: Inputs | None = None,
    null_trials: int = 1,
    progress: bool = False,
    **options: Any,
) -> Maps:
    """Finds which unit of source is which unit of target.

    Args:
        source, target: the two bases: directory, file, hub id, state dict or module.
        method: a row of `transfuse.METHODS`.
        family: layout family, if the config does not say it.
        config: added to both models' configs.
        inputs: unlabelled inputs (`evaluate.Inputs`), for methods that go by activations.
        null_trials: shuffled targets in the null test, whose result the maps then bring along; 0 leaves it out.
        progress: a bar on stderr.
        **options: fields of `MatchOptions`.

    Returns:
        Maps, which `port` takes for any number of fine-tunes of source.

    Raises:
        InputError: the models cannot be read or do not belong together.
    """
    row = get_method(method)
    models = open_models(source, target, family=family, config=config, need_layout=row.needs_layout)
    chosen = MatchOptions(**options)
    prepared = open_inputs(models, row, inputs, chosen.seed, progress=progress)
    return match_models(models, row, chosen, inputs=prepared, null_trials=null_trials, progress=progress)


def open_inputs(
    models: Models, method: Method, inputs: Inputs | None, seed: int, *, progress: bool = False
) -> Prepared | None:
    """The inputs that a method needs, processed for target; None: it needs none.

    Raises:
        InputError: it needs some and none are given, or they cannot be read.
    """
    if not method.needs_inputs:
        return None
    if inputs is None:
        raise InputError(
            f"method {method.name} goes by activations: give unlabelled inputs (--inputs TASK; 'synthetic' draws some, "
            "which serve worse)"
        )
    from ..running.live import of_checkpoint
    from ..running.probes import probe_of_model

    checkpoint = models.target.checkpoint
    live = of_checkpoint(checkpoint, probe_of_model(models.target, models.layout, "cpu").module, checkpoint.config)
    return inputs.open(live, seed, progress=progress)


def match_models(
    models: Models,
    method: Method,
    options: MatchOptions,
    *,
    inputs: Prepared | None = None,
    null_trials: int = 0,
    progress: bool = False,
) -> Maps:
    """`match` for models that are open; `inputs` as from `open_inputs`."""
    if not method.any_shape:
        models.need_one_shape(f"method {method.name}")
    form = method.form.with_inner_maps(options.tie_qkv)
    options = replace(options, tie_qkv=form.tie_qkv)
    about = {
        "family": models.layout.family,
        "method": method.name,
        "streams": form.streams,
        "tie_qkv": form.tie_qkv,
        "norms": form.norms,
        "source": models.survey.fingerprints["source"],
        "target": models.survey.fingerprints["target"],
        "options": asdict(options),
    }
    if not method.finds_maps:
        return Maps({}, **about)
    with models.passes.phase("match"):
        found, report = _found(models, method, form, options, inputs, null_trials, progress=progress)
    return Maps(found.maps, **about, report=report)


def _found(
    models: Models,
    method: Method,
    form: Form,
    options: MatchOptions,
    inputs: Prepared | None,
    null_trials: int,
    *,
    progress: bool,
) -> tuple[Solution, dict[str, Any]]:
    """What a solver finds, and the report on it."""
    gathered = method.evidence.gather(models, form, inputs, options, progress=progress)

    def solve(evidence: Any) -> Solution:
        with models.passes.phase(ASCENT):
            return method.solver.solve(evidence, form, options, progress=progress)

    found = solve(gathered)
    return found, method.evidence.report(gathered, found, solve, trials=null_trials, seed=options.seed)
