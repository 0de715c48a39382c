"""Bases of other shapes: widths, depths, heads, vocabularies, images. Oracles: larger models that compute the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    CLIPModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)

import transfuse
from tiny import Model, State, as_models, bert, clip, fine_tuned, randomise, save, state_of, vit
from transfuse import InputError, PortResult
from transfuse.maps.algebra import Rectangular
from transfuse.maps.collection import Maps
from transfuse.matching.heads import resized_heads
from transfuse.matching.procrustes import best_rotation
from transfuse.methods.table import METHODS
from transfuse.models.opening import open_models
from transfuse.models.plan import make_plan
from transfuse.models.resizing import partners
from transfuse.options.groups import Inputs
from transfuse.porting.inspection import inspect_models
from transfuse.spaces.layout import is_stream

T5: dict[str, Any] = {
    "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "vocab_size": 31, "decoder_start_token_id": 0,
}  # fmt: skip
DRAWN = Inputs("synthetic", count=96)


def of_config(model: Model, state: State, **changes: Any) -> Model:
    """A model of the same class with another config and these weights."""
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        place = config
        *path, last = key.split("__")
        for one in path:
            place = getattr(place, one)
        setattr(place, last, value)
    found, info = type(model).from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float64, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return found.eval()


def doubled(model: Model, wanted: Callable[[str], bool], **changes: Any) -> Model:
    """The same function with every unit of some spaces there twice: inputs see each half as strongly."""
    models = as_models(model)
    layout, state = models.layout.with_ties(), {}
    for name in models.source.disk:
        x = models.source.tensor(name)
        axes = layout.params[name]
        for dim, axis in enumerate(axes.dims or ()):
            if axis.parts[0].space is not None and wanted(axis.parts[0].space):
                x = torch.cat([x, x], dim) / (2 if dim in axes.inputs else 1)
        state[models.source.disk[name]] = x
    return of_config(model, state, **changes)


def is_mlp(space: str) -> bool:
    return space.startswith("mlp")


def is_wide(space: str) -> bool:
    return is_stream(space) or space.startswith(("heads", "pooled"))


def with_idle_layers(model: Model, depth: int, kept: Mapping[int, int]) -> Model:
    """The same function (pre-norm) with further layers that add nothing: layer of the result -> layer of the model."""
    state = {}
    for name, x in state_of(model).items():
        found = name.split("encoder.layer.")
        if len(found) == 1:
            state[name] = x
            continue
        number, rest = found[1].split(".", 1)
        idle = torch.zeros_like(x) if "output.dense" in rest else x
        for new in range(depth):
            if kept.get(new) == int(number):
                state[f"{found[0]}encoder.layer.{new}.{rest}"] = x.clone()
            elif new not in kept and int(number) == 0:
                state[f"{found[0]}encoder.layer.{new}.{rest}"] = idle.clone()
    return of_config(model, state, num_hidden_layers=depth)


PLANTED: dict[str, Callable[[Model], Model]] = {
    "other MLPs": lambda model: doubled(model, is_mlp, intermediate_size=48),
    "wider": lambda model: doubled(model, is_wide, hidden_size=32, num_attention_heads=8),
    "wider everywhere": lambda model: doubled(
        model, lambda space: True, hidden_size=32, num_attention_heads=8, intermediate_size=48
    ),
    "deeper": lambda model: with_idle_layers(model, 4, {1: 0, 3: 1}),
    "wider and deeper": lambda model: doubled(
        with_idle_layers(model, 4, {1: 0, 3: 1}), is_wide, hidden_size=32, num_attention_heads=8
    ),
}


def images(count: int = 64, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)}


@pytest.mark.parametrize("name", PLANTED)
def test_the_larger_models_compute_the_same(name: str) -> None:
    model = vit(0)
    with torch.no_grad():
        torch.testing.assert_close(PLANTED[name](model)(**images()).logits, model(**images()).logits)


def logits(found: Model | PortResult, inputs: Mapping[str, Tensor], kind: Any = ViTForImageClassification) -> Tensor:
    model = found
    if isinstance(found, PortResult):
        config = kind.config_class.from_dict(dict(found.tensors.models.target.checkpoint.config))
        model = kind.from_pretrained(None, config=config, state_dict=found.state_dict(), dtype=torch.float64).eval()
    with torch.no_grad():
        return model(**inputs).logits  # type: ignore[operator]


def white(count: int, channels: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(256, (count, channels, *size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("direction", ["to larger", "to smaller"])
def test_planted_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, direction: str) -> None:
    """Target computes what source does, in another shape: the port computes what tuned does.

    On white images, which show every direction alike; of smooth ones a ridge leaves a part of the fine detail behind.
    """
    monkeypatch.setattr("transfuse.running.drawn.drawn_images", white)
    small, source = vit(0), vit(0)
    target = PLANTED[name](small)
    if direction == "to smaller":
        source, target = target, small
    tuned = fine_tuned(source, size=0.1)
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, tuned, target))]
    result = transfuse.port(*places, inputs=DRAWN, null_trials=0)
    assert result.report["method"] == "functional" and result.report["resized"]["shapes"]
    assert result.report["relation"]["verdict"] == "other-shapes"
    inputs = {"pixel_values": white(64, 1, (8, 8), torch.Generator().manual_seed(5)).double() / 127.5 - 1}
    old, wanted = logits(target, inputs), logits(tuned, inputs)
    left = float((logits(result, inputs) - wanted).norm() / (old - wanted).norm())
    # A narrower target has no room for what the fine-tune does to both copies of a unit.
    assert left < (0.02 if direction == "to larger" or "wider" not in name else 0.4), left


@pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
def test_a_head_comes_along_to_another_width(tmp_path: Path, kind: Any) -> None:
    """From a BERT to one twice as wide that has no pooler or another head: the output is of tuned's class."""
    source = bert(kind, 0)
    target = doubled(source, is_wide, hidden_size=32, num_attention_heads=8)
    if kind is BertModel:
        target = type(target).from_pretrained(
            None, config=target.config, state_dict=state_of(target), dtype=torch.float64
        )
    tuned = fine_tuned(source, BertForSequenceClassification, size=0.1, num_labels=5)
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, tuned, target))]
    result = transfuse.port(*places, inputs=DRAWN, null_trials=0, out=tmp_path / "out")
    assert result.report["loads"] == "BertForSequenceClassification"
    ported: Any = BertForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert ported.config.hidden_size == 32 and ported.config.num_labels == 5
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, 31, (64, 12), generator=generator)
    zero_shot = copy.deepcopy(ported)
    zero_shot.bert.load_state_dict(target.base_model.state_dict(), strict=False)
    with torch.no_grad():
        found, wanted = ported(ids).logits, tuned(ids).logits
        old = zero_shot(ids).logits
    assert (found - wanted).norm() < 0.1 * (old - wanted).norm()


def test_a_deeper_bert_keeps_the_names_of_tuned(tmp_path: Path) -> None:
    """A bare target has names without the prefix of the class that the output takes from tuned."""
    source, target = bert(BertModel, 0), bert(BertModel, 1, num_hidden_layers=3)
    tuned = fine_tuned(source, BertForSequenceClassification, num_labels=3)
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, tuned, target))]
    result = transfuse.port(*places, inputs=DRAWN, null_trials=0, out=tmp_path / "out")
    assert {name.split(".")[0] for name in result.tensors.steps} == {"bert", "classifier"}
    kept = "encoder.layer.0.attention.self.query.weight"  # of three layers the first has no partner among two
    assert partners(3, 2) == {1: 0, 2: 1}
    assert torch.equal(result.tensor(f"bert.{kept}"), target.state_dict()[kept])


@pytest.mark.parametrize(
    ("target", "source", "pairs"),
    [
        (4, 4, {0: 0, 1: 1, 2: 2, 3: 3}),
        (3, 6, {0: 1, 1: 3, 2: 5}),
        (6, 3, {1: 0, 3: 1, 5: 2}),
        (1, 5, {0: 4}),
        (5, 1, {4: 0}),
        (12, 8, {1: 0, 2: 1, 4: 2, 5: 3, 7: 4, 8: 5, 10: 6, 11: 7}),
    ],
)
def test_layers_end_at_the_same_share_of_the_depth(target: int, source: int, pairs: dict[int, int]) -> None:
    assert partners(target, source) == pairs


def test_rotations_between_other_numbers_of_units() -> None:
    generator = torch.Generator().manual_seed(0)
    for size, other in ((7, 4), (4, 7)):
        scores = torch.randn(size, other, generator=generator, dtype=torch.float64)
        best = best_rotation(scores)
        small = min(size, other)
        product = best.T @ best if size > other else best @ best.T
        torch.testing.assert_close(product, torch.eye(small, dtype=torch.float64))
        assert float((best * scores).sum()) == pytest.approx(float(torch.linalg.svdvals(scores).sum()))


def test_large_rotations_are_found_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Orthonormal to float64, and the best to float32."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 12), (12, 7), (7, 12)):
        scores = torch.randn(shape, generator=generator, dtype=torch.float64)
        exact = best_rotation(scores)
        with monkeypatch.context() as patch:
            patch.setattr("transfuse.matching.procrustes._LARGE", 4)
            found = best_rotation(scores)
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)
        product = found @ found.T if shape[0] <= shape[1] else found.T @ found
        torch.testing.assert_close(product, torch.eye(min(shape), dtype=torch.float64), rtol=0, atol=1e-12)


def test_heads_of_other_numbers_and_widths() -> None:
    """Planted: every target head is a rotated source head, two of them the same one."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(3 * 4, 2 * 3, dtype=torch.float64)
    for mine, its in enumerate((1, 0, 1)):
        turned = torch.linalg.qr(torch.randn(4, 3, generator=generator, dtype=torch.float64))[0]
        truth[4 * mine : 4 * mine + 4, 3 * its : 3 * its + 3] = turned
    found = resized_heads({"heads.0/qk.0": truth, "heads.0/vo.0": 2 * truth}, 3, 2)
    for one in found.values():
        torch.testing.assert_close(one.weight, truth)


def test_a_rectangular_map_is_its_matrix(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    one, x = Rectangular(weight), torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(one.apply(x, 1), torch.einsum("ij,ajb->aib", weight, x))
    torch.testing.assert_close(one.matrix(), weight)
    torch.testing.assert_close((one.inverse() @ one).matrix(), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(one.dual().matrix().T @ weight, torch.eye(3, dtype=torch.float64))
    Maps({"stream": one}, family="bert", method="theseus").save(tmp_path / "maps")
    torch.testing.assert_close(Maps.load(tmp_path / "maps").spaces["stream"].matrix(), weight)


@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if not one.any_shape])
def test_methods_that_keep_the_function_refuse_other_shapes(tmp_path: Path, method: str) -> None:
    places = [save(vit(0), tmp_path / "0"), save(vit(0, hidden_size=32), tmp_path / "1")]
    with pytest.raises(InputError, match=r"in target .*: another size of the model.* --method functional"):
        transfuse.match(*places, method=method, inputs=DRAWN)


@pytest.mark.parametrize("method", ["naive", "random", "theseus", "functional", "distillation"])
def test_methods_for_any_shape(tmp_path: Path, method: str) -> None:
    """Wider and deeper at once; what is written loads, and is not target."""
    target = vit(5, hidden_size=24, num_hidden_layers=3, intermediate_size=40)
    source = vit(0)
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, fine_tuned(source, size=0.2), target))]
    inputs = DRAWN if METHODS[method].needs_inputs else None
    result = transfuse.port(*places, method=method, inputs=inputs, null_trials=0, out=tmp_path / "out")
    assert result.report["loads"] == "ViTForImageClassification"
    old = state_of(target)
    assert any(not torch.equal(result.tensor(name), old[name]) for name in old)
    if method != "distillation":
        idle = "vit.encoder.layer.0.attention.attention.query.weight"
        assert torch.equal(result.tensor(idle), old[idle])
    again = transfuse.port(*places, method=method, inputs=inputs, null_trials=0)
    assert all(torch.equal(result.tensor(name), again.tensor(name)) for name in old)


def test_theseus_is_the_contraction_with_its_maps(tmp_path: Path) -> None:
    source, target = vit(0), vit(5, hidden_size=24, intermediate_size=40)
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, fine_tuned(source, size=0.2), target))]
    result = transfuse.port(*places, method="theseus", inputs=DRAWN, null_trials=0)
    name = "vit.encoder.layer.1.intermediate.dense.weight"
    old, base, tuned = (model.state_dict() for model in (target, source, load(places[1])))
    memory = "vit.layers.1.mlp.fc1.weight"
    ends = [result.maps.spaces[f"encoder.layer.1.intermediate.dense:{end}"].matrix() for end in ("out", "in")]
    moved = ends[0] @ (tuned[memory] - base[memory]) @ ends[1].T
    torch.testing.assert_close(result.tensor(name), old[memory] + moved, rtol=0, atol=1e-6)


def load(place: Path) -> Model:
    return ViTForImageClassification.from_pretrained(place, dtype=torch.float64)


def test_maps_are_kept_and_used_again(tmp_path: Path) -> None:
    source, target = vit(0), vit(5, hidden_size=24, num_attention_heads=2)
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, fine_tuned(source, size=0.2), target))]
    maps = transfuse.match(places[0], places[2], method="functional", inputs=DRAWN)
    maps.save(tmp_path / "maps")
    given = transfuse.port(*places, maps=tmp_path / "maps", inputs=DRAWN, null_trials=0)
    found = transfuse.port(*places, method="functional", inputs=DRAWN, null_trials=0)
    for name in found.tensors.steps:
        torch.testing.assert_close(given.tensor(name), found.tensor(name))


@pytest.mark.parametrize(
    "changes", [{"d_model": 24, "num_heads": 2}, {"num_layers": 2, "num_decoder_layers": 3}, {"d_ff": 40}]
)
def test_t5_of_another_shape(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Encoder and decoder of other depths, widths and heads; closer to tuned than target is, and it loads."""
    source, target = (
        randomise(T5ForConditionalGeneration(T5Config(**{**T5, **one})).double(), 3) for one in ({}, changes)
    )
    tuned = fine_tuned(source, size=0.3)
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, tuned, target))]
    result = transfuse.port(*places, inputs=Inputs("synthetic", count=64), null_trials=0, out=tmp_path / "out")
    assert result.report["loads"] == "T5ForConditionalGeneration" and result.report["resized"]["shapes"]
    old = state_of(target)
    changed = {name for name in old if not torch.equal(result.tensor(name), old[name])}
    assert any(name.startswith("encoder.block") for name in changed)
    assert any("EncDecAttention" in name for name in changed)


def test_one_tower_of_a_clip_is_larger(tmp_path: Path) -> None:
    """The other one has one shape; the joint embedding is fitted on what the inputs reach."""
    source = clip(CLIPModel, 0)
    config = copy.deepcopy(source.config)
    config.vision_config.hidden_size, config.vision_config.num_hidden_layers = 24, 3
    target, tuned = randomise(CLIPModel(config).double(), 4), fine_tuned(source, size=0.2)
    tuned.logit_scale.data = source.logit_scale.data  # one number has no spread
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, tuned, target))]
    result = transfuse.port(*places, inputs=DRAWN, null_trials=0, out=tmp_path / "out")
    assert result.report["loads"] == "CLIPModel"
    old = state_of(target)
    text = "text_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(result.tensor(text), old[text]), "images do not reach the text tower"
    seen = "vision_model.encoder.layers.2.mlp.fc1.weight"
    assert not torch.equal(result.tensor(seen), old[seen])


def test_inspect_says_what_differs(tmp_path: Path) -> None:
    source = vit(0)
    made = (source, fine_tuned(source), vit(1, num_hidden_layers=3))
    places = [save(one, tmp_path / str(i)) for i, one in enumerate(made)]
    found = inspect_models(places[0], tuned=places[1], target=places[2])
    assert found["relation"]["verdict"] == "other-shapes"
    kept = {name.split("layer.")[1][0] for name in found["plan"]["copy"] if "layer." in name}
    moved = {name.split("layer.")[1][0] for name in found["plan"]["add"] if "layer." in name}
    assert (kept, moved) == ({"0"}, {"1", "2"}), "two layers for three: the first has no partner"


def test_checkpoints_that_cannot_be_run(tmp_path: Path) -> None:
    """Nothing can be done for state dicts: auto does not add units in order without being asked."""
    states = [state_of(vit(seed, hidden_size=width)) for seed, width in ((0, 16), (0, 16), (1, 32))]
    states[1] = {name: x + 0.01 for name, x in states[1].items()}
    with pytest.raises(InputError, match=r"cannot be run here"):
        transfuse.port(*states, family="vit", config={"num_attention_heads": 4, "hidden_act": "gelu"})


@pytest.mark.parametrize("vision", [{}, {"hidden_size": 24}])
def test_a_clip_with_another_joint_embedding(tmp_path: Path, vision: dict[str, int]) -> None:
    """Its projections and its scale stay where they are; functional fits the projection that inputs reach."""
    source = clip(CLIPModel, 0)
    config = copy.deepcopy(source.config)
    config.projection_dim = 8
    for key, value in vision.items():
        setattr(config.vision_config, key, value)
    target, tuned = randomise(CLIPModel(config).double(), 4), fine_tuned(source, size=0.2)
    tuned.logit_scale.data = source.logit_scale.data + 1
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, tuned, target))]
    old = state_of(target)
    for method in ("naive", "functional"):
        inputs = DRAWN if method == "functional" else None
        result = transfuse.port(*places, method=method, inputs=inputs, alpha=1.0, null_trials=0, out=tmp_path / method)
        assert result.report["loads"] == "CLIPModel" and not result.report["carried"]
        assert torch.equal(result.tensor("text_projection.weight"), old["text_projection.weight"])
        changed = not torch.equal(result.tensor("visual_projection.weight"), old["visual_projection.weight"])
        assert changed == (method == "functional")
    nothing = transfuse.port(*places, method="naive", alpha=0.0)
    assert all(torch.equal(nothing.tensor(name), old[name]) for name in old)


def test_other_buckets_keep_targets_biases(tmp_path: Path) -> None:
    source, target = (
        randomise(T5ForConditionalGeneration(T5Config(**{**T5, "relative_attention_num_buckets": n})).double(), n)
        for n in (8, 12)
    )
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, fine_tuned(source, size=0.2), target))]
    found = [transfuse.port(*places, inputs=Inputs("synthetic", count=16), null_trials=0) for _ in range(2)]
    assert all(torch.equal(found[0].tensor(name), found[1].tensor(name)) for name in found[0].tensors.steps)
    biases = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(found[0].tensor(biases), state_of(target)[biases])


def test_another_kind_of_mlp_is_refused(tmp_path: Path) -> None:
    source, target = (
        randomise(T5ForConditionalGeneration(T5Config(**{**T5, "feed_forward_proj": kind, "d_ff": size})).double(), 1)
        for kind, size in (("relu", 24), ("gated-gelu", 40))
    )
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, fine_tuned(source), target))]
    with pytest.raises(InputError, match=r"wi_0.* has no counterpart in any layer of source: another variant"):
        transfuse.port(*places, inputs=DRAWN)


def test_a_pooler_that_source_lacks_is_not_learned_from(tmp_path: Path) -> None:
    """Its class has one, drawn at random when it is loaded: two ports would differ."""
    target = bert(BertModel, 1, hidden_size=24)
    state = {name: x for name, x in state_of(bert(BertModel, 0)).items() if not name.startswith("pooler")}
    places = [
        tmp_path / "0",
        save(fine_tuned(bert(BertModel, 0), BertForSequenceClassification), tmp_path / "1"),
        save(target, tmp_path / "2"),
    ]
    save(bert(BertModel, 0), places[0])
    save_file(state, places[0] / "model.safetensors", metadata={"format": "pt"})
    found = [transfuse.port(*places, inputs=DRAWN, null_trials=0) for _ in range(2)]
    assert all(torch.equal(found[0].tensor(name), found[1].tensor(name)) for name in found[0].tensors.steps)


def test_another_activation_alone(tmp_path: Path) -> None:
    """Close relatives are so whatever their activation is."""
    source = vit(0)
    target = of_config(source, state_of(fine_tuned(source, size=0.01)), hidden_act="gelu_new")
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, fine_tuned(source), target))]
    assert transfuse.port(*places, null_trials=0).report["method"] == "naive"
    assert transfuse.port(*places, inputs=DRAWN, null_trials=0).report["method"] == "functional"


def test_a_dry_run_refuses_too(tmp_path: Path) -> None:
    places = [
        save(one, tmp_path / str(i)) for i, one in enumerate((vit(0), fine_tuned(vit(0)), vit(1, hidden_size=32)))
    ]
    with pytest.raises(InputError, match="needs bases of one shape"):
        transfuse.port(*places, method="tied", dry_run=True)


@pytest.mark.parametrize("order", ["_ | stream.{last}", "stream.{last} | _"])
def test_a_head_that_reads_more_than_the_stream(order: str) -> None:
    """Three features beside the stream stay three, however wide the stream is."""
    states = [state_of(one) for one in (vit(0), fine_tuned(vit(0)), vit(1, hidden_size=24))]
    for state in states:
        state["classifier.weight"] = torch.cat([state["classifier.weight"], torch.ones(7, 3, dtype=torch.float64)], 1)
    source, tuned, target = states
    heads = {"num_attention_heads": 4, "num_hidden_layers": 2}
    config = {"model_type": "vit", **heads, "axes": {"classifier.weight": f"_ <- {order}"}}
    models = open_models(source, target, tuned, config=config)
    assert models.resizing is not None
    assert models.resizing.shape_in_target("classifier.weight", (7, 19)) == (7, 27)
    assert [one.action for one in make_plan(models).steps if one.name == "classifier.weight"] == ["add"]
