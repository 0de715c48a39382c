"""How far a port has moved from the new base, on inputs.

Of language models that are fine-tuned, the divergence from the base on the task's own inputs says how much of
everything else is lost (Shenfeld et al. 2025, 2509.04259). Of ports it does not; that on inputs to keep does
(docs/benchmarks.md, "What predicts the loss?").
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..running.given import Unlabelled
from ..running.inputs import Prepared
from ..running.instances import let_go, probe_of
from ..running.probes import Probe, batches, probe_of_live
from ..running.scores import has_two_towers
from .live import live_of
from .ported import Ported
from .teachers import answers

# Looked at: inputs in all, inputs at once, and scores at once, which of a language model are many.
INPUTS, ROWS, SCORES = 512, 16, 2**22


@dataclass(frozen=True)
class Drift:
    """The distance of a model from another one on some inputs.

    Attributes:
        divergence: KL of its answers from the other's, in nats an input (a token); None where they answer other
            questions.
        changed: share of the inputs (tokens) on which the likeliest answer is another one; None as above.
        features: squared error of embeddings (models of two towers) or last hidden states, as a share of their own
            spread over the inputs; None where there are none.
    """

    divergence: float | None
    changed: float | None
    features: float | None


@torch.no_grad()
def drift(model: Probe, base: Probe, inputs: Prepared, *, same_head: bool) -> Drift:
    """How far a model is from its base.

    Args:
        model, base: of the same embeddings or hidden states.
        inputs: of any kind that both take; `INPUTS` of them are looked at.
        same_head: whether their scores answer the same question.
    """
    features = "embedding" if has_two_towers(base.module) else "body"
    mine, its = (answers(one, inputs, scores=same_head, features=features) for one in (model, base))
    sums: dict[str, float] = dict.fromkeys(("rows", "divergence", "changed", "tokens", "error", "square"), 0.0)
    mean: torch.Tensor | float = 0.0
    few = inputs.select(torch.arange(min(len(inputs), INPUTS)))
    for batch in batches(few, min(few.batch_size, ROWS)):
        here, there = mine(batch), its(batch)
        if here.scores is not None and there.scores is not None and here.scores.shape == there.scores.shape:
            step = max(1, SCORES // here.scores.shape[-1])
            for new, old in zip(here.scores.split(step), there.scores.split(step), strict=True):
                _add_answers(sums, new, old)
        if here.features is not None and there.features is not None and here.features.shape == there.features.shape:
            new, old = here.features.double(), there.features.double()
            sums["error"] += float((new - old).square().sum())
            sums["square"] += float(old.square().sum())
            mean = mean + old.sum(0)
            sums["tokens"] += len(old)
    rows, tokens = sums["rows"], sums["tokens"]
    spread = sums["square"] - float(torch.as_tensor(mean).square().sum()) / tokens if tokens else 0.0
    return Drift(_share(sums["divergence"], rows), _share(sums["changed"], rows), _share(sums["error"], spread))


def _add_answers(sums: dict[str, float], new: torch.Tensor, old: torch.Tensor) -> None:
    """The divergence of answers (rows, classes), and the rows on which the likeliest is another one."""
    new, old = (one.double().log_softmax(-1) for one in (new, old))
    chance = old.exp()
    # A class that is ruled out by both adds nothing.
    sums["divergence"] += float((torch.xlogy(chance, chance) - chance * new.masked_fill(chance == 0, 0.0)).sum())
    sums["changed"] += float((new.argmax(-1) != old.argmax(-1)).sum()) + (math.nan if new.isnan().any() else 0.0)
    sums["rows"] += len(new)


def _share(part: float, whole: float) -> float | None:
    """None where there is nothing to divide by, or where scores overflowed: JSON has no infinity."""
    found = part / whole if whole > 0 else math.nan
    return found if math.isfinite(found) else None


def drift_of(ported: Ported, inputs: Unlabelled, device: str) -> dict[str, Any]:
    """How far a port is from target: on the inputs of the task and, where there are any, on those to keep.

    Raises:
        InputError: a model cannot be run here.
    """
    given = {"task": inputs.task, "keep": inputs.keep}
    base = probe_of(ported.models, "target", device)
    live = live_of(ported, ported.state(), device=device, dtype=next(base.module.parameters()).dtype)
    model = probe_of_live(live, ported.models.layout)
    same_head = has_two_towers(base.module) or not ported.carried
    found = {
        name: asdict(drift(model, base, one, same_head=same_head)) for name, one in given.items() if one is not None
    }
    let_go(ported.models)
    return found
