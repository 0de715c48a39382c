"""The models of a run that run themselves: each class is built when it is first asked for, and serves whatever comes.

A model keeps its weights as long as a step to come runs it. Its class is kept longer, without weights: for the same
model again, for another one of that config (the output, mostly), or for the check of what was written.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..models.model import Models
from .idle import Idle
from .probes import Probe, probe_of_model, probe_of_source

_KEY = "instances"


@dataclass
class _Instances:
    """By role those that have their weights, and the idle ones."""

    probes: dict[str, Probe] = field(default_factory=dict)
    idle: Idle = field(default_factory=Idle)


def _instances(models: Models) -> _Instances:
    return models.kept.setdefault(_KEY, _Instances())


def idle_of(models: Models) -> Idle:
    """Classes that were built for these models and wait for other weights."""
    return _instances(models).idle


def probe_of(models: Models, role: str, device: str | torch.device) -> Probe:
    """Source, tuned or target as a model that runs, which nobody may change; source and tuned under target's names.

    Raises:
        InputError: its class cannot be built here.
    """
    probes, idle = _instances(models).probes, idle_of(models)
    if role not in probes:
        model = next(one for one in models.all() if one.role == role)
        if role == "target":
            probes[role] = probe_of_model(model, models.layout, device, idle)
        else:
            probes[role] = probe_of_source(model, models, device, idle)
    probes[role].module.to(device)
    return probes[role]


def let_go(models: Models, *roles: str) -> None:
    """Frees the weights of models that no step to come runs; without a role of all of them."""
    probes, idle = _instances(models).probes, idle_of(models)
    for model in models.all():
        if model.role in probes and model.role in (roles or probes):
            idle.give(model.checkpoint.config, probes.pop(model.role).module)
