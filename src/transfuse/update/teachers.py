"""What a model that is trained is told: by tuned on inputs of the task, by target on all others.

Where the bases have an answer of their own on the task, tuned's is not all that is known: what tuned took over from
source can be replaced by what target says. Let s, u and t be the scores of source, tuned and target on an input. The
share of u that s explains, over the inputs, is the squared correlation

    r^2 = <s, u>^2 / (<s, s> <u, u>),    scores centred over classes and over inputs,

and the teacher is u + r^2 (t - s): tuned's word where the bases do not speak (r^2 = 0), the change on top of target
where tuned is a small change of source (r^2 = 1). Ours; docs/benchmarks.md has what it is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import InputError
from ..running.inputs import Prepared
from ..running.probes import Probe, batches, rows_of
from ..running.scores import has_two_towers, pooled
from ..running.tokens import Batch

# A smaller share is what scores that have nothing in common have by chance.
SILENT = 0.02
# Weight of features beside scores: of the squared error relative to the teacher's own spread.
FEATURES = 6.0


@dataclass(frozen=True)
class Answer:
    """What a model says about a batch.

    Attributes:
        scores: (rows, classes), a logarithm of probabilities up to a constant; None: it gives none.
        features: (rows, width), what its body or its tower gives; None where they are not asked for.
    """

    scores: Tensor | None
    features: Tensor | None = None

    def distance(self, teacher: Answer) -> Tensor:
        """How far it is from a teacher's: the divergence of the scores, and the error of the features."""
        total = torch.zeros((), device=_some(self).device)
        if self.scores is not None and teacher.scores is not None:
            total = functional.kl_div(self.scores.log_softmax(-1), teacher.scores.softmax(-1), reduction="batchmean")
        if self.features is not None and teacher.features is not None:
            spread = (teacher.features - teacher.features.mean(0)).square().sum(-1).mean()
            error = (self.features - teacher.features).square().sum(-1).mean()
            # Features that are all the same have no spread but rounding's.
            floor = 1e-6 * teacher.features.square().sum(-1).mean() + torch.finfo(error.dtype).tiny
            total = total + FEATURES * error / torch.maximum(spread, floor)
        return total


def _some(answer: Answer) -> Tensor:
    found = answer.scores if answer.scores is not None else answer.features
    assert found is not None
    return found


Ask = Callable[[Batch], Answer]
Features = Literal["none", "embedding", "body"]


def answers(probe: Probe, inputs: Prepared, *, scores: bool = True, features: Features = "none") -> Ask:
    """A model as one that is asked.

    Args:
        probe: the model.
        inputs: whose prompts are used.
        scores: whether the scores of its head, or of the prompts that come with the inputs, are asked for.
        features: "embedding": the normalised embedding of a model of two towers; "body": what the layers give, before
            any head or projection, of all tokens.
    """
    prompts = probe.prompt_features(inputs) if scores else None

    def ask(batch: Batch) -> Answer:
        found, hidden = _run(probe, batch, with_body=features == "body")
        if not has_two_towers(probe.module):
            logits = getattr(found, "logits", None) if scores else None
            return Answer(None if logits is None else rows_of(logits, _mask(batch)), hidden)
        embedding = functional.normalize(pooled(found), dim=-1)
        scale = probe.module.logit_scale.detach().exp()  # type: ignore[operator]
        said = None if prompts is None else scale * embedding @ prompts.T
        return Answer(said, embedding if features == "embedding" else hidden)

    return ask


def says_something(probe: Probe) -> bool:
    """Whether it can teach: by a head, as all classes of transformers "For..." something have, or by embeddings."""
    return has_two_towers(probe.module) or "For" in type(probe.module).__name__


def _run(probe: Probe, batch: Batch, *, with_body: bool) -> tuple[Any, Tensor | None]:
    """What a model gives, and the last hidden states of its layers (tokens, width), if they are asked for."""
    if not with_body:
        return probe.run(batch), None
    seen: list[Any] = []
    hook = _body_of(probe, batch).register_forward_hook(lambda *call: seen.append(call[2]))
    try:
        found = probe.run(batch)
    finally:
        hook.remove()
    hidden = getattr(seen[-1], "last_hidden_state", None) if seen else None
    return found, None if hidden is None else rows_of(hidden, _mask(batch))


def _body_of(probe: Probe, batch: Batch) -> nn.Module:
    """The part of a model that has no head: the tower that the inputs are for, or the decoder, if it has any."""
    decoder = getattr(probe.module, "decoder", None)
    if "decoder_input_ids" in batch and isinstance(decoder, nn.Module):
        return decoder
    tower = getattr(probe.module, "vision_model" if "pixel_values" in batch else "text_model", None)
    return tower if isinstance(tower, nn.Module) else getattr(probe.module, "base_model", probe.module)


def _mask(batch: Batch) -> Tensor | None:
    return batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")


@torch.no_grad()
def need_alike(student: Ask, teacher: Ask, inputs: Prepared, what: str) -> None:
    """Raises InputError unless two models say something that can be compared.

    Args:
        what: what the inputs are, for the message.
    """
    batch = inputs.batch(torch.arange(min(2, len(inputs))))
    mine, its = student(batch), teacher(batch)
    pairs = (mine.scores, its.scores), (mine.features, its.features)
    shared = [(one.shape, other.shape) for one, other in pairs if one is not None and other is not None]
    if not shared:
        raise InputError(
            f"distillation needs class scores on {what}: a classifier, or prompts for a model of two towers; without, "
            "method functional carries a body"
        )
    if any(one != other for one, other in shared):
        raise InputError(
            f"on {what} the ported model and its teacher give {tuple(shared[0][0])} and {tuple(shared[0][1])}: they "
            "cannot be compared"
        )


def mixed(source: Ask, target: Ask, tuned: Ask, inputs: Prepared) -> tuple[Ask, float]:
    """Tuned's answer, with what it took over from source replaced by what target says; and the share that is.

    Args:
        source, target, tuned: on `inputs`.
        inputs: of the task, unlabelled; the share is taken over all of them.
    """
    share = _share(source, tuned, target, inputs)
    if share < SILENT:
        return tuned, 0.0

    def ask(batch: Batch) -> Answer:
        its, old, new = tuned(batch), source(batch), target(batch)
        features = its.features
        if its.features is not None and old.features is not None and new.features is not None:
            features = functional.normalize(its.features + share * (new.features - old.features), dim=-1)
        assert its.scores is not None and old.scores is not None and new.scores is not None
        return Answer(its.scores + share * (new.scores - old.scores), features)

    return ask, share


@torch.no_grad()
def _share(source: Ask, tuned: Ask, target: Ask, inputs: Prepared) -> float:
    """The squared correlation of the scores of source and tuned; 0 where a base gives none of the same classes.

    Only sums are kept: the scores of a language model on a few hundred texts do not fit into memory.
    """
    rows, products = 0, torch.zeros(3, dtype=torch.float64)
    sums: list[Tensor] = [torch.zeros(()), torch.zeros(())]
    for batch in batches(inputs):
        three = [ask(batch).scores for ask in (source, tuned, target)]
        if any(one is None or three[1] is None or one.shape != three[1].shape for one in three):
            return 0.0
        old, new = (one.double() - one.double().mean(-1, keepdim=True) for one in three[:2] if one is not None)
        rows += len(old)
        sums = [total.to(one) + one.sum(0) for total, one in zip(sums, (old, new), strict=True)]
        products += torch.stack([(a * b).sum() for a, b in ((old, new), (old, old), (new, new))]).cpu()
    left, right = (total.cpu() / max(rows, 1) for total in sums)
    means = torch.stack([(a * b).sum() for a, b in ((left, right), (left, left), (right, right))])
    together, *powers = (products - rows * means).tolist()
    # Scores that are the same on all inputs say nothing, but rounding of them would.
    if any(own <= 1e-12 * whole for own, whole in zip(powers, products[1:].tolist(), strict=True)):
        return 0.0
    return min(together**2 / (powers[0] * powers[1]), 1.0)
