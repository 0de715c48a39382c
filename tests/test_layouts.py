"""Every layout, proved on real models: generated from the table in `tests/families.py`.

A layout says how each tensor moves. It is right when random maps on all spaces at once leave the outputs of the real
class as they were, and complete when every tensor that moves shows in them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import layout_checks
import transfuse
from families import CASES, Case, State
from transfuse.errors import InputError
from transfuse.families.registry import FAMILIES
from transfuse.maps.algebra import Identity, Map, PerHead, Permutation
from transfuse.models.opening import open_models
from transfuse.porting.verify import relative_error
from vision_families import VISION_CASES

TABLES = tuple(case.from_table() for case in VISION_CASES)  # without the libraries; with them: test_vision_libraries.py


def _families() -> list[Case]:
    """One case of each family."""
    return list({case.family: case for case in (*CASES, *TABLES)}.values())


def _case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


every_model = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_table = pytest.mark.parametrize("case", TABLES, ids=lambda case: case.name)
every_family = pytest.mark.parametrize("case", _families(), ids=lambda case: case.family)
without_defaults = pytest.mark.parametrize(  # no model class says how many heads these have
    "case",
    [case for case in _families() if case.family in ("torch_encoder", "reference", "timm_vit")],
    ids=lambda case: case.family,
)


def test_every_family_has_a_case():
    assert {case.family for case in (*CASES, *TABLES)} == set(FAMILIES)


@every_model
@pytest.mark.parametrize("group", ["permutation", "largest"])
def test_random_maps_keep_the_function(case: Case, group: str, tmp_path: Path):
    layout_checks.check_proof(case, group, tmp_path)


@every_model
def test_nothing_is_overlooked(case: Case, tmp_path: Path):
    layout_checks.check_nothing_is_overlooked(case, tmp_path)


@every_family
def test_planted_maps_are_recovered(case: Case, tmp_path: Path):
    layout_checks.check_match(case, tmp_path)


@every_model
def test_planted_port(case: Case, tmp_path: Path):
    layout_checks.check_port(case, tmp_path)


@every_table
def test_planted_port_of_tensors_alone(case: Case, tmp_path: Path):
    layout_checks.check_ported_weights(case, tmp_path)


# ---- Models that do not fit their layout


@dataclass(frozen=True)
class Whole:
    """A saved model of a case, to damage copies of.

    Attributes:
        disk: canonical name -> name on disk.
        name: canonical name of a matrix of layer 0 that is not square.
    """

    case: Case
    folder: Path
    config: dict[str, Any]
    state: State
    disk: Mapping[str, str]
    name: str

    def refused(self, source: State, target: State, config: dict[str, Any] | None = None) -> str:
        """What `match` says to copies with these tensors and this config."""
        copies = [
            self.case.write(self.folder.parent / role, config or self.config, state)
            for role, state in (("source", source), ("target", target))
        ]
        with pytest.raises(InputError) as error:
            transfuse.match(*copies, family=self.case.family)
        return str(error.value)

    def without(self, start: str) -> State:
        """The tensors but those whose canonical name starts so."""
        return {d: self.state[d] for n, d in self.disk.items() if not n.startswith(start)}

    def with_heads(self, heads: int | None) -> dict[str, Any]:
        """The config with another head count, or without one."""
        return _set(self.config, self.case.heads, heads)


def _set(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    if rest:
        return {**config, first: _set(config[first], rest, value)}
    return {k: v for k, v in config.items() if k != first} | ({} if value is None else {first: value})


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return _case_of(request.param)


@pytest.fixture
def whole(case: Case, tmp_path: Path) -> Whole:
    case.source.save(tmp_path / "whole", 0)
    model = open_models(tmp_path / "whole", tmp_path / "whole").source
    shapes = {name: model.shape(name) for name in model.disk if ".0." in name}
    name = next(name for name, shape in shapes.items() if len(shape) == 2 and shape[0] != shape[1])
    folder = tmp_path / "whole"
    return Whole(case, folder, case.config(folder), case.weights(folder), model.disk, name)


@every_family
def test_heads_that_do_not_divide(whole: Whole):
    message = whole.refused(whole.state, whole.state, whole.with_heads(3))
    assert "do not divide into 3 heads: wrong head count in config?" in message


@every_family
def test_heads_that_differ(whole: Whole, tmp_path: Path):
    other = whole.case.write(tmp_path / "other", whole.with_heads(2), whole.state)
    with pytest.raises(InputError, match=r"heads differ.*: 4 in source .*, 2 in target"):
        transfuse.match(whole.folder, other)


@without_defaults
def test_a_head_count_that_nobody_gave(whole: Whole):
    # timm's registry knows the heads of its architectures, so that has to go too.
    config = {key: value for key, value in whole.with_heads(None).items() if key != "architecture"}
    assert "how many attention heads" in whole.refused(whole.state, whole.state, config)


@pytest.mark.parametrize(
    ("case", "message"),
    [("BertModel", "do not divide into 12 heads"), ("CLIPModel", "how many attention heads")],
    indirect=["case"],
)
def test_defaults_of_the_class_that_do_not_fit(whole: Whole, message: str):
    """A config may leave out what its class has by default; CLIP's class refuses these defaults itself."""
    assert message in whole.refused(whole.state, whole.state, whole.with_heads(None))


@pytest.mark.parametrize("case", ["ElectraModel"], indirect=True)
def test_defaults_of_the_class(whole: Whole, tmp_path: Path):
    """Electra has 4 heads by default, as all models here."""
    one = whole.case.write(tmp_path / "other", whole.with_heads(None), whole.state)
    assert transfuse.match(one, one).is_identity


@every_family
def test_a_layer_that_both_lack(whole: Whole):
    left = whole.without(whole.name.partition(".0.")[0] + ".0.")
    assert "layer 0 has no tensors although layer 1 has: a shard is missing?" in whole.refused(left, left)


@every_family
def test_a_layer_that_one_lacks(whole: Whole):
    message = whole.refused(whole.state, whole.without(whole.name.partition(".0.")[0] + ".1."))
    # Another depth is fine; a config that says otherwise is not.
    assert "target: the config says 2 layers, the tensors have 1" in message or (
        message.startswith("the number of layers differs") and ": 2 in source" in message and "1 in target" in message
    )


@every_family
def test_a_tensor_that_one_lacks(whole: Whole):
    message = whole.refused(whole.state, whole.without(whole.name))
    assert f"tensor '{whole.name}' is in source" in message and "but not in target" in message


@every_family
def test_a_tensor_that_nobody_knows(whole: Whole):
    name = whole.name.partition(".0.")[0] + ".0.adapter.weight"
    more = {**whole.state, name: torch.zeros(3, 16)}
    assert f"tensor '{name}' (3, 16) is not in the layout of family '{whole.case.family}'" in whole.refused(more, more)
    assert f"tensor '{name}' (3, 16) is not in the layout" in whole.refused(whole.state, more)


@every_family
def test_a_transposed_tensor(whole: Whole):
    on_disk = whole.disk[whole.name]
    turned = {**whole.state, on_disk: whole.state[on_disk].T}
    layer = whole.name.partition(".0.")[0]
    for message in (whole.refused(whole.state, turned), whole.refused(turned, turned)):
        assert f"tensor '{layer}.0." in message, "a tensor of the same layer is named"


@every_family
def test_a_tensor_of_another_rank(whole: Whole):
    on_disk = whole.disk[whole.name]
    flat = {**whole.state, on_disk: whole.state[on_disk].flatten()}
    assert f"tensor '{whole.name}'" in whole.refused(flat, flat)


@pytest.mark.parametrize("name", ["vit_pe_core_base_patch16_224", "vit_base_patch16_rope_224", "convnext_tiny"])
def test_timm_architectures_that_are_no_plain_vit(name: str, tmp_path: Path):
    """Rotary positions fix the units inside heads, and the tensors alone would not show it."""
    case = next(case for case in TABLES if case.family == "timm_vit")
    case.source.save(tmp_path / "model", 0)
    config = {**case.config(tmp_path / "model"), "architecture": name}
    one = case.write(tmp_path / "other", config, case.weights(tmp_path / "model"))
    with pytest.raises(InputError, match=f"no layout is known for it .{name}."):
        transfuse.match(one, one)


def test_open_clip_without_a_text_projection(tmp_path: Path):
    """Its text stream is compared with image embeddings, so it is public, and no tensor would show it."""
    case = next(case for case in TABLES if case.name == "open_clip-plain")
    case.source.save(tmp_path / "model", 0)
    config = _set(case.config(tmp_path / "model"), "model_cfg.text_cfg.proj_type", "none")
    state = {name: t for name, t in case.weights(tmp_path / "model").items() if name != "text_projection"}
    one = case.write(tmp_path / "other", config, state)
    with pytest.raises(InputError, match="its text tower has no projection"):
        transfuse.match(one, one)


def test_models_of_different_families(tmp_path: Path):
    one, other = (next(c for c in CASES if c.name == name) for name in ("BertModel", "RobertaModel"))
    one.source.save(tmp_path / "one", 0)
    other.source.save(tmp_path / "other", 0)
    with pytest.raises(InputError, match=r"different architectures: source .* is bert, target .* is roberta"):
        transfuse.match(tmp_path / "one", tmp_path / "other")


@pytest.mark.parametrize(
    ("space", "one"),
    [
        ("nowhere", Permutation(torch.arange(3))),
        ("stream", Permutation(torch.arange(3))),
        ("stream", PerHead(Permutation(torch.arange(4)), (Identity(4),) * 4)),
        ("heads.0/qk.0", Permutation(torch.arange(16))),
        ("heads.0/qk.0", PerHead(Permutation(torch.arange(2)), (Identity(8),) * 2)),
    ],
)
def test_maps_that_do_not_fit_the_layout(space: str, one: Map, tmp_path: Path):
    """A maps file can have the right fingerprints and yet have been tampered with."""
    case = _case_of("DistilBertModel")
    planted = layout_checks.plant(case, tmp_path)
    found = transfuse.match(planted.source, planted.target)
    bad = replace(found, spaces={**found.spaces, space: one})
    with pytest.raises(InputError, match=f"the map of space '{space}' does not fit the models"):
        transfuse.port(planted.source, planted.tuned, planted.target, maps=bad)


# ---- Names: prefixes that may or may not be there, and those of old releases


NAMED = [
    ("BertForSequenceClassification", "BertModel", "bert."),
    ("RobertaForSequenceClassification", "RobertaModel", "roberta."),
    ("DistilBertForSequenceClassification", "DistilBertModel", "distilbert."),
    ("ElectraForSequenceClassification", "ElectraModel", "electra."),
    ("ViTForImageClassification", "ViTModel", "vit."),
    ("DeiTForImageClassification", "DeiTModel", "deit."),
    ("Dinov2ForImageClassification", "Dinov2Model", "dinov2."),
]


def _as_base(case: Case, tuned: Path, folder: Path, base: str, prefix: str, *, bare: bool, old: bool = False) -> Path:
    """The body of a saved fine-tune as a base model of its own: bare or prefixed names, or those of old releases."""
    state = {name: t for name, t in case.weights(tuned).items() if name.startswith(prefix)}
    if bare:
        state = {name.removeprefix(prefix): t for name, t in state.items()}
    if old:
        state = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in state.items()}
        state = {n.replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in state.items()}
    return case.write(folder, {**case.config(tuned), "architectures": [base]}, state)


@pytest.mark.parametrize("target_bare", [True, False], ids=["to-bare", "to-prefixed"])
@pytest.mark.parametrize("source_bare", [True, False], ids=["from-bare", "from-prefixed"])
@pytest.mark.parametrize(("name", "base", "prefix"), NAMED, ids=[row[1] for row in NAMED])
def test_prefixes(name: str, base: str, prefix: str, source_bare: bool, target_bare: bool, tmp_path: Path):
    """The bases lack the head, which comes along with its tensors moved; the output is of tuned's class."""
    case = _case_of(name)
    planted = layout_checks.plant(case, tmp_path)
    source = _as_base(case, planted.source, tmp_path / "source-base", base, prefix, bare=source_bare)
    target = _as_base(case, planted.target, tmp_path / "target-base", base, prefix, bare=target_bare)
    _check_head_comes_along(case, planted, source, target, tmp_path / "out")


@pytest.mark.parametrize("old", ["source", "target", "both"])
@pytest.mark.parametrize(("name", "base", "prefix"), NAMED[:4], ids=[row[1] for row in NAMED[:4]])
def test_old_names_of_norms(name: str, base: str, prefix: str, old: str, tmp_path: Path):
    """LayerNorm.gamma and LayerNorm.beta, as the first releases wrote them."""
    case = _case_of(name)
    planted = layout_checks.plant(case, tmp_path)
    source, target = (
        _as_base(case, folder, tmp_path / f"{role}-base", base, prefix, bare=False, old=old in (role, "both"))
        for role, folder in (("source", planted.source), ("target", planted.target))
    )
    _check_head_comes_along(case, planted, source, target, tmp_path / "out")


def _check_head_comes_along(case: Case, planted: layout_checks.Planted, source: Path, target: Path, out: Path) -> None:
    result = transfuse.port(source, planted.tuned, target, out=out, double=True, null_trials=0)
    assert result.report["equivalence"]["passed"]
    assert set(case.weights(out)) == set(case.weights(planted.tuned))
    assert case.config(out)["architectures"] == case.config(planted.tuned)["architectures"]
    inputs = case.source.inputs(case.config(planted.tuned))
    expected, found = (case.source.load(folder).run(inputs) for folder in (planted.tuned, out))
    assert relative_error(expected, found) < layout_checks.EXACT


# ---- Bodies saved without a part that their class has


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "ViTModel", "DeiTModel"])
def test_a_body_without_its_pooler(name: str, tmp_path: Path):
    """All three lack it: the body is checked and ported, and the output lacks it too."""
    case = _case_of(name)
    planted = layout_checks.plant(case, tmp_path)
    source, tuned, target = (
        case.write(
            tmp_path / f"{folder.name}-body",
            case.config(folder),
            {name: t for name, t in case.weights(folder).items() if not name.startswith("pooler.")},
        )
        for folder in (planted.source, planted.tuned, planted.target)
    )
    result = transfuse.port(source, tuned, target, out=tmp_path / "out", double=True, null_trials=0)
    assert result.report["equivalence"]["passed"]
    assert result.report["equivalence"]["outputs"] == ("last_hidden_state",)
    assert result.report["loads"] == name
    inputs = case.source.inputs(case.config(tuned))
    expected, found = case.source.load(tuned).run(inputs), planted.back(case.source.load(tmp_path / "out").run(inputs))
    body = {"last_hidden_state": expected["last_hidden_state"]}
    assert relative_error(body, found) < layout_checks.EXACT


def test_outputs_that_are_no_numbers_are_no_proof():
    nan = {"logits": torch.full((2,), float("nan"))}
    assert relative_error({"logits": torch.ones(2)}, nan) == relative_error(nan, nan) == float("inf")
