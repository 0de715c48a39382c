"""Training and fine-tuning on a task: any transformers model, deterministic, quick enough for two cores.

`initialise` (see `initial.py`) writes a model with random weights; `train` trains a model and writes the result.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Generator, Tensor, nn
from tqdm import tqdm

from ..data.splits import BaseModel, ConfigDict, Field, class_names, model_validator
from ..data.tasks import LANGUAGE, SEQ2SEQ, ZERO_SHOT, TaskSpec, ValidationError, validation_text
from ..errors import InputError, TransfuseError
from ..files.checkpoint import Checkpoint
from ..files.open_clip import is_of_text_tower, text_config
from ..files.opening import open_checkpoint
from ..files.writing import check_output
from ..models.plan import LABEL_HEAD
from ..running.building import TEXT_CLASSIFIER
from ..running.inputs import Batch, Prepared, prepare
from ..running.live import LiveModel, load_class, load_live, of_checkpoint
from ..running.scores import Scores, evaluate, loss_of, prepared_for, score_dict
from ..update.training import orders
from .initial import InitSpec, TokenizerSpec, initialise, save
from .rehearsal import KeptSpec, rehearsed

__all__ = ["InitSpec", "TokenizerSpec", "TrainSpec", "fit", "initialise", "train", "train_spec"]

_AUTO = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    SEQ2SEQ: "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
}
# What a body is often saved without: the heads of language models, and poolers.
_NEW = re.compile(r"(cls|lm_head|predictions|generator_\w+|vocab_\w+|mlm\w*)\.|(.*\.)?pooler\.")
_LOGIT = re.compile(r"logit_(scale|bias)$")
_HEAD_STD = 0.02
_BETAS = (0.9, 0.999)
_RECENT = 50  # steps whose mean is the loss that is reported


class TrainSpec(BaseModel):
    """How a model is trained.

    Attributes:
        task: what on; its "train" split is used, and its "validation" split scores the result.
        epochs, steps: how long; exactly one is given.
        batch_size: rows of a step.
        lr: learning rate of AdamW after the warm-up.
        weight_decay: of matrices.
        warmup: share of the steps in which the learning rate rises from 0.
        schedule: how it goes on: "cosine" down to 0, or "constant".
        seed: of a new head, the order of rows, augmentation, masks and dropout.
        freeze: regular expressions; parameters whose name (in memory) one of them finds are not trained.
        train_text: zero-shot tasks: train the text tower and the logit scale, too. They are frozen by default.
        augment: "flip-crop" (left-right flips and shifts by up to an eighth), "shift" (only those) or "none".
        limit: at most so many training rows.
        shots: so many training rows of each class instead of all.
        clip_norm: largest norm of the gradient; None: any.
        keep: unlabelled inputs on which the model stays as it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: TaskSpec
    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    warmup: float = Field(default=0.1, ge=0, le=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    seed: int = 0
    freeze: list[str] = Field(default=[])
    train_text: bool = False
    augment: Literal["none", "flip-crop", "shift"] = "none"
    limit: int | None = Field(default=None, ge=1)
    shots: int | None = Field(default=None, ge=1)
    clip_norm: float | None = Field(default=1.0, gt=0)
    keep: KeptSpec | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give epochs or steps, one of them")
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"freeze: {pattern!r} is not a regular expression ({error})") from error
        return self


def train_spec(**fields: Any) -> TrainSpec:
    """A `TrainSpec` of these fields.

    Raises:
        InputError: a field is wrong; the message names it.
    """
    try:
        return TrainSpec(**fields)
    except ValidationError as error:
        raise InputError(f"training: {validation_text(error)}") from error


def train(
    base: str | Path,
    spec: TrainSpec,
    out: str | Path,
    *,
    data_dir: Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """Trains a model from the weights of `base` and writes it.

    Image and text classification get a new head (seeded) where base has none for these classes; a head for the same
    classes is trained further. Of a CLIP, text classification takes the text tower alone, its head on the text
    embedding. Zero-shot models are trained with the cross-entropy over class prototypes, seq2seq models with that of
    the tokens of the right targets.

    Args:
        base: model folder or hub id.
        spec: how to train. The same spec, base and number of threads give the same bytes on one device.
        out: folder to write: a transformers model with base's processors, and train.json.
        data_dir: where local data sets lie.
        device: where to compute.
        progress: bars on stderr.
        force: replace an existing model.

    Returns:
        `loss` (mean of the last steps), `validation` (scores by name; None without such a split), `steps`, `examples`
        and `seconds`.

    Raises:
        InputError: model, data or a pattern of `freeze` cannot be used.
        TransfuseError: the loss became NaN or infinite.
    """
    place, began = Path(out), time.monotonic()
    check_output(place, force=force)
    checkpoint = open_checkpoint(base)
    live = _start(checkpoint, spec, data_dir, device)
    for parameter in live.model.parameters():
        parameter.data = parameter.data.clone()  # it may be the checkpoint's own, which is not to change
    rows = _rows(live, spec, data_dir, progress)
    kept = None if spec.keep is None else rehearsed(live, spec.keep, spec.batch_size, spec.seed, data_dir)
    loss, steps = fit(live, spec, rows, kept, progress=progress)
    report = {
        "base": {"location": checkpoint.location, "fingerprint": checkpoint.fingerprint()},
        "spec": spec.model_dump(mode="json"),
        "steps": steps,
        "examples": len(rows),
        "loss": loss,
        "validation": _validate(live, spec, data_dir),
    }
    with tempfile.TemporaryDirectory() as folder:
        files = {"train.json": json.dumps(report, indent=2, sort_keys=True) + "\n"}
        save(live.model.cpu(), Path(folder), place, files, companions=checkpoint.companions, force=force)
    return {**report, "seconds": round(time.monotonic() - began, 1)}


def _rows(live: LiveModel, spec: TrainSpec, data_dir: Path | None, progress: bool) -> Prepared:
    """What is trained on."""
    chosen: dict[str, Any] = {"limit": spec.limit, "shots": spec.shots, "seed": spec.seed}
    return prepare(spec.task, "train", live, data_dir=data_dir, **chosen, progress=progress)


def _validate(live: LiveModel, spec: TrainSpec, data_dir: Path | None) -> Scores | None:
    data = spec.task.data
    if data.validation is None and not data.validation_share:
        return None
    rows = prepare(spec.task, "validation", live, data_dir=data_dir, limit=spec.limit)
    return score_dict(evaluate(live, spec.task, rows))


# --- the model to start from --------------------------------------------------------------------------------------


def _start(checkpoint: Checkpoint, spec: TrainSpec, data_dir: Path | None, device: str | torch.device) -> LiveModel:
    """Base's weights in the class that the task needs."""
    kind = spec.task.kind
    if kind == ZERO_SHOT:
        return load_live(checkpoint, device=device)
    config = {**checkpoint.config, "architectures": [_architecture(checkpoint, kind)]}
    names = list(checkpoint)
    if config["architectures"] == [TEXT_CLASSIFIER] and "text_config" in config:
        config = {**text_config(config), "architectures": config["architectures"]}
        names = [name for name in names if is_of_text_tower(name)]
    state = {name: checkpoint.tensor(name).float() for name in names}
    if kind not in (SEQ2SEQ, *LANGUAGE):
        classes = class_names(spec.task.data, data_dir)
        if config["architectures"] != checkpoint.config.get("architectures") or not _same_labels(config, classes):
            state = {name: tensor for name, tensor in state.items() if not LABEL_HEAD.match(name)}
            config = _with_labels(config, classes)
    model, loading = load_class(checkpoint.location, config, state)
    new = loading.missing | loading.mismatched
    if lacking := sorted(name for name in new if not (LABEL_HEAD.match(name) or _NEW.match(name))):
        raise InputError(f"{checkpoint.location}: it lacks weights of {type(model).__name__}: {', '.join(lacking[:5])}")
    _draw_new(model, new, torch.Generator().manual_seed(spec.seed))
    return of_checkpoint(checkpoint, model.to(device), config)


def _architecture(checkpoint: Checkpoint, kind: str) -> str:
    """Name of the class for a task: base's own if it is for such tasks."""
    import transformers

    auto = getattr(transformers, _AUTO[kind])
    named = (checkpoint.config.get("architectures") or [""])[0]
    if kind == "text-classification" and checkpoint.config.get("model_type") in ("clip", "clip_text_model"):
        return TEXT_CLASSIFIER
    try:
        built = type(transformers.AutoConfig.for_model(**checkpoint.config))
        found = auto._model_mapping[built]
    except (LookupError, ValueError, TypeError) as error:
        model_type = checkpoint.config.get("model_type")
        raise InputError(
            f"{checkpoint.location}: transformers has no {kind} class for model_type {model_type!r}"
        ) from error
    names = [one.__name__ for one in (found if isinstance(found, Sequence) else (found,))]
    return named if named in names else names[0]


def _same_labels(config: Mapping[str, Any], classes: Sequence[str]) -> bool:
    """Whether a head is one for these classes; names that say nothing count as theirs."""
    names = [str(name) for _, name in sorted((config.get("id2label") or {}).items(), key=lambda one: int(one[0]))]
    names = names or [f"LABEL_{number}" for number in range(int(config.get("num_labels", 2)))]
    generic = [f"LABEL_{number}" for number in range(len(classes))]
    return names in (list(classes), generic)


def _with_labels(config: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    labels = dict(enumerate(classes))
    rest = {key: value for key, value in config.items() if key not in ("num_labels", "problem_type")}
    return {**rest, "id2label": labels, "label2id": {name: number for number, name in labels.items()}}


@torch.no_grad()
def _draw_new(model: nn.Module, names: frozenset[str], generator: Generator) -> None:
    """Loading filled these from the global generator."""
    for name, parameter in model.named_parameters():
        if name not in names:
            continue
        if parameter.ndim > 1:
            parameter.normal_(0.0, _HEAD_STD, generator=generator)
        else:
            parameter.fill_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0)


# --- the loop -----------------------------------------------------------------------------------------------------


def fit(
    live: LiveModel,
    spec: TrainSpec,
    rows: Prepared,
    kept: Callable[[], Tensor] | None = None,
    *,
    progress: bool = False,
) -> tuple[float, int]:
    """Trains `live.model` in place; `kept`, if there is one, is another loss of every step.

    Returns:
        The mean loss of the last steps, and the number of steps.
    """
    trained = _freeze(live.model, spec)
    rows = _fixed_inputs(live, spec, rows)
    size = min(spec.batch_size, len(rows))
    steps = spec.steps or max(1, round((spec.epochs or 0) * (len(rows) // size)))
    optimizer = _optimizer(trained, spec)
    generator = torch.Generator().manual_seed(spec.seed)
    losses: list[Tensor] = []
    bar = tqdm(range(steps), desc="training", unit="step", disable=not progress)
    with _training(live, spec.seed):
        for step, index in zip(bar, orders(len(rows), size, generator), strict=False):
            batch = _augmented(rows.batch(index, generator), spec.augment, generator)
            loss = loss_of(live, spec.task, batch)
            optimizer.zero_grad()
            (loss if kept is None else loss + kept()).backward()
            if spec.clip_norm is not None:
                nn.utils.clip_grad_norm_(trained.values(), spec.clip_norm)
            _set_rate(optimizer, spec.lr * rate(step, steps, spec.warmup, spec.schedule))
            optimizer.step()
            losses = [*losses[1 - _RECENT :], loss.detach()]
            if step % _RECENT == 0 or step == steps - 1:
                _check_loss(loss, step)
    return torch.stack(losses).double().mean().item(), steps


def rate(step: int, steps: int, warmup: float, schedule: str) -> float:
    """The learning rate of a step as a share of the highest."""
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _freeze(model: nn.Module, spec: TrainSpec) -> dict[str, nn.Parameter]:
    """Marks what is trained, and returns it."""
    patterns = [re.compile(pattern) for pattern in spec.freeze]
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(pattern.search(name) for name in names):
            raise InputError(
                f"freeze: {pattern.pattern!r} finds no parameter of {type(model).__name__}, such as {names[0]}"
            )
    images_only = spec.task.kind == ZERO_SHOT and not spec.train_text
    for name, parameter in model.named_parameters():
        frozen = images_only and (is_of_text_tower(name) or _LOGIT.search(name))
        parameter.requires_grad_(not frozen and not any(pattern.search(name) for pattern in patterns))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise InputError("freeze: nothing is left to train")
    return trained


def _fixed_inputs(live: LiveModel, spec: TrainSpec, rows: Prepared) -> Prepared:
    """Class prototypes are computed once where the text tower is frozen."""
    frozen = not any(p.requires_grad for name, p in live.model.named_parameters() if is_of_text_tower(name))
    return prepared_for(live, spec.task, rows) if spec.task.kind == ZERO_SHOT and frozen else rows


def _optimizer(trained: Mapping[str, nn.Parameter], spec: TrainSpec) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in trained.values() if p.ndim > 1], "weight_decay": spec.weight_decay},
        {"params": [p for p in trained.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # One kernel for all tensors: with small models the loop over them would be a good part of a step.
    return torch.optim.AdamW(groups, lr=spec.lr, betas=_BETAS, fused=True)


def _set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


@contextmanager
def _training(live: LiveModel, seed: int) -> Iterator[None]:
    """Training mode; dropout, if the model has any, draws from the global generator, which is put back."""
    devices = [live.device] if live.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        live.model.train()
        try:
            yield
        finally:
            live.model.eval()


def _check_loss(loss: Tensor, step: int) -> None:
    if not torch.isfinite(loss):
        raise TransfuseError(f"training diverged: the loss of step {step} is {loss.item()}; lower the learning rate")


# --- augmentation -------------------------------------------------------------------------------------------------


def _augmented(batch: Batch, how: str, generator: Generator) -> Batch:
    if how == "none" or "pixel_values" not in batch:
        return batch
    return {**batch, "pixel_values": shifted(batch["pixel_values"], generator, flip=how == "flip-crop")}


def shifted(images: Tensor, generator: Generator, *, flip: bool) -> Tensor:
    """Every image shifted by up to an eighth of its size, and flipped left to right half the time.

    Args:
        images: (n, channels, height, width); what comes in from outside is 0.
    """
    n, _, height, width = images.shape
    pads = (height // 8, width // 8)
    padded = nn.functional.pad(images, (pads[1], pads[1], pads[0], pads[0]))
    top, left = (torch.randint(2 * pad + 1, (n, 1), generator=generator) for pad in pads)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if flip:
        columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns.flip(1), columns)
    chosen = torch.arange(n)[:, None, None], slice(None), rows[:, :, None], columns[:, None, :]
    # Indices on both sides of a slice put their own axes first: (n, height, width, channels).
    return padded[chosen].permute(0, 3, 1, 2)
