"""Permuted skips: per-junction maps are exact in real model classes, and only with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from families import CASES, Case, Transformers
from transfuse.files.configs import Unavailable
from transfuse.maps.algebra import Dense, Map
from transfuse.maps.collection import Maps
from transfuse.maps.random import random_maps
from transfuse.maps.transport import transport
from transfuse.models.folding import map_state
from transfuse.models.model import Models
from transfuse.models.opening import open_models
from transfuse.porting.verify import check_equivalence, relative_error
from transfuse.running.building import load_transformers
from transfuse.running.skips import memory_names, permuted_skips_of, skips_of
from transfuse.spaces.layout import Layout

EXACT = 1e-9
NAMES = (
    "ViTModel",
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "Dinov2Model",
    "Dinov2ForImageClassification-swiglu",
    "Dinov2WithRegistersModel",
    "BertModel",
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "RobertaForSequenceClassification",
    "ElectraForPreTraining",
    "DistilBertModel",
    "DistilBertForSequenceClassification",
    "CLIPModel",
    "CLIPVisionModel",
    "CLIPTextModelWithProjection",
    "SiglipModel",
    "T5ForConditionalGeneration",
    "T5ForConditionalGeneration-v1.1",
    "T5Model",
    "T5EncoderModel",
)
REAL = [case for case in CASES if case.name in NAMES]


class Mapped:
    """A saved model of a case, a random map at every junction, and both run in the real class."""

    def __init__(self, case: Case, folder: Path):
        case.source.save(folder / "source", 0)
        self.models: Models = open_models(folder / "source", folder / "source")
        self.layout: Layout = self.models.layout.with_ties(streams="junction")
        self.maps: dict[str, Map] = random_maps(self.layout, torch.Generator().manual_seed(1))
        config = case.config(folder / "source")
        self.inputs = case.source.inputs(config)
        plain = map_state(self.models.source, self.layout, {}, torch.float64)
        moved = map_state(self.models.source, self.layout, self.maps, torch.float64)
        self.plain, self.moved = (load_transformers(config, state)[0] for state in (plain, moved))
        self.names = memory_names(self.moved, self.layout, config)

    def run(self, model: nn.Module, maps: Mapping[str, Map]) -> dict[str, Tensor]:
        """Outputs, those in the stream carried back."""
        with torch.no_grad():
            found = {name: x for name, x in model(**self.inputs).items() if isinstance(x, Tensor)}
        back = Maps(maps).inverse().spaces
        mine = {space for name in self.models.source.disk for space in self.layout.params[name].spaces}
        axes = {n.split(".")[-1]: one for n, one in self.layout.outputs.items() if one.spaces <= mine}
        return {name: transport(x, axes[name], back) if name in axes else x for name, x in found.items()}


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_per_junction_maps_are_exact_with_permuted_skips_only(case: Case, tmp_path: Path) -> None:
    mapped = Mapped(case, tmp_path)
    expected = mapped.run(mapped.plain, {})
    skips = skips_of(mapped.maps, mapped.layout.ties)
    with permuted_skips_of(mapped.moved, mapped.layout, mapped.names, skips):
        found = mapped.run(mapped.moved, mapped.maps)
    assert relative_error(expected, found) < EXACT
    assert relative_error(expected, mapped.run(mapped.moved, mapped.maps)) > 0.1, "the hooks are gone, so it is broken"


def test_all_wanted_cases_are_there() -> None:
    assert {case.name for case in REAL} == set(NAMES)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Mapped:
    return Mapped(next(c for c in CASES if c.name == "ViTModel"), tmp_path_factory.mktemp("vit"))


def test_every_single_skip_counts(vit: Mapped) -> None:
    expected, skips = vit.run(vit.plain, {}), skips_of(vit.maps)
    assert set(skips) == {f"stream.{j}" for j in range(4)}
    for left_out in skips:
        kept = {into: skip for into, skip in skips.items() if into != left_out}
        with permuted_skips_of(vit.moved, vit.layout, vit.names, kept):
            assert relative_error(expected, vit.run(vit.moved, vit.maps)) > 1e-3, left_out


def test_a_skip_leads_from_one_order_of_the_stream_to_the_next(vit: Mapped) -> None:
    for j in range(4):
        before, after = (vit.maps[f"stream.{i}"].matrix() for i in (j, j + 1))
        found = skips_of(vit.maps)[f"stream.{j}"].matrix()
        torch.testing.assert_close(found, after @ before.T, rtol=0, atol=0)  # eq. 12


def test_matrices_and_maps_are_the_same_skips(vit: Mapped) -> None:
    skips = skips_of(vit.maps)
    with permuted_skips_of(vit.moved, vit.layout, vit.names, skips):
        expected = vit.run(vit.moved, vit.maps)
    for others in ({i: s.matrix() for i, s in skips.items()}, {i: Dense(s.matrix()) for i, s in skips.items()}):
        with permuted_skips_of(vit.moved, vit.layout, vit.names, others):
            assert relative_error(expected, vit.run(vit.moved, vit.maps)) < EXACT


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_strength_mixes_a_skip_with_the_identity(vit: Mapped, strength: float) -> None:
    skips = skips_of(vit.maps)
    mixed = {
        i: strength * s.matrix() + (1 - strength) * torch.eye(s.size, dtype=torch.float64) for i, s in skips.items()
    }
    with permuted_skips_of(vit.moved, vit.layout, vit.names, mixed):
        expected = vit.run(vit.moved, vit.maps)
    with permuted_skips_of(vit.moved, vit.layout, vit.names, skips, strength=strength):
        assert relative_error(expected, vit.run(vit.moved, vit.maps)) < EXACT
    if not strength:
        assert relative_error(expected, vit.run(vit.moved, vit.maps)) < EXACT, "nothing is added"


def test_a_space_without_a_map_stays(vit: Mapped) -> None:
    some = {name: one for name, one in vit.maps.items() if name != "stream.2"}
    skips = skips_of(some)
    torch.testing.assert_close(skips["stream.1"].matrix(), vit.maps["stream.1"].inverse().matrix())
    torch.testing.assert_close(skips["stream.2"].matrix(), vit.maps["stream.3"].matrix())
    assert skips_of({"stream.0": vit.maps["stream.0"], "mlp.0": vit.maps["mlp.0"]}) == {}


def test_a_tied_map_needs_no_skips(vit: Mapped) -> None:
    one = vit.maps["stream.0"]
    assert skips_of({f"stream.{j}": one for j in range(5)}) == {}


def test_hooks_are_removed_after_an_error(vit: Mapped) -> None:
    expected = vit.run(vit.moved, {})
    with pytest.raises(ZeroDivisionError), permuted_skips_of(vit.moved, vit.layout, vit.names, skips_of(vit.maps)):
        raise ZeroDivisionError
    assert relative_error(expected, vit.run(vit.moved, {})) == 0


def test_an_unknown_sum_is_refused(vit: Mapped) -> None:
    context = permuted_skips_of(vit.moved, vit.layout, vit.names, {"stream.9": vit.maps["stream.0"]})
    with pytest.raises(Unavailable, match=r"stream\.9"), context:
        pass


def test_functional_output_projections_are_refused(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.family == "torch_encoder")
    case.source.save(tmp_path / "source", 0)
    models = open_models(tmp_path / "source", tmp_path / "source")
    layout = models.layout.with_ties(streams="junction")
    layer = nn.TransformerEncoderLayer(16, 4, 24)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    names = {name: name for name, _ in stack.named_parameters()}
    skips = skips_of(random_maps(layout, torch.Generator().manual_seed(0)))
    with pytest.raises(Unavailable, match="MultiheadAttention"), permuted_skips_of(stack, layout, names, skips):
        pass


@pytest.mark.parametrize("name", ["ViTModel", "BertModel", "CLIPModel", "T5Model"])
def test_verify_runs_junction_maps_in_the_real_class(name: str, tmp_path: Path) -> None:
    case = next(c for c in CASES if c.name == name)
    mapped = Mapped(case, tmp_path)
    found = check_equivalence(
        mapped.models.source,
        mapped.models.layout,
        Maps(mapped.maps, family=case.family, streams="junction"),
        double=True,
    )
    assert found.passed and found.error is not None and found.error < EXACT
    assert found.checked == name and not found.stock and "skips" in found.reason


def test_verify_falls_back_where_branches_are_no_modules(tmp_path: Path) -> None:
    case = next(c for c in CASES if c.family == "torch_encoder")
    case.source.save(tmp_path / "source", 0)
    models = open_models(tmp_path / "source", tmp_path / "source")
    maps = random_maps(models.layout.with_ties(streams="junction"), torch.Generator().manual_seed(0))
    found = check_equivalence(models.source, models.layout, Maps(maps, family=case.family, streams="junction"))
    assert found.passed and found.checked == "reference transformer"


def test_the_cases_are_real_classes() -> None:
    for case in REAL:
        assert isinstance(case.source, Transformers) and hasattr(transformers, case.source.model_class)
