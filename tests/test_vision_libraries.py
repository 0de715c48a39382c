"""The layouts of open_clip and timm, proved on the real models of those libraries (`make test-vision`)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel

import layout_checks
from families import Case
from transfuse.errors import InputError
from transfuse.families.binding import bind
from transfuse.families.registry import find_family
from transfuse.families.tables.timm_vit import TIMM_VIT, _registry_heads
from transfuse.porting.convert import convert
from vision_families import VISION_CASES, VisionCase

pytestmark = pytest.mark.vision


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:  # torchvision beside a torch it was not built for: RuntimeError
        pytest.skip(f"{name} cannot be imported: {error}", allow_module_level=True)


_library("open_clip")
timm = _library("timm")

CASES = tuple(case.from_library() for case in VISION_CASES)
every_model = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.mark.parametrize("case", VISION_CASES, ids=lambda case: case.name)
def test_the_table_names_what_the_library_saves(case: VisionCase):
    state = case.library.build().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == case.shapes


@every_model
@pytest.mark.parametrize("group", ["permutation", "largest"])
def test_random_maps_keep_the_function(case: Case, group: str, tmp_path: Path):
    layout_checks.check_proof(case, group, tmp_path)


@every_model
def test_nothing_is_overlooked(case: Case, tmp_path: Path):
    layout_checks.check_nothing_is_overlooked(case, tmp_path)


@every_model
def test_planted_port(case: Case, tmp_path: Path):
    layout_checks.check_port(case, tmp_path)


CONVERTED = ("open_clip-plain", "open_clip-quick-gelu", "open_clip-custom")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in CONVERTED], ids=lambda case: case.name)
def test_a_converted_clip_computes_the_same(case: Case, tmp_path: Path):
    case.source.save(tmp_path / "open", 0)
    convert(tmp_path / "open", tmp_path / "converted")
    inputs = case.source.inputs(case.config(tmp_path / "open"))
    expected = case.source.load(tmp_path / "open").run(inputs)
    clip: Any = CLIPModel.from_pretrained(tmp_path / "converted", dtype=torch.float64)
    with torch.no_grad():
        found = clip.eval()(pixel_values=inputs["image"], input_ids=inputs["text"])
    pairs = ((expected["image_features"], found.image_embeds), (expected["text_features"], found.text_embeds))
    for one, other in pairs:  # both normalised
        assert (one - other).abs().max() < 1e-9
    logits = expected["logit_scale"] * expected["image_features"] @ expected["text_features"].T
    assert (logits - found.logits_per_image).abs().max() < 1e-9


def _registered() -> Iterator[tuple[str, Any]]:
    """Every architecture of timm whose name the layout could claim, one layer deep and without data."""
    for name in timm.list_models(["vit_*", "deit*"]):
        if find_family({"architecture": name}, "timm") is TIMM_VIT:
            yield name, _shallow(name)


def _shallow(name: str) -> Any:
    with torch.device("meta"):
        try:
            return timm.create_model(name, depth=1)
        except (AssertionError, TypeError):  # its depth is fixed
            return timm.create_model(name)


def test_the_registry_agrees():
    """Whatever binds is a plain VisionTransformer (no rotary positions, say), with the heads that the layout knows."""
    bound = 0
    for name, model in _registered():
        shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
        try:
            layout = bind(TIMM_VIT, shapes, {"architecture": name})
        except InputError:
            continue
        bound += 1
        assert type(model).__name__ in ("VisionTransformer", "VisionTransformerDistilled"), name
        assert layout.facts[""]["heads"] == model.blocks[0].attn.num_heads == _registry_heads({"architecture": name}), (
            name
        )
    assert bound > 100
