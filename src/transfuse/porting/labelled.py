"""A few labelled examples decide between a method and naive, and for a scale."""

from __future__ import annotations

from typing import Any

from ..data.tasks import TaskSpec, load_task
from ..methods.auto import ALPHAS
from ..methods.table import get_method
from ..options.groups import Check, Labelled
from ..options.requests import PortRequest
from ..running.inputs import prepare
from ..running.live import with_state
from ..running.scores import evaluate, score_dict
from ..update.live import live_of
from .run import PortResult, carry


def choose_by_labels(result: PortResult, request: PortRequest) -> PortResult:
    """The result, or the naive one in its place, at the scale with the smallest loss on the examples.

    Nothing is fitted to the labels, so no example has to be held back: at most ten losses are compared.

    Args:
        result: of a port with the method that was chosen without labels.
        request: the examples, seed and device.

    Raises:
        InputError: the examples cannot be read, or fit no class of the model.
    """
    labelled = request.labelled
    task = load_task(labelled.task)
    tensors, first = result.tensors, result.report["method"]
    candidates, as_it_is = {first: result}, get_method("naive")
    if as_it_is.name not in candidates:
        plain = request.changed(alpha=1.0, check=Check(null_trials=0, verify=False))
        candidates[as_it_is.name] = carry(tensors.models, tensors.plan, as_it_is, plain)
    losses = {name: _losses(one, task, request) for name, one in candidates.items()}
    # Of equals the choice made without labels, and the smaller scale.
    best = min(((name, alpha) for name in losses for alpha in ALPHAS), key=lambda pair: losses[pair[0]][pair[1]])
    return _at(candidates[best[0]], best[1], result.report, losses, labelled)


def _losses(result: PortResult, task: TaskSpec, request: PortRequest) -> dict[float, float]:
    held = result.tensors.held()
    live = live_of(held, held.at(0.0).state(), device=request.run.device)
    how: dict[str, Any] = {"shots": request.labelled.per_class, "seed": request.run.seed}
    rows = prepare(task, "train", live, data_dir=request.data.data_dir, **how)
    return {a: score_dict(evaluate(with_state(live, held.at(a).state()), task, rows))["loss"] for a in ALPHAS}


def _at(
    result: PortResult, alpha: float, about: dict[str, Any], losses: dict[str, dict[float, float]], labelled: Labelled
) -> PortResult:
    """The result at a scale, with what was compared in its report."""
    method = result.report["method"]
    said = f"On {labelled.per_class} labelled examples of each class {method} at alpha {alpha:g} has the smallest loss."
    tried = {name: {f"{a:g}": loss for a, loss in one.items()} for name, one in losses.items()}
    choice = {**about["choice"], "method": method, "because": f"{about['choice']['because']} {said}", "losses": tried}
    report = {**about, **result.report, "alpha": alpha, "choice": choice}
    return PortResult(report, result.maps, result.out, result.tensors.at(alpha))
