"""The scale of a task vector, chosen on validation data: transported once, evaluated at any number of scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..data.splits import Split
from ..data.tasks import TaskSpec, load_task
from ..errors import InputError
from ..models.model import ModelLike
from ..options.requests import PortRequest, SweepRequest
from ..porting.port import port
from ..running.inputs import Prepared, prepare
from ..running.live import LiveModel, load_live, with_state
from ..running.scores import Scores, evaluate, score_dict
from ..update.live import live_of
from ..update.ported import Ported


@dataclass(frozen=True)
class Sweep:
    """Scores by alpha, and those of the alpha that was chosen.

    Attributes:
        method: of the port.
        relation: verdict on the two bases, from weights alone.
        metric: the primary one, by which alpha was chosen.
        alphas: ascending.
        chosen_on: "validation", or "test" where the caller insisted.
        validation: scores of the task on that split, for each alpha.
        support: the same of the support task; None without one.
        chosen: the alpha with the best primary metric; of equals the smallest.
        test, test_support: scores of the chosen alpha on the test split, which is used for nothing else.
        zero_shot, zero_shot_support: the same for target without the task vector.
    """

    method: str
    relation: str
    metric: str
    alphas: tuple[float, ...]
    chosen_on: str
    validation: tuple[Scores, ...]
    support: tuple[Scores, ...] | None
    chosen: float
    test: Scores
    test_support: Scores | None
    zero_shot: Scores
    zero_shot_support: Scores | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def sweep(
    source: ModelLike,
    tuned: ModelLike,
    target: ModelLike,
    task: TaskSpec | str | Path,
    *,
    request: SweepRequest | None = None,
    **options: Any,
) -> Sweep:
    """Ports once, evaluates every alpha on validation data, and the best one on test data.

    Args:
        source, tuned, target: see `port`.
        task: what tuned was trained for: a spec, a YAML or JSON file, or JSON text.
        request, **options: what is asked for (`SweepRequest`), options by name over it (`alphas`, `support`, `method`,
            `limit`, ...); the limit holds for every split.

    Raises:
        InputError: an input or option cannot be used, or alpha is to be chosen on test data.
    """
    asked = SweepRequest.asked(request, options)
    how, run, task = asked.sweep, asked.run, load_task(task)
    scales = check_alphas(how.alphas)
    support_task = None if how.support is None else load_task(how.support)
    result = port(source, tuned, target, request=asked.shared(PortRequest))
    held = result.tensors.held()
    live = live_of(held, held.at(1.0).state(), device=run.device)
    data = {"data_dir": asked.data.data_dir, "limit": asked.data.limit, "seed": run.seed, "progress": run.progress}
    support = None if support_task is None else _Support.of(held, support_task, run.device)

    def on_task(state: Mapping[str, Tensor], rows: Prepared) -> Scores:
        return score_dict(evaluate(with_state(live, state), task, rows))

    def on_support(alpha: float, rows: Prepared | None) -> Scores | None:
        return None if support is None or rows is None else support.scores(held.at(alpha), rows)

    def rows_of(split: Split) -> tuple[Prepared, Prepared | None]:
        supported = None if support is None else prepare(support.task, split, support.live, **data)
        return prepare(task, split, live, **data), supported

    rows, support_rows = rows_of(cast(Split, how.choose_on))
    curve = [on_task(held.at(alpha).state(), rows) for alpha in scales]
    support_curve = [on_support(alpha, support_rows) for alpha in scales]
    chosen = choose_alpha(scales, curve, task)
    rows, support_rows = rows_of("test")
    return Sweep(
        method=result.report["method"],
        relation=result.report["relation"]["verdict"],
        metric=task.primary,
        alphas=scales,
        chosen_on=how.choose_on,
        validation=tuple(curve),
        support=tuple(one for one in support_curve if one is not None) or None,
        chosen=chosen,
        test=on_task(held.at(chosen).state(), rows),
        test_support=on_support(chosen, support_rows),
        zero_shot=on_task(held.zero_shot(), rows),
        zero_shot_support=on_support(0.0, support_rows),
    )


@dataclass(frozen=True)
class _Support:
    """The support task, and target's own model that it is measured on."""

    task: TaskSpec
    live: LiveModel

    @classmethod
    def of(cls, ported: Ported, task: TaskSpec, device: str) -> _Support:
        return cls(task, load_live(ported.models.target.checkpoint, device=device))

    def scores(self, ported: Ported, rows: Prepared) -> Scores:
        return score_dict(evaluate(with_state(self.live, support_state(ported)), self.task, rows))


def support_state(ported: Ported) -> dict[str, Tensor]:
    """Target under its own names and with its own head, plus what a port adds to the tensors it has."""
    target = ported.models.target
    state = {name: target.checkpoint.tensor(name) for name in target.checkpoint}
    moved = ported.state()
    for out, name in ported.added.items():
        on_disk = target.disk.get(name)
        if on_disk is not None:
            state[on_disk] = moved[out]
    return state


def choose_alpha(alphas: Sequence[float], scores: Sequence[Scores], task: TaskSpec) -> float:
    """The alpha with the best primary metric of a task; of equals the smallest, one that is not a number last."""
    sign = -1.0 if task.higher_is_better else 1.0
    values = [sign * one[task.primary] for one in scores]
    worst = [math.inf if math.isnan(value) else value for value in values]
    return min(zip(worst, alphas, strict=True))[1]


def check_alphas(alphas: Sequence[float]) -> tuple[float, ...]:
    """Alphas in ascending order, each once.

    Raises:
        InputError: there are none, or one is not a finite number.
    """
    if not alphas or not torch.tensor(list(alphas)).isfinite().all():
        raise InputError(f"alphas are {list(alphas)}; at least one, all finite, are needed")
    return tuple(sorted({float(alpha) for alpha in alphas}))
