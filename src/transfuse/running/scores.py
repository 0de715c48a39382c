"""Models on data: scores, and the loss that training and scale learning differentiate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ..data.extras import need
from ..data.tasks import LANGUAGE, SEQ2SEQ, ZERO_SHOT, TaskSpec
from ..errors import InputError
from .inputs import Batch, Prepared, label_columns
from .live import LiveModel

Params = Mapping[str, Tensor] | None
Scores = dict[str, float]  # metric -> value


@dataclass(frozen=True)
class Score:
    """One number: accuracies, F1 and correlations as fractions, losses in nats per example (or token)."""

    metric: str
    value: float


def evaluate(live: LiveModel, task: TaskSpec, prepared: Prepared, *, progress: bool = False) -> list[Score]:
    """Runs a model on prepared inputs.

    Returns:
        `loss`, `accuracy` and `calibration_error` of classification (of seq2seq tasks the loss is the mean one of the
        tokens of the right targets, and accuracy how often these are the likeliest), `loss` and `perplexity` of
        language models; the primary metric if it is another; `examples`, the number of rows (blocks of tokens for
        language models).

    Raises:
        InputError: the model's class or head does not fit the task.
    """
    if task.kind in LANGUAGE:
        found = _language_scores(live, task, prepared, progress)
    else:
        found = _class_scores(live, task, prepared, progress)
    if task.primary not in found:
        raise InputError(f"metric {task.primary!r} does not exist for tasks of kind {task.kind}")
    return [*(Score(name, value) for name, value in found.items()), Score("examples", float(len(prepared)))]


def score_dict(scores: Sequence[Score]) -> Scores:
    """Scores by name."""
    return {one.metric: one.value for one in scores}


def loss_of(live: LiveModel, task: TaskSpec, batch: Batch, *, params: Params = None) -> Tensor:
    """Mean loss of one batch of `Prepared` (of an example, or of a predicted token), a scalar to be differentiated.

    Args:
        live: the model.
        task: what it is trained on.
        batch: from `Prepared.batch` or `.batches`.
        params: weights to use instead of the model's own, by their names in memory (see `live.module_params`).
    """
    batch = _to(batch, live.device)
    if task.kind in LANGUAGE:
        losses, count = _token_losses(live, task, batch, params)
        return losses / count
    if task.kind == SEQ2SEQ:
        targets = batch["targets"][batch["labels"]]
        losses, _ = _target_losses(live, batch, targets, params)
        return losses.sum() / (targets >= 0).sum()
    return functional.cross_entropy(class_logits(live, task, batch, params=params), batch["labels"])


def class_logits(live: LiveModel, task: TaskSpec, batch: Batch, *, params: Params = None) -> Tensor:
    """Logits (n, classes) in the order of the data's classes, float32 or float64.

    Those of a seq2seq task are the log-likelihoods of the texts that stand for the classes, summed over their tokens.

    A zero-shot model's class prototypes are the means, over the templates, of normalised text features, normalised
    again; its logits are exp(logit_scale) times the cosines with them (Radford et al. 2021, 3.1.4).
    """
    if task.kind == ZERO_SHOT:
        logits = _zero_shot_logits(live, task, batch, params)
    elif task.kind == SEQ2SEQ:
        logits = _target_scores(live, batch, params)
    else:
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "columns")}
        logits = getattr(_call(live, params, "forward", **inputs), "logits", None)
        if logits is None or logits.ndim != 2:
            raise InputError(
                f"{live.location}: the class {type(live.model).__name__} has no classifier, needed for {task.kind}"
            )
        if "columns" in batch:
            logits = logits[:, batch["columns"]]
    return _wide(logits)


def prompts_in(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The prompts in a batch, as inputs of a text tower; empty where there are none."""
    return {name.removeprefix("prompt_"): value for name, value in batch.items() if name.startswith("prompt_")}


def class_prototypes(live: LiveModel, task: TaskSpec, batch: Batch, *, params: Params = None) -> Tensor:
    """Class prototypes (classes, features) of a zero-shot model, from the prompts of a batch."""
    prompts = prompts_in(batch)
    features = _normalised(pooled(_call(live, params, "get_text_features", **prompts)))
    return _normalised(features.unflatten(0, (-1, len(task.templates))).mean(1))


def _zero_shot_logits(live: LiveModel, task: TaskSpec, batch: Batch, params: Params) -> Tensor:
    check_zero_shot(live)
    given = batch.get("prototypes")
    prototypes = class_prototypes(live, task, batch, params=params) if given is None else given
    features = _normalised(pooled(_call(live, params, "get_image_features", pixel_values=batch["pixel_values"])))
    scale = (params or {}).get("logit_scale", live.model.logit_scale)
    return scale.exp() * features @ prototypes.T  # type: ignore[operator]


def has_two_towers(model: nn.Module) -> bool:
    """Whether it is a CLIP or a SigLIP, whose embeddings are compared with those of the other tower."""
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def check_zero_shot(live: LiveModel) -> None:
    """Raises InputError for a model that has not both towers."""
    if not (has_two_towers(live.model) and hasattr(live.model, "logit_scale")):
        kind = type(live.model).__name__
        raise InputError(
            f"{live.location}: the class {kind} has no image and text tower; zero-shot tasks need CLIP or SigLIP"
        )


def pooled(output: Any) -> Tensor:
    """Features: older versions of transformers return the tensor itself."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _normalised(x: Tensor) -> Tensor:
    return functional.normalize(x, dim=-1)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _target_scores(live: LiveModel, batch: Batch, params: Params) -> Tensor:
    """The log-likelihood of every class's target (n, classes). The encoder runs once."""
    scores, encoded = [], None
    for target in batch["targets"]:
        alike = target[target >= 0].expand(len(batch["input_ids"]), -1)
        losses, encoded = _target_losses(live, batch, alike, params, encoded)
        scores.append(-losses.sum(1))
    return torch.stack(scores, 1)


def _target_losses(
    live: LiveModel, batch: Batch, targets: Tensor, params: Params, encoded: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The losses of the tokens of targets (n, length), 0 where these are padding, and what the encoder gave."""
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name not in ("labels", "targets")}
    inputs |= {"decoder_input_ids": shifted(live, targets), "use_cache": False}
    inputs |= {} if encoded is None else {"encoder_outputs": (encoded,)}
    found = _call(live, params, "forward", **inputs)
    losses = functional.cross_entropy(_wide(found.logits).transpose(1, 2), targets, reduction="none")
    return losses, found.encoder_last_hidden_state


def shifted(live: LiveModel, targets: Tensor) -> Tensor:
    """What the decoder sees before it writes targets (n, length), by the model's own rule."""
    shift = getattr(live.model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        kind = type(live.model).__name__
        raise InputError(f"{live.location}: the class {kind} has no decoder that writes texts, needed for {SEQ2SEQ}")
    try:
        return shift(targets)
    except ValueError as error:
        raise InputError(f"{live.location}: {error}") from error


class _Method(nn.Module):
    """A method of a model as a module, since `functional_call` runs only `forward`."""

    def __init__(self, model: nn.Module, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, **inputs: Any) -> Any:
        return getattr(self.model, self.method)(**inputs)


def _call(live: LiveModel, params: Params, method: str, **inputs: Any) -> Any:
    floating = {n: x.to(live.dtype) for n, x in inputs.items() if isinstance(x, Tensor) and x.is_floating_point()}
    inputs |= floating
    if params is None:
        return live.model(**inputs) if method == "forward" else getattr(live.model, method)(**inputs)
    given = {f"model.{name}": tensor for name, tensor in params.items()}
    return torch.func.functional_call(_Method(live.model, method), given, (), inputs)


def _to(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device) for name, tensor in batch.items()} if device.type != "cpu" else batch


# --- scores -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _class_scores(live: LiveModel, task: TaskSpec, prepared: Prepared, progress: bool) -> Scores:
    prepared = prepared_for(live, task, prepared)
    logits, labels = [], []
    for batch in _bar(prepared, progress):
        moved = _to(batch, live.device)
        logits.append(class_logits(live, task, moved).double().cpu())
        labels.append(batch["labels"])
    scores, truth = torch.cat(logits), torch.cat(labels)
    guess = scores.argmax(-1)
    found = {
        "loss": _mean_loss(task, prepared, scores, truth),
        "accuracy": (guess == truth).double().mean().item(),
        "calibration_error": calibration_error(scores, truth),
    }
    if task.primary not in found:
        found[task.primary] = _sklearn_score(task.primary, truth, guess, scores.shape[1])
    return found


def calibration_error(scores: Tensor, truth: Tensor, bins: int = 15) -> float:
    """How far confidence is from accuracy: the expected calibration error (Guo et al. 2017, 1706.04599, eq. 3).

    Args:
        scores: (n, classes), logarithms of probabilities up to a constant in each row.
        truth: (n,), the right classes.
        bins: of equal width, of the confidence in the guess.
    """
    confidence, guess = scores.double().softmax(-1).max(-1)
    surplus = (guess == truth).double() - confidence
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, surplus)
    return sums.abs().sum().item() / len(truth)


def _mean_loss(task: TaskSpec, prepared: Prepared, scores: Tensor, truth: Tensor) -> float:
    if task.kind != SEQ2SEQ:
        return functional.cross_entropy(scores, truth).item()
    tokens = (prepared.extra["targets"] >= 0).sum(1)[truth].sum()
    return -(scores.gather(1, truth[:, None]).sum() / tokens).item()


def prepared_for(live: LiveModel, task: TaskSpec, prepared: Prepared) -> Prepared:
    """Prepared inputs with what depends on the model but on no image: class prototypes, or the order of its labels."""
    if task.kind == SEQ2SEQ:
        return prepared
    if task.kind != ZERO_SHOT:
        return prepared.with_extra(columns=label_columns(live, prepared.classes))
    check_zero_shot(live)
    with torch.no_grad():
        prompts = {name: one for name, one in prepared.extra.items() if name.startswith("prompt_")}
        return prepared.with_extra(prototypes=class_prototypes(live, task, _to(prompts, live.device)))


def _sklearn_score(metric: str, truth: Tensor, guess: Tensor, classes: int) -> float:
    metrics = need("sklearn.metrics")
    if metric == "matthews_correlation":
        return float(metrics.matthews_corrcoef(truth.numpy(), guess.numpy()))
    if metric == "f1":
        average = "binary" if classes == 2 else "macro"
        return float(metrics.f1_score(truth.numpy(), guess.numpy(), average=average, zero_division=0))
    raise InputError(f"metric {metric!r} does not exist for classification")


@torch.no_grad()
def _language_scores(live: LiveModel, task: TaskSpec, prepared: Prepared, progress: bool) -> Scores:
    total, tokens = 0.0, 0.0
    for batch in _bar(prepared, progress):
        losses, count = _token_losses(live, task, _to(batch, live.device), None)
        total, tokens = total + losses.double().item(), tokens + count.item()
    loss = total / tokens
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def _token_losses(live: LiveModel, task: TaskSpec, batch: Batch, params: Params) -> tuple[Tensor, Tensor]:
    """Sum of the losses of all predicted tokens, and their number (at least 1)."""
    labels = batch["labels"]
    wanted = labels >= 0
    if task.kind == "causal-lm":
        labels = labels.roll(-1, dims=1)
        wanted = torch.arange(labels.shape[1], device=labels.device).expand_as(labels) < labels.shape[1] - 1
    with head_only_at(live.model, wanted):
        logits = getattr(_call(live, params, "forward", input_ids=batch["input_ids"]), "logits", None)
    if logits is None or logits.shape[-1] < 2:
        kind = type(live.model).__name__
        raise InputError(f"{live.location}: the class {kind} predicts no tokens, which {task.kind} needs")
    chosen = logits if logits.ndim == 2 else logits[wanted]
    losses = functional.cross_entropy(_wide(chosen), labels[wanted], reduction="sum")
    return losses, wanted.sum().clamp_min(1)


@contextmanager
def head_only_at(model: nn.Module, wanted: Tensor) -> Iterator[None]:
    """The head of a language model sees only the tokens to predict: with a small body it is most of the work."""
    head = next((one for name in ("cls", "lm_head") if isinstance(one := getattr(model, name, None), nn.Module)), None)
    if head is None:
        yield
        return

    def choose(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        same = bool(args) and isinstance(args[0], Tensor) and args[0].shape[:-1] == wanted.shape
        return (args[0][wanted], *args[1:]) if same else args

    handle = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        handle.remove()


def _bar(prepared: Prepared, progress: bool) -> Any:
    total = math.ceil(len(prepared) / prepared.batch_size)
    return tqdm(prepared.batches(), total=total, desc="evaluating", unit="batch", disable=not progress)
