"""How votes become a mask of a task vector (GradFix, 2510.09658), and what that mask is like.

Where the task vector points in the direction that the votes give an entry, it is kept: m = 1[s = sign pi(tau)].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..maps.random import tensor_generator
from ..spaces.layout import part_of
from ..update.objects import Masked
from ..update.ported import Ported
from .votes import Tally

VOTES = ("majority", "mean")
TIES = ("mean", "drop", "keep")
MODES = ("normal", "force", "soft-share", "soft-sigmoid", "random", "oracle")
Truth = Callable[[str], Tensor]  # canonical name -> the target's own task vector


@dataclass(frozen=True)
class MaskRule:
    """How gradients become a mask; s is the sign of the direction in which the loss falls, by their vote.

    Attributes:
        vote: "majority", s = sign(sum over n of sign(-g_n)), or "mean", s = sign(-sum over n of g_n).
        ties: what becomes of an entry whose vote is 0: "mean": the other vote decides, and if that is 0, too, it is
            left out; "drop": it is left out; "keep": it is kept as it is.
        mode: "normal": the entries of sign s are kept. "force": every entry gets sign s. "random": as many entries of
            every tensor as "normal" keeps, but which is chance. "oracle": s is the sign of the target's own task
            vector. "soft-share", "soft-sigmoid": every entry is weighted by p^power, or sigmoid((2 p - 1) /
            temperature), where p is the share of examples whose -g has its sign (g = 0 counts half); the second tends
            to the mask of the majority as the temperature falls.
        power, temperature: see mode.
        seed: of mode "random".
    """

    vote: str = "majority"
    ties: str = "mean"
    mode: str = "normal"
    power: float = 2.0
    temperature: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("vote", VOTES), ("ties", TIES), ("mode", MODES)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} is {getattr(self, name)!r}; known: {', '.join(known)}")
        for name in ("power", "temperature"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise InputError(f"{name} is {getattr(self, name)}; it has to be above zero")
        if self.mode.startswith("soft") and self.vote != "majority":
            raise InputError(f"mode {self.mode} weighs by the votes of single examples; leave vote {self.vote!r} out")


def vote_signs(found: Tally, out: str, tau: Tensor, rule: MaskRule) -> Tensor:
    """The sign (-1, 0 or 1) that the examples give every entry of a tensor, ties settled.

    Args:
        found: the votes.
        out: output name of the tensor.
        tau: what would be added to it.
    """
    votes, mean = found.votes[out].sign().to(tau), -found.sums[out].sign().to(tau)
    signs = mean if rule.vote == "mean" else votes
    if rule.ties == "drop":
        return signs
    return torch.where(signs == 0, mean if rule.ties == "mean" else tau.sign(), signs)


def mask_of(found: Tally, out: str, tau: Tensor, rule: MaskRule, *, name: str, truth: Tensor | None = None) -> Tensor:
    """The mask of one tensor (`Masked`): which entries stay (bool), or what they are multiplied with.

    Args:
        found, out, tau: see `vote_signs`.
        name: canonical name of the tensor, which the random control draws by.
        truth: the target's own task vector, for the oracle.
    """
    if rule.mode.startswith("soft"):
        return _weights(found, out, tau, rule)
    signs = vote_signs(found, out, tau, rule) if truth is None else truth.to(tau).sign()
    if rule.mode == "force":
        return torch.where(tau < 0, -signs, signs)  # so that the product is |tau| times the sign
    kept = (signs == tau.sign()) & (tau != 0)
    if rule.mode == "random":
        kept = _at_random(kept, tau != 0, tensor_generator(rule.seed, name))
    return kept


def _weights(found: Tally, out: str, tau: Tensor, rule: MaskRule) -> Tensor:
    """The weights of a soft mode, from 0 to 1; margin is 2 p - 1."""
    margin = tau.sign() * found.votes[out].to(tau) / found.count
    if rule.mode == "soft-sigmoid":
        return (margin / rule.temperature).sigmoid()
    return ((1 + margin) / 2) ** rule.power


def _at_random(kept: Tensor, among: Tensor, generator: torch.Generator) -> Tensor:
    """As many entries as `kept` has, at random among those of `among`."""
    places = among.flatten().nonzero().flatten()
    chosen = torch.zeros(kept.numel(), dtype=torch.bool)
    chosen[places[torch.randperm(len(places), generator=generator)[: int(kept.sum())]]] = True
    return chosen.view(kept.shape)


def masked(ported: Ported, found: Tally, rule: MaskRule, truth: Truth | None = None) -> Ported:
    """The port with what is left of its task vector; tensors that do not vote stay as they are."""
    names, masks = ported.added, {}
    for out in found.votes:
        name, true = names[out], None if truth is None else truth(names[out])
        masks[name] = mask_of(found, out, ported.change(out), rule, name=name, truth=true)
    return ported.with_update(Masked(ported.update, masks))


# --- what the mask is like ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Counts:
    """Over the entries of the task vector that are not zero.

    Attributes:
        entries: how many.
        added: the sum of the shares of them that are added.
        ties: those whose vote is 0, before the rule for ties.
        silent: those of which no example has a gradient.
        agreeing: those whose vote has the sign of the task vector.
        known, right: those with a vote of which an oracle knows the sign, and of these those where the vote has it.
    """

    entries: int = 0
    added: float = 0.0
    ties: int = 0
    silent: int = 0
    agreeing: int = 0
    known: int = 0
    right: int = 0

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def as_dict(self) -> dict[str, Any]:
        """Shares; None where there is nothing to have a share of."""
        found = {
            "entries": self.entries,
            "density": self.added / self.entries,
            "ties": self.ties / self.entries,
            "silent": self.silent / self.entries,
            "agreement": _share(self.agreeing, self.entries - self.ties),
        }
        return found | ({"oracle_agreement": self.right / self.known} if self.known else {})


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _counts(whole: Ported, kept: Ported, found: Tally, rule: MaskRule, out: str, truth: Truth | None) -> _Counts:
    name = whole.added[out]
    tau, delta = whole.change(out), kept.change(out)
    moving = tau != 0
    vote = vote_signs(found, out, tau, replace(rule, ties="drop")) * moving
    true = vote if truth is None else truth(name).to(tau).sign() * (vote != 0)
    return _Counts(
        entries=int(moving.sum()),
        added=(delta.abs() / tau.abs())[moving].double().sum().item(),
        ties=int((moving & (vote == 0)).sum()),
        silent=int((moving & (found.votes[out] == 0) & (found.sums[out] == 0)).sum()),
        agreeing=int(((vote == tau.sign()) & (vote != 0)).sum()),
        known=0 if truth is None else int((true != 0).sum()),
        right=0 if truth is None else int(((vote == true) & (true != 0)).sum()),
    )


def mask_report(
    whole: Ported, kept: Ported, found: Tally, rule: MaskRule, truth: Truth | None = None
) -> dict[str, Any]:
    """What a mask leaves, in all, by part and by tensor.

    Args:
        whole: with the whole task vector.
        kept: what `masked` made of it.
        found, rule, truth: as given to that.

    Returns:
        "entries" (not zero in the task vector), and shares of them: "density" (added; of soft masks the mean weight),
        "ties" (vote 0, before the rule), "silent" (no example has a gradient), and, of those with a vote, "agreement"
        (its sign is the task vector's) and "oracle_agreement". "parts" and "tensors" have the same. "slope" is by how
        much the examples' mean loss changes with alpha at alpha 0, "whole_slope" that of the whole task vector.
    """
    names = whole.added
    tensors = {names[out]: _counts(whole, kept, found, rule, out, truth) for out in found.votes}
    parts: dict[str, _Counts] = {}
    for name, one in tensors.items():
        parts[part_of(name)] = parts.get(part_of(name), _Counts()) + one
    return {
        **sum(tensors.values(), _Counts()).as_dict(),
        "parts": {name: one.as_dict() for name, one in parts.items()},
        "tensors": {name: one.as_dict() for name, one in tensors.items()},
        "slope": _slope(kept, found),
        "whole_slope": _slope(whole, found),
    }


def _slope(ported: Ported, found: Tally) -> float:
    return sum((one.double() * ported.change(out)).sum().item() for out, one in found.sums.items()) / found.count
