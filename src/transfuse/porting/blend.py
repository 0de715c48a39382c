"""A port for every scale of its task vector."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..models.plan import output_config
from ..running.live import LiveModel, load_live
from .port import PortResult


@dataclass(frozen=True)
class Blend:
    """A port for every alpha: theta(alpha) = target + alpha * update (Rinaldi et al. 2025, eq. 13).

    All mappings go by the name in the output.

    Attributes:
        target: target's tensors that something is added to.
        update: what is added at alpha 1, in float32 or float64.
        fixed: tensors that alpha does not scale: heads that came along, target's own.
        unmoved: the heads that came along, as they are in tuned.
        names: the canonical names.
    """

    target: Mapping[str, Tensor]
    update: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor]
    unmoved: Mapping[str, Tensor]
    names: Mapping[str, str]

    def state(self, alpha: float | Mapping[str, float] = 1.0) -> dict[str, Tensor]:
        """All tensors at one alpha, or with one for each tensor, in target's dtype: what `port` gives at that alpha."""
        added = {}
        for name, old in self.target.items():
            scale = alpha[name] if isinstance(alpha, Mapping) else alpha
            added[name] = (old.to(self.update[name].dtype) + scale * self.update[name]).to(old.dtype)
        found = {**added, **self.fixed}
        return {name: found[name] for name in self.names}

    def zero_shot(self) -> dict[str, Tensor]:
        """Target as it is, under tuned's own head where one came along: nothing of the method is in it."""
        found = {**self.target, **self.fixed, **self.unmoved}
        return {name: found[name] for name in self.names}


def blend_of(result: PortResult) -> Blend:
    """Transports every tensor of a port (or a merge) once; needs memory for target twice."""
    tensors = result.tensors
    steps = tensors.steps
    added = {out: step.name for out, step in steps.items() if step.action == "add"}
    carried = {out: step.name for out, step in steps.items() if step.action == "carry"}
    return Blend(
        target={out: tensors.models.target.tensor(name) for out, name in added.items()},
        update={out: tensors.delta(name) for out, name in added.items()},
        fixed={out: tensors.read(out) for out in steps if out not in added},
        unmoved={out: tensors.unmoved(name).to(tensors.plan.dtype) for out, name in carried.items()},
        names={out: step.name for out, step in steps.items()},
    )


def live_of(result: PortResult, state: Mapping[str, Tensor], **options: Any) -> LiveModel:
    """The ported model as it would load if it were written: config of the output, processors of target.

    Args:
        state: its weights by output name.
        **options: device and dtype of `load_live`.
    """
    tensors = result.tensors
    _, config = output_config(tensors.plan, tensors.models)
    return load_live(replace(tensors.models.target.checkpoint, config=config), state=state, **options)
