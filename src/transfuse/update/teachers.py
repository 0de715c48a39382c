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
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import InputError
from ..running.inputs import Prepared
from ..running.probes import Probe, batches, rows_of
from ..running.scores import pooled
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
            total = total + FEATURES * error / spread.clamp_min(torch.finfo(error.dtype).tiny)
        return total


def _some(answer: Answer) -> Tensor:
    found = answer.scores if answer.scores is not None else answer.features
    assert found is not None
    return found


Ask = Callable[[Batch], Answer]


def answers(probe: Probe, inputs: Prepared, *, scores: bool = True, features: bool = False) -> Ask:
    """A model as one that is asked: by the prompts that come with the inputs, or by its head.

    Args:
        probe: the model. Of one of two towers features are normalised embeddings, of others what the body gives.
        inputs: whose prompts are used.
        scores, features: which of them are asked for; scores also where a model has nothing else to give.
    """
    prompts = probe.prompt_features(inputs) if scores else None
    if has_two_towers(probe):
        return lambda batch: _of_tower(probe, batch, prompts, features)
    return lambda batch: _of_head(probe, batch, features, scores)


def has_two_towers(probe: Probe) -> bool:
    return hasattr(probe.module, "get_image_features") and hasattr(probe.module, "get_text_features")


def _of_tower(probe: Probe, batch: Batch, prompts: Tensor | None, features: bool) -> Answer:
    found = functional.normalize(pooled(probe.run(batch)), dim=-1)
    scores = None
    if prompts is not None:
        scores = probe.module.logit_scale.detach().exp() * found @ prompts.T  # type: ignore[operator]
    return Answer(scores, found if features else None)


def _of_head(probe: Probe, batch: Batch, features: bool, scores: bool) -> Answer:
    body: Any = getattr(probe.module, "base_model", probe.module)
    seen: list[Any] = []
    hook = body.register_forward_hook(lambda *call: seen.append(call[2])) if features else None
    try:
        found: Any = probe.run(batch)
    finally:
        if hook is not None:
            hook.remove()
    mask = batch.get("decoder_attention_mask" if "decoder_input_ids" in batch else "attention_mask")
    hidden = getattr(seen[-1], "last_hidden_state", None) if seen else None
    # Where there is no body of its own, what the head says is all there is.
    logits = getattr(found, "logits", None) if scores or hidden is None else None
    return Answer(
        None if logits is None else rows_of(logits, mask),
        None if hidden is None else rows_of(hidden, mask),
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


def need_answers(answer: Answer) -> Answer:
    """The same.

    Raises:
        InputError: the model says nothing that another one could learn.
    """
    if answer.scores is None and answer.features is None:
        raise InputError("distillation needs class scores: a classifier, or prompts for a model of two towers")
    return answer
