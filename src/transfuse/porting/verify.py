"""Checks of the result: does the mapped source compute what source does, and is anything lost on the way."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..families.binding import bind
from ..families.registry import FAMILIES
from ..files.configs import Unavailable
from ..maps.algebra import Map
from ..maps.collection import Maps
from ..maps.random import random_maps
from ..maps.transport import transport
from ..methods.skips import needed_skips, takes_skips
from ..models.folding import NO_FOLDING, Folding, map_state, norm_folding
from ..models.model import Model
from ..running.building import Around, RealModel, seeded_inputs
from ..running.idle import Idle
from ..running.reference import ReferenceConfig, forward, random_state
from ..running.skips import memory_names, permuted_skips_of
from ..spaces.layout import Layout


@dataclass(frozen=True)
class Equivalence:
    """How far the mapped source is from source.

    Attributes:
        checked: what was run ("BertModel", "reference transformer"), or "" when nothing could be.
        error: largest absolute difference over all outputs, divided by their largest absolute value.
        outputs: the outputs compared.
        dtype: in which precision.
        stock: whether that class was run as it is, without permuted skips.
        passed: error below the tolerance of the dtype; None when nothing could be run.
        reason: why nothing could be run, or what was run instead.
    """

    checked: str
    error: float | None
    outputs: tuple[str, ...]
    dtype: str
    stock: bool
    passed: bool | None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For result.json."""
        return asdict(self)


TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}


def check_equivalence(
    model: Model, layout: Layout, maps: Maps, *, seed: int = 0, double: bool = False, idle: Idle | None = None
) -> Equivalence:
    """Runs π(model) against the model on seeded inputs, in the real class.

    Per-junction maps have no stock model to run in: the real class is run with permuted skips. Where its branches are
    no modules, the layout is checked in the real class with random tied maps, the maps on the reference transformer.

    Args:
        layout: of the models, streams not yet tied.
        double: compute in float64 (exactness to 1e-9) instead of float32.
        idle: classes one of which may be used instead of building another one, and where it is left.
    """
    idle = Idle() if idle is None else idle
    form = layout.with_ties(streams="tied", tie_qkv=maps.tie_qkv)
    if maps.streams == "tied":
        folding = norm_folding(layout, [model]) if maps.norms == "folded" else NO_FOLDING
        return _check_real(model, form, maps, seed, double, idle, folding)
    mapped = _check_real(model, layout.with_ties(streams="junction", tie_qkv=maps.tie_qkv), maps, seed, double, idle)
    if mapped.checked:
        said = "run with permuted skips, which these maps need" if takes_skips(maps) else "run with its own skips"
        return replace(mapped, stock=False, reason="; ".join(filter(None, (said, mapped.reason))))
    drawn = Maps(random_maps(form, torch.Generator().manual_seed(seed)), family=maps.family, tie_qkv=maps.tie_qkv)
    real = _check_real(model, form, drawn, seed, double, idle)
    reference = check_reference(maps, layout, seed=seed)
    said = f"the layout with random tied maps in {real.checked}: {real.error:.1e}" if real.checked else real.reason
    passed = bool(reference.passed) and real.passed is not False
    return replace(reference, passed=passed, reason=f"{reference.reason}; {said}")


def _check_real(
    model: Model, layout: Layout, maps: Maps, seed: int, double: bool, idle: Idle, folding: Folding = NO_FOLDING
) -> Equivalence:
    dtype = torch.float64 if double else torch.float32
    config, kind, prefix = model.checkpoint.config, model.checkpoint.kind, ""
    if layout.family == "torch_encoder":
        width = next(space.size for name, space in layout.spaces.items() if name.split(".")[0] == "stream")
        config = {**config, "model_type": "torch_encoder", "d_model": width}
        anchor = FAMILIES[layout.family].anchor
        prefix = model.disk[anchor].removesuffix(anchor)
    try:
        plain, moved = map_state(model, layout, {}, dtype), map_state(model, layout, maps.spaces, dtype, folding)
        inputs = seeded_inputs(kind, config, seed, dtype)
        real = RealModel(kind, config, prefix, FAMILIES[layout.family].optional, idle)
        expected = _outputs(real.run(plain, inputs))
        if "src" in inputs:  # a bare stack's input is in the stream
            inputs = {"src": transport(inputs["src"], layout.outputs["output"], maps.spaces)}
        skips = _skips(layout, maps, config) if maps.streams == "junction" else None
        found = real.run(moved, inputs, skips)
    except Unavailable as error:
        return Equivalence("", None, (), str(dtype), True, None, str(error))
    real.leave()
    back, moved_outputs = maps.inverse().spaces, _moved_outputs(model, layout)
    restored = {
        name: folding.unfold(model, moved_outputs[name], transport(x, layout.outputs[moved_outputs[name]], back))
        if name in moved_outputs
        else x
        for name, x in found.items()
    }
    error = relative_error(expected, restored)
    label = (config.get("architectures") or [config.get("architecture") or layout.family])[0]
    covered = "the stack alone: the tensors around it are not covered" if "src" in inputs else ""
    return Equivalence(label, error, tuple(expected), str(dtype), True, error < TOLERANCES[dtype], covered)


def _skips(layout: Layout, maps: Maps, config: Mapping[str, Any]) -> Around:
    skips = needed_skips(maps, layout.ties)
    return lambda module: permuted_skips_of(module, layout, memory_names(module, layout, config), skips)


def _moved_outputs(model: Model, layout: Layout) -> dict[str, str]:
    """Name of an output of this model -> its name in the layout, for those of its tower in the stream's coordinates."""
    layers = [name for name in model.disk if name in layout.params]
    mine = {space for name in layers for space in layout.params[name].spaces}
    return {name.split(".")[-1]: name for name, axes in layout.outputs.items() if axes.spaces <= mine}


def _outputs(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs that say something: those of a head that the checkpoint lacks are zero.

    Raises:
        Unavailable: there are none.
    """
    found = {name: x for name, x in outputs.items() if x.any()}
    if not found:
        raise Unavailable("all outputs are of heads that the checkpoint lacks")
    return found


def check_reference(maps: Maps, layout: Layout, *, seed: int = 0) -> Equivalence:
    """Per-junction maps on reference transformers of the same shapes, random weights, skips permuted, in float64."""
    error = 0.0
    for tower, facts in layout.facts.items():
        prefix = f"{tower}." if tower else ""
        spaces = {name.removeprefix(prefix): one for name, one in maps.spaces.items() if name.startswith(prefix)}
        if "stream.0" not in spaces:
            continue  # a tower that only one of the bases has
        config = ReferenceConfig(
            width=spaces["stream.0"].size,
            num_heads=facts["heads"],
            hidden=spaces["mlp.0"].size,
            layers=facts["layers"],
            norm_first=facts["norm"] == "pre",
        )
        error = max(error, reference_error(config, replace(maps, spaces=_within_reference(spaces)), seed))
    reason = "these maps need permuted skips, which no stock model has; run on random weights of the same shape"
    passed = error < TOLERANCES[torch.float64]
    return Equivalence("reference transformer", error, ("logits",), "torch.float64", False, passed, reason)


def reference_error(config: ReferenceConfig, maps: Maps, seed: int = 0) -> float:
    """Largest relative difference between a random reference transformer and its mapped self, skips permuted."""
    generator = torch.Generator().manual_seed(seed)
    state = random_state(config, generator)
    ids = torch.randint(0, config.vocab, (4, config.tokens), generator=generator)
    shapes = {name: tuple(t.shape) for name, t in state.items()}
    layout = bind(FAMILIES["reference"], shapes, config.as_dict()).with_ties(streams=maps.streams, tie_qkv=maps.tie_qkv)
    moved = {name: transport(t, layout.params[name], maps.spaces) for name, t in state.items()}
    expected, found = forward(config, state, ids), forward(config, moved, ids, needed_skips(maps))
    return relative_error({"logits": expected}, {"logits": found})


def relative_error(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """Largest difference over the largest value, over all expected outputs; infinite where one is not a number."""
    worst = 0.0
    for name, one in expected.items():
        scale = float(one.abs().max()) or 1.0
        difference = float((one - found[name]).abs().max()) / scale
        worst = max(worst, math.inf if math.isnan(difference) else difference)
    return worst


def _within_reference(spaces: Mapping[str, Map]) -> dict[str, Map]:
    """The spaces of the layers themselves: pooling heads and embeddings are not in the reference transformer."""
    return {name: one for name, one in spaces.items() if re.match(r"(stream|heads|mlp)\.\d", name)}
