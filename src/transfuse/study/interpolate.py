"""Linear mode connectivity: the loss on the straight line from the mapped source to the target.

theta(l) = (1 - l) pi(source) + l target (Entezari et al. 2022, 2110.06296). At l = 0 it computes what source does if
the maps keep the function, so that loss is a check of them on real data (Rinaldi et al. 2025, Fig. 5). Per-junction
maps need permuted skips P; towards the target, whose skips are identities, these are interpolated too ("linear"), or
are the nearest permutation to the mixture ("rounded": P before the middle, the identity from there on).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..data.splits import Split
from ..data.tasks import TaskSpec, load_task
from ..errors import InputError
from ..files.configs import Unavailable
from ..maps.algebra import Map
from ..maps.collection import Maps
from ..methods.match import match_models, open_inputs
from ..methods.skips import needed_skips, takes_skips
from ..methods.table import Method, method_for_maps
from ..models.folding import NO_FOLDING, map_state, norm_folding
from ..models.model import Model, ModelLike, Models
from ..models.opening import open_models
from ..options.requests import InterpolateRequest
from ..options.studies import Line
from ..porting.given import check_maps, given_maps, method_of_maps
from ..running.device import check_device
from ..running.inputs import prepare
from ..running.live import LiveModel, load_live, with_state
from ..running.scores import Scores, evaluate, score_dict
from ..running.skips import memory_names, permuted_skips_of
from ..spaces.layout import Layout

log = logging.getLogger(__name__)

State = dict[str, Tensor]
SkipForm = Literal["identity", "linear", "rounded"]


@dataclass(frozen=True)
class Curve:
    """One line between two models.

    Attributes:
        method: whose maps.
        skips: "identity" (stock skips), "linear" or "rounded".
        lambdas: ascending from 0 (mapped source) to 1 (target), 0.5 among them.
        scores: at each of them.
        barrier: largest loss minus what lies on the straight line between the losses of the two ends.
        barrier_to_source: the same with the loss of source itself at l = 0. A barrier is small between broken models:
            where the maps do not keep the function, this is the one to look at.
        midpoint_loss: loss at l = 0.5.
        ends: scores of the mapped source and of the target.
        source: scores of source itself.
        equivalence: difference between the losses of the mapped source and of source.
    """

    method: str
    skips: SkipForm
    lambdas: tuple[float, ...]
    scores: tuple[Scores, ...]
    barrier: float
    barrier_to_source: float
    midpoint_loss: float
    ends: tuple[Scores, Scores]
    source: Scores
    equivalence: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def interpolate(
    source: ModelLike,
    target: ModelLike,
    task: TaskSpec | str | Path,
    *,
    request: InterpolateRequest | None = None,
    **options: Any,
) -> list[Curve]:
    """Evaluates models on the line from source, carried by maps, to target. Heads are interpolated like all else.

    Args:
        source, target: two models of one class with heads of one shape.
        task: both are evaluated on it, with the processors of source: a spec, a YAML or JSON file, or JSON text.
        request, **options: what is asked for (`InterpolateRequest`), options by name over it (`method`, `maps`,
            `points`, `skips`, `split`, ...). Method "auto" is that of the maps, or "tied"; `double` runs in float64.

    Returns:
        A curve for each form of skips.

    Raises:
        InputError: the models cannot be read, do not belong together, or cannot have permuted skips; or an option.
    """
    asked = InterpolateRequest.asked(request, options)
    check_device(asked.run.device)
    task, data, run = load_task(task), asked.data, asked.run
    given = given_maps(asked.match)
    row = method_for_maps(asked.match.method) if given is None else method_of_maps(given)
    models = open_models(source, target, **vars(asked.opening), need_layout=row.needs_layout)
    models.need_one_shape("a line between two models")
    found = _maps(models, row, given, asked)
    forms, points = _forms(found, cast(SkipForm | None, asked.line.skips)), _points(asked.line)
    dtype = torch.float64 if asked.check.double else torch.float32
    how: dict[str, Any] = {"device": run.device, "dtype": dtype}
    live_source, live_target = (load_live(model.checkpoint, **how) for model in (models.source, models.target))
    which: dict[str, Any] = {"data_dir": data.data_dir, "limit": data.limit, "seed": run.seed}
    rows = prepare(task, cast(Split, data.split), live_source, **which, progress=run.progress)
    _warn_of_processors(live_source, live_target)

    def scores_of(live: LiveModel) -> Scores:
        return score_dict(evaluate(live, task, rows))

    line = _Line(models, found, live_target, scores_of, dtype)
    of_source = scores_of(live_source)
    return [_curve(row.name, form, points, [line.scores(x, form) for x in points], of_source) for form in forms]


class _Line:
    """The models between mapped source and target, and their scores; a model that two forms share runs once."""

    def __init__(
        self, models: Models, maps: Maps, live: LiveModel, scores_of: Callable[[LiveModel], Scores], dtype: torch.dtype
    ):
        self.layout = models.layout.with_ties(streams=maps.streams, tie_qkv=maps.tie_qkv)
        self.skips = needed_skips(maps, self.layout.ties)
        folding = norm_folding(models.layout, models.all()) if maps.norms == "folded" else NO_FOLDING
        near = map_state(models.source, self.layout, maps.spaces, dtype, folding)
        self.far = map_state(models.target, self.layout, {}, dtype, folding)
        self.near = _under_names_of(models, near)
        self.live, self.scores_of = live, scores_of
        self.known: dict[tuple[float, float], Scores] = {}

    def scores(self, at: float, form: SkipForm) -> Scores:
        """Scores at one point, with skips of one form."""
        strength = {"identity": 0.0, "linear": 1 - at, "rounded": float(at < 0.5)}[form]
        if (at, strength) not in self.known:
            live = with_state(self.live, self.state(at))
            try:
                with _skips_of(live, self.layout, self.skips, strength):
                    self.known[at, strength] = self.scores_of(live)
            except Unavailable as error:
                raise InputError(f"{live.location}: its skips cannot be permuted: {error}") from error
        return self.known[at, strength]

    def state(self, at: float) -> State:
        """Weights at one point; the ends are exactly those of the mapped source and of target."""
        mixed = {}
        for name, far in self.far.items():
            moves = far.is_floating_point() and at < 1
            mixed[name] = ((1 - at) * self.near[name] + at * far if at else self.near[name]) if moves else far
        return mixed


def _skips_of(
    live: LiveModel, layout: Layout, skips: Mapping[str, Map], strength: float
) -> AbstractContextManager[None]:
    if not skips or not strength:
        return nullcontext()
    return permuted_skips_of(
        live.model, layout, memory_names(live.model, layout, live.config), skips, strength=strength
    )


def _maps(models: Models, row: Method, given: Maps | None, asked: InterpolateRequest) -> Maps:
    if not row.gives_mapped_source:
        raise InputError(f"method {row.name} gives no mapped source, so there is no line from it to target")
    if given is not None:
        return check_maps(models, given)
    prepared = open_inputs(models, row, asked.inputs, asked.data, asked.run).task
    return match_models(models, row, asked.match, asked.change, asked.run, inputs=prepared)


def _under_names_of(models: Models, state: State) -> State:
    """Source's tensors under the names that target has on disk.

    Raises:
        InputError: one is missing, or of another shape.
    """
    found = {}
    for name, on_disk in models.target.disk.items():
        own = _own_name(models.source, name)
        if own is None or models.source.shape(name) != models.target.shape(name):
            fault = "is missing" if own is None else f"is {models.source.shape(name)}"
            raise InputError(
                f"tensor {name!r} of target {models.target.checkpoint.location} {fault} in source "
                f"{models.source.checkpoint.location}: there is no line between models with different heads"
            )
        found[on_disk] = state[own]
    return found


def _own_name(model: Model, name: str) -> str | None:
    """Where a model has a tensor, which may be left out as the equal of another one."""
    return model.disk.get(name) or model.disk.get(model.tied.get(name, ""))


def _forms(maps: Maps, wanted: SkipForm | None) -> list[SkipForm]:
    needed = takes_skips(maps)
    if wanted is None:
        return ["linear", "rounded"] if needed else ["identity"]
    return [wanted if needed else "identity"]


def _points(line: Line) -> tuple[float, ...]:
    given = [i / (line.points - 1) for i in range(line.points)] if line.lambdas is None else line.lambdas
    return tuple(sorted({0.0, 0.5, 1.0, *given}))


def _curve(
    method: str, form: SkipForm, points: tuple[float, ...], scores: Sequence[Scores], of_source: Scores
) -> Curve:
    losses = [one["loss"] for one in scores]
    return Curve(
        method=method,
        skips=form,
        lambdas=points,
        scores=tuple(scores),
        barrier=barrier(points, losses),
        barrier_to_source=barrier(points, [of_source["loss"], *losses[1:]]),
        midpoint_loss=losses[points.index(0.5)],
        ends=(scores[0], scores[-1]),
        source=of_source,
        equivalence=abs(losses[0] - of_source["loss"]),
    )


def barrier(lambdas: Sequence[float], losses: Sequence[float]) -> float:
    """Largest loss minus the straight line between the first and the last; infinite where one is not a number."""
    above = [
        loss - ((1 - at) * losses[0] + at * losses[-1]) for at, loss in zip(lambdas, losses, strict=True)
    ]  # zero at both ends
    return math.inf if any(math.isnan(one) for one in above) else max(above)


def _warn_of_processors(source: LiveModel, target: LiveModel) -> None:
    """Inputs are made once, as source takes them."""
    one, other = (live.image_processor for live in (source, target))
    if one is not None and other is not None and one.to_dict() != other.to_dict():
        log.warning(
            "%s and %s prepare images differently; both get them as the first does", source.location, target.location
        )
