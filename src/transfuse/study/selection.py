"""Which few examples of each class are used: at random, or by where they lie among the target's own features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ..data.extras import need
from ..data.splits import few_shot, load_split
from ..data.tasks import LANGUAGE, ZERO_SHOT, TaskSpec
from ..errors import InputError
from ..models.plan import LABEL_HEAD
from ..running.inputs import Prepared, prepare_rows
from ..running.live import LiveModel
from ..running.scores import check_zero_shot, loss_of, pooled

if TYPE_CHECKING:
    from datasets import Dataset

_CHUNK = 1024  # candidates whose distances to all others are held at once
_ROUNDS = 100  # of medoids: sums fall from one to the next, but for rounding


@dataclass(frozen=True)
class Shots:
    """A few examples.

    Attributes:
        rows: the examples.
        groups: class -> their positions in `rows`; of a language model, all blocks under "blocks".
        numbers: class -> their numbers among the training rows (or blocks) that were there to choose from.
    """

    rows: Prepared
    groups: Mapping[str, Tensor]
    numbers: Mapping[str, list[int]]


def choose_shots(
    task: TaskSpec,
    live: LiveModel,
    per_class: int,
    *,
    select: str = "random",
    pool: int | None = None,
    data_dir: Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Shots:
    """A few training rows of a task.

    Args:
        task: its "train" split is chosen from.
        live: the target; its features are what all choices but "random" look at.
        per_class: examples of each class; of a language model, which has no classes, blocks in all.
        select: "random", or a name in `SELECTIONS`.
        pool: at most so many training rows to choose from, drawn by the seed; None: all.
        data_dir: see `load_split`.
        seed: of the pool, of "random", and of the masks of masked-lm; the other choices have nothing random in them.
        progress: a bar on stderr.

    Raises:
        InputError: an option cannot be used, or a class has fewer examples.
    """
    check_selection(select, per_class)
    rows = load_split(task.data, "train", data_dir=data_dir, limit=pool, seed=seed)
    if select == "random" and task.kind not in LANGUAGE and "label" in rows.column_names:
        return _random_rows(task, live, rows, per_class, seed)
    prepared = prepare_rows(task, rows, live, seed=seed, progress=progress)
    groups = _groups(prepared, rows)
    if short := [name for name, group in groups.items() if len(group) < per_class]:
        what = f"class {short[0]!r} has only" if prepared.classes else "there are only"
        raise InputError(
            f"data set {task.data.path}: {what} {len(groups[short[0]])} training examples, fewer than {per_class}"
        )
    if select == "random":
        generator = torch.Generator().manual_seed(seed)
        chosen = {name: torch.randperm(len(one), generator=generator)[:per_class] for name, one in groups.items()}
    else:
        features = pooled_features(live, task, prepared, progress=progress)
        chosen = {name: SELECTIONS[select](features[group], per_class) for name, group in groups.items()}
    return _shots(prepared, {name: groups[name][index].sort().values for name, index in chosen.items()})


def check_selection(select: str, per_class: int) -> None:
    """Raises InputError for a selection that does not exist, or of nothing."""
    if select != "random" and select not in SELECTIONS:
        raise InputError(f"examples cannot be selected by {select!r}; known: random, {', '.join(SELECTIONS)}")
    if per_class < 1:
        raise InputError(f"{per_class} examples of each class; at least one is needed")


def _random_rows(task: TaskSpec, live: LiveModel, rows: Dataset, per_class: int, seed: int) -> Shots:
    """Rows are drawn before they are processed: of a large data set that is most of the work."""
    datasets = need("datasets")
    features = datasets.Features({"label": rows.features["label"], "row": datasets.Value("int64")})
    numbered = datasets.Dataset.from_dict({"label": rows["label"][:], "row": range(len(rows))}, features=features)
    try:
        numbers = few_shot(numbered, per_class, seed)["row"][:]
    except InputError as error:
        raise InputError(f"data set {task.data.path}, training rows: {error}") from error
    chosen = rows.select(numbers)
    prepared = prepare_rows(task, chosen, live, seed=seed)
    groups = _groups(prepared, chosen)
    return Shots(prepared, groups, {n: sorted(numbers[i] for i in prepared.rows[g]) for n, g in groups.items()})


def _groups(prepared: Prepared, rows: Dataset) -> dict[str, Tensor]:
    """Class -> positions of its examples."""
    if not prepared.classes:
        return {"blocks": torch.arange(len(prepared))}
    labels = torch.tensor(rows["label"][:])[prepared.rows]
    return {name: (labels == number).nonzero().flatten() for number, name in enumerate(prepared.classes)}


def _shots(pool: Prepared, chosen: Mapping[str, Tensor]) -> Shots:
    order = torch.cat(list(chosen.values())).sort().values
    groups = {name: torch.searchsorted(order, index) for name, index in chosen.items()}
    return Shots(pool.select(order), groups, {name: sorted(pool.rows[i].tolist()) for name, i in chosen.items()})


# --- features -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def pooled_features(live: LiveModel, task: TaskSpec, rows: Prepared, *, progress: bool = False) -> Tensor:
    """Features (n, d) of examples in the model, float64, of length 1.

    For zero-shot tasks the image features; else what enters the last linear layer of the classifier, or, as the mean
    over the predicted tokens, what enters the output embeddings of a language model.

    Raises:
        InputError: the model has no such layer.
    """
    read = _image_features if task.kind == ZERO_SHOT else _before_head
    batches = rows.batches() if rows.classes else rows.batches(1)  # of a language model's tokens, whose is whose
    bar = tqdm(batches, desc="features", unit="batch", disable=not progress)
    return functional.normalize(torch.cat([read(live, task, batch).double().cpu() for batch in bar]), dim=-1)


def _image_features(live: LiveModel, task: TaskSpec, batch: Mapping[str, Tensor]) -> Tensor:
    check_zero_shot(live)
    model: Any = live.model
    found = model.get_image_features(pixel_values=batch["pixel_values"].to(live.device, live.dtype))
    return pooled(found)


def _before_head(live: LiveModel, task: TaskSpec, batch: Mapping[str, Tensor]) -> Tensor:
    seen: list[Tensor] = []
    handles = [one.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for one in _heads(live)]
    try:
        loss_of(live, task, dict(batch))
    finally:
        for handle in handles:
            handle.remove()
    x, count = seen[-1], len(batch["labels"])
    # The sum over tokens has the direction of their mean, and the length goes.
    return x.reshape(count, x[..., 0].numel() // count, x.shape[-1]).sum(1)


def _heads(live: LiveModel) -> Sequence[nn.Module]:
    """The linear layers that may be the last one; of several the last that is called is meant."""
    model: Any = live.model
    output = model.get_output_embeddings()
    named = [one for name, one in model.named_modules() if isinstance(one, nn.Linear) and LABEL_HEAD.match(f"{name}.")]
    found = named if output is None else [output]
    if not found:
        raise InputError(
            f"{live.location}: the class {type(model).__name__} has no linear head whose inputs could be features; "
            "select examples at random"
        )
    return found


# --- which of the examples of one class -----------------------------------------------------------------------------


def herding(x: Tensor, k: int) -> Tensor:
    """Examples whose running mean stays nearest to the mean of all (Welling 2009, as in Rebuffi et al. 2017, alg. 4).

    Args:
        x: features (n, d).
        k: how many, at most n.

    Returns:
        Their positions (k,), in the order of choice.
    """
    mean, total = x.mean(0), torch.zeros_like(x[0])
    chosen: list[int] = []
    for count in range(1, k + 1):
        away = ((total + x) / count - mean).norm(dim=1)
        away[chosen] = torch.inf
        chosen.append(int(away.argmin()))
        total = total + x[chosen[-1]]
    return torch.tensor(chosen)


def k_medoid(x: Tensor, k: int) -> Tensor:
    """Examples to which the distances from all, each to the nearest, sum to little; arguments as of `herding`.

    Medoids are added one by one, each the best given those before it (the BUILD of Kaufman & Rousseeuw 1990); then
    every group takes its own best medoid until nothing changes (Park & Jun 2009); the sum never rises.
    """
    near, chosen = torch.full((len(x),), torch.inf, dtype=x.dtype), []
    for _ in range(k):
        costs = _costs(x, near)
        costs[chosen] = torch.inf
        chosen.append(int(costs.argmin()))
        near = near.minimum(torch.cdist(x[chosen[-1:]], x)[0])
    medoids = torch.tensor(chosen)
    for _ in range(_ROUNDS):
        better = _better_medoids(x, medoids)
        if torch.equal(better, medoids):
            break
        medoids = better
    return medoids


def _better_medoids(x: Tensor, medoids: Tensor) -> Tensor:
    owner = torch.cdist(x, x[medoids]).argmin(1)
    owner[medoids] = torch.arange(len(medoids))  # of equal medoids, too, each is in a group of its own
    better = medoids.clone()
    for number, old in enumerate(medoids.tolist()):
        group = (owner == number).nonzero().flatten()
        costs = _costs(x[group], torch.full((len(group),), torch.inf, dtype=x.dtype))
        if costs.min() < costs[group == old].item():
            better[number] = group[costs.argmin()]
    return better


def _costs(x: Tensor, near: Tensor) -> Tensor:
    """Sum over all of the distance to the nearest medoid, were an example one too, for each example (n,)."""
    return torch.cat([torch.cdist(part, x).minimum(near).sum(1) for part in x.split(_CHUNK)])


def coreset(x: Tensor, k: int) -> Tensor:
    """The example nearest to the mean, then always that farthest from all chosen (Gonzalez 1985); see `herding`."""
    chosen = [int((x - x.mean(0)).norm(dim=1).argmin())]
    near = torch.cdist(x[chosen], x)[0]
    while len(chosen) < k:
        near[chosen] = -torch.inf
        chosen.append(int(near.argmax()))
        near = near.minimum(torch.cdist(x[chosen[-1:]], x)[0])
    return torch.tensor(chosen)


SELECTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {"herding": herding, "k-medoid": k_medoid, "coreset": coreset}
