"""Activations: what is seen inside real models, moments against numpy, and the maps that follow from them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertForMaskedLM,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    T5Config,
    T5ForConditionalGeneration,
)

import transfuse
from families import CASES, Case, Transformers
from tiny import as_models, bert, clip, fine_tuned, randomise, save, vit
from tiny_data import prepared
from transfuse import InputError, Maps
from transfuse.evidence.activations import collect, scores_of
from transfuse.maps.algebra import PerHead
from transfuse.matching.by_space import best_maps
from transfuse.methods.match import open_inputs
from transfuse.methods.table import get_method
from transfuse.models.model import Models
from transfuse.models.opening import open_models
from transfuse.options.groups import Inputs
from transfuse.porting.planted import PLANTED_MAPS, plant
from transfuse.porting.verify import check_equivalence
from transfuse.running.given import Unlabelled
from transfuse.running.probes import Probe, Replay, probe_of_model
from transfuse.running.taps import Seen
from transfuse.spaces.layout import Layout, Space, tower_of
from transfuse.update import functional

DRAWN = Inputs("synthetic", count=64)
T5: dict[str, Any] = {
    "vocab_size": 31,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "tie_word_embeddings": False,
}
NAMES = (
    "BertForMaskedLM",
    "BertForSequenceClassification",
    "RobertaForSequenceClassification",
    "DistilBertForSequenceClassification",
    "ElectraForPreTraining",
    "ViTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersModel",
    "CLIPModel",
    "CLIPVisionModelWithProjection",
    "CLIPTextModelForSequenceClassification",
    "CLIPForImageClassification",
    "SiglipModel",
    "T5ForConditionalGeneration",
    "T5ForConditionalGeneration-v1.1",
    "T5Model",
    "T5EncoderModel",
)
REAL = [case for case in CASES if case.name in NAMES and isinstance(case.source, Transformers)]


def probed(folder: Path) -> tuple[Models, Probe]:
    """A model as source and target at once, ready to be watched."""
    models = open_models(folder, folder)
    return models, probe_of_model(models.source, models.layout, "cpu")


def inputs_by_tower(case: Case, folder: Path) -> list[dict[str, Tensor]]:
    """Images and texts apart, as data sets have them."""
    inputs = case.source.inputs(case.config(folder))
    images = {name: x for name, x in inputs.items() if name == "pixel_values"}
    texts = {name: x for name, x in inputs.items() if "ids" in name or ("mask" in name and "pos" not in name)}
    return [one for one in (images, texts) if one]


# --- taps -------------------------------------------------------------------------------------------------------------


class Recorder:
    """Every module of a run in the order in which they end: name, module, first input, first output."""

    def __init__(self, probe: Probe, batch: Mapping[str, Tensor]):
        self.calls: list[tuple[str, nn.Module, Any, Tensor]] = []
        handles = [module.register_forward_hook(self._note(n), with_kwargs=True) for n, module in all_modules(probe)]
        with torch.no_grad():
            probe.run(dict(batch))
        for handle in handles:
            handle.remove()

    def _note(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            self.calls.append((name, module, args[0] if args else next(iter(kwargs.values()), None), first))

        return hook

    def after(self, name: str) -> list[tuple[str, nn.Module, Any, Tensor]]:
        """What ends after a module."""
        position = next(i for i, call in enumerate(self.calls) if call[0] == name)
        return self.calls[position + 1 :]


def all_modules(probe: Probe) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in probe.module.named_modules() if name]


def is_norm(module: nn.Module) -> bool:
    return type(module).__name__ in ("LayerNorm", "RMSNorm")


def the_sum(recorder: Recorder, module: str) -> Tensor:
    """The residual sum behind a module: what the next norm in its layer sees, else what the layer gives."""
    for name, one, x, output in recorder.after(module):
        if is_norm(one):
            return x
        if module.startswith(f"{name}.") and "Layer" in type(one).__name__:
            return output
    raise AssertionError(module)


def the_share(recorder: Recorder, module: str) -> Tensor:
    """What a module adds to the sum: what it gives, or what the LayerScale behind it does."""
    own = next(output for name, _, _, output in recorder.calls if name == module)
    for _, one, x, output in recorder.after(module):
        if "LayerScale" in type(one).__name__ and torch.equal(x, own):
            return output
        if is_norm(one):
            break
    return own


@pytest.mark.parametrize("case", REAL, ids=lambda case: case.name)
def test_a_writer_sees_the_residual_sum(case: Case, tmp_path: Path) -> None:
    case.source.save(tmp_path / "model", 0)
    models, probe = probed(tmp_path / "model")
    facts, seen_sums, triples = models.layout.facts, 0, 0
    reached = set()
    for batch in inputs_by_tower(case, tmp_path / "model"):
        recorder = Recorder(probe, batch)
        seen = probe.see(batch, list(probe.sites))
        modules = {name: module for name, module in all_modules(probe)}
        for name, one in seen.items():
            site = probe.sites[name]
            x, y = next((x, y) for module, _, x, y in recorder.calls if module == site.module)
            assert torch.equal(one.x, x) and isinstance(modules[site.module], nn.Linear)
            if one.carry is None:
                assert torch.equal(one.y, y) and torch.equal(one.own, y)
                continue
            seen_sums += 1
            torch.testing.assert_close(one.y, the_sum(recorder, site.module), rtol=0, atol=1e-12)
            torch.testing.assert_close(one.own, the_share(recorder, site.module), rtol=0, atol=1e-12)
            torch.testing.assert_close(one.carry + one.own, one.y, rtol=0, atol=1e-12)
        order = probe.order(batch)
        assert [name for group in order for name in group] == [n for n in _ended(recorder, probe) if n in probe.sites]
        for group in order:
            assert len({seen[name].x.data_ptr() for name in group}) == 1
        triples += sum(len(group) == 3 for group in order)
        reached |= {tower_of(space) for name in seen for space in models.layout.params[name].spaces}
    layers = {tower: facts[tower]["layers"] for tower in facts if tower in reached}
    assert seen_sums == sum(layers[tower] * (3 if tower == "decoder" else 2) for tower in layers)
    assert triples == sum(layers.values()), "q, k and v read one tensor"


def _ended(recorder: Recorder, probe: Probe) -> list[str]:
    """Names of the sites in the order of the run."""
    names = {site.module: name for name, site in probe.sites.items()}
    return [names[name] for name, *_ in recorder.calls if name in names]


def test_all_wanted_cases_are_there() -> None:
    assert {case.name for case in REAL} == set(NAMES)


def test_attention_that_is_no_module_is_left_out(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "SiglipVisionModel")
    case.source.save(tmp_path / "model", 0)
    models, probe = probed(tmp_path / "model")
    pooling = [name for name in models.layout.params if ".head.attention." in name]
    assert pooling and not probe.sites.keys() & set(pooling)
    assert {"vision_model.head.mlp.fc1.weight", "vision_model.head.mlp.fc2.weight"} <= probe.sites.keys()


def test_a_run_ends_where_everything_was_seen(tmp_path: Path) -> None:
    save(vit(0), tmp_path / "model")
    _, probe = probed(tmp_path / "model")
    batch = {"pixel_values": torch.randn(2, 1, 8, 8, dtype=torch.float64)}
    called: list[str] = []
    layers = [module for module in probe.module.modules() if type(module).__name__ == "ViTLayer"]
    for layer in layers:
        layer.register_forward_hook(lambda *_: called.append("layer"))
    found = probe.see(batch, ["encoder.layer.0.attention.output.dense.weight"])
    assert len(found) == 1 and not called and len(layers) == 2


REPLAYED = [
    case for case in REAL if case.name in ("BertForMaskedLM", "Dinov2ForImageClassification", "CLIPModel", "T5Model")
]


@pytest.mark.parametrize("case", REPLAYED, ids=lambda case: case.name)
def test_a_layer_is_replayed(case: Case, tmp_path: Path) -> None:
    case.source.save(tmp_path / "model", 0)
    _, probe = probed(tmp_path / "model")
    for batch in inputs_by_tower(case, tmp_path / "model"):
        batches, replay = [batch, {name: x.flip(0) for name, x in batch.items()}], Replay(probe)
        for group in probe.order(batch):
            for number in (0, 1, 0, 1):
                expected, found = probe.see(batches[number], group), replay.see(number, batches[number], group)
                assert found.keys() == expected.keys() == set(group)
                for name, one in found.items():
                    torch.testing.assert_close(one.x, expected[name].x, rtol=0, atol=1e-12)
                    torch.testing.assert_close(one.y, expected[name].y, rtol=0, atol=1e-12)
                    assert (one.carry is None) == (expected[name].carry is None)


# --- moments ----------------------------------------------------------------------------------------------------------


def padded_texts(count: int = 11, length: int = 9) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, length + 1, (count,), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": torch.randint(2, 31, (count, length), generator=generator) * mask, "attention_mask": mask}


@pytest.fixture(scope="module")
def two_berts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Models, Probe, Probe]:
    folder = tmp_path_factory.mktemp("berts")
    models = open_models(*(save(bert(seed=seed), folder / str(seed)) for seed in (0, 1)))
    source, target = (probe_of_model(one, models.layout, "cpu") for one in (models.source, models.target))
    return models, source, target


def normalised(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    target, source = target - target.mean(0), source - source.mean(0)
    return target.T @ source / (np.linalg.norm(target) * np.linalg.norm(source))


@pytest.mark.parametrize("batch_size", [1, 3, 11])
def test_moments_are_cross_covariances(two_berts: tuple[Models, Probe, Probe], batch_size: int) -> None:
    models, source, target = two_berts
    texts = padded_texts()
    form = models.layout.with_ties(streams="junction")
    found = scores_of(collect(source, target, form, prepared(texts, batch_size)))
    real = texts["attention_mask"].bool()
    first, second = "encoder.layer.0.", "encoder.layer.1."

    def rows(name: str, of: str) -> tuple[np.ndarray, np.ndarray]:
        seen = [probe.see(texts, list(probe.sites))[f"{name}.weight"] for probe in (target, source)]
        chosen = [getattr(one, of) for one in seen]
        return tuple(x[real].numpy() for x in chosen if x is not None)  # type: ignore[return-value]

    expected = {
        "mlp.0": [rows(first + "intermediate.dense", "y"), rows(first + "output.dense", "x")],
        "heads.0/qk.0": [rows(first + f"attention.self.{one}", "y") for one in ("query", "key")],
        "heads.1/vo.1": [rows(second + "attention.self.value", "y"), rows(second + "attention.output.dense", "x")],
        "stream.0": [rows(first + "attention.output.dense", "carry")],
        "stream.2": [rows(first + "output.dense", "y"), rows(second + "attention.output.dense", "carry")],
        "stream.4": [rows(second + "output.dense", "y")],
    }
    for space, pairs in expected.items():
        wanted = sum(normalised(*pair) for pair in pairs)
        np.testing.assert_allclose(found[space].numpy(), wanted, atol=1e-12, err_msg=space)
    assert found.keys() == {name for name, one in form.spaces.items() if one.moves}


def test_padding_says_nothing(two_berts: tuple[Models, Probe, Probe]) -> None:
    models, source, target = two_berts
    texts = padded_texts()
    other = texts | {"input_ids": texts["input_ids"] + 7 * (1 - texts["attention_mask"])}
    found, again = (scores_of(collect(source, target, models.layout, prepared(one, 4))) for one in (texts, other))
    for space, one in found.items():
        torch.testing.assert_close(again[space], one, rtol=0, atol=1e-12, msg=space)


# --- maps by space ----------------------------------------------------------------------------------------------------


def test_heads_stay_where_something_inside_them_was_not_seen() -> None:
    """T5's position biases: one unit a head, in no activation."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"heads.0/qk.0": 8, "heads.0/vo.0": 8, "heads.0/bias.0": 4, "heads.1.cross/qk.1": 8}
    spaces = {
        name: Space(name, size, 4, "permutation" if "bias" in name else "invertible") for name, size in sizes.items()
    }
    scores = {name: torch.randn(size, size, dtype=torch.float64, generator=generator) for name, size in sizes.items()}
    whole = best_maps(scores, Layout("", {}, spaces), "rotation")
    orders = {name: one.heads.index.tolist() for name, one in whole.items() if isinstance(one, PerHead)}
    assert orders["heads.0/qk.0"] == orders["heads.0/bias.0"] != [0, 1, 2, 3]
    del scores["heads.0/bias.0"]
    found = best_maps(scores, Layout("", {}, spaces), "rotation")
    assert found.keys() == sizes.keys() and found["heads.0/bias.0"].is_identity
    for name in ("heads.0/qk.0", "heads.0/vo.0"):
        one = found[name]
        assert isinstance(one, PerHead) and one.heads.is_identity and not one.is_identity
    torch.testing.assert_close(found["heads.1.cross/qk.1"].matrix(), whole["heads.1.cross/qk.1"].matrix())


def test_a_t5_keeps_its_function(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "T5ForConditionalGeneration")
    for seed in (0, 1):
        case.source.save(tmp_path / str(seed), seed)
    found = transfuse.match(tmp_path / "0", tmp_path / "1", method="activation", inputs=DRAWN)
    biases = [one for name, one in found.spaces.items() if "/bias." in name]
    assert len(biases) == 2 and all(one.is_identity for one in biases) and not found.is_identity
    models = open_models(tmp_path / "0", tmp_path / "1")
    checked = check_equivalence(models.source, models.layout, found, double=True)
    assert checked.passed and checked.error is not None and checked.error < 1e-9


# --- planted truths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "group", "method"),
    [
        ("vit", "permutation", "activation"),
        ("vit", "permutation", "activation-permutation"),
        ("vit", "rotation", "activation"),
        ("bert", "permutation", "activation"),
        ("bert", "permutation", "activation-permutation"),
    ],
)
def test_a_planted_truth_is_found(family: str, group: str, method: str, tmp_path: Path) -> None:
    source = vit(0) if family == "vit" else bert(seed=0)
    places = [save(source, tmp_path / "source"), save(fine_tuned(source), tmp_path / "tuned"), tmp_path / "target"]
    plant(places[0], places[2], group=group, seed=3, tie_qkv=False)
    truth = Maps.load(places[2] / PLANTED_MAPS)
    result = transfuse.port(*places, method=method, inputs=DRAWN, double=True)
    assert result.report["equivalence"]["passed"] and result.report["relation"]["null"] is None
    assert result.maps.spaces.keys() == truth.spaces.keys()
    exact = method == "activation-permutation"
    for name, one in result.maps.spaces.items():
        torch.testing.assert_close(one.matrix(), truth.spaces[name].matrix(), rtol=0, atol=0 if exact else 1e-4)
        assert result.report["match"]["alignment"][name] == pytest.approx(1, abs=1e-6)
    assert result.report["match"]["examples"] == 64
    state = result.state_dict()
    if exact:
        expected = transfuse.port(*places, maps=truth)
        assert all(torch.equal(one, expected.tensor(name)) for name, one in state.items())
    ported = type(source).from_pretrained(None, config=source.config, state_dict=state, dtype=torch.float64).eval()
    tuned = type(source).from_pretrained(places[1], dtype=torch.float64).eval()
    inputs = {"pixel_values": torch.randn(4, 1, 8, 8, dtype=torch.float64)} if family == "vit" else padded_texts()
    with torch.no_grad():
        outputs = [model(**inputs) for model in (ported, tuned)]
    if family == "vit":
        torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=1e-6)
    else:
        back = result.maps["pooled"]
        assert back is not None
        moved = back.inverse().apply(outputs[0].pooler_output, -1)
        torch.testing.assert_close(moved, outputs[1].pooler_output, rtol=0, atol=1e-6)


# --- Theseus ----------------------------------------------------------------------------------------------------------


def both_ends(probe: Probe, batches: list[dict[str, Tensor]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and outputs of one module, all tokens of all batches one below the other."""
    module, kept = probe.module.get_submodule(probe.sites[name].module), []
    handle = module.register_forward_hook(lambda _, args, output: kept.append((args[0], output)))
    with torch.no_grad():
        for batch in batches:
            probe.run(batch)
    handle.remove()
    x, y = (torch.cat([pair[i].flatten(0, -2) for pair in kept]).numpy() for i in range(2))
    return x, y


def procrustes(target: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """U and V of the centred cross-covariance, without directions of which it says nothing (behind a norm, one)."""
    left, values, right = np.linalg.svd((target - target.mean(0)).T @ (source - source.mean(0)))
    rank = int((values > 1e-6 * values[0]).sum())
    assert rank >= len(values) - 9
    return left[:, :rank], right[:rank].T


def test_theseus_is_procrustes_at_both_ends_of_every_module(tmp_path: Path) -> None:
    for name, seed in (("source", 0), ("target", 1)):
        save(vit(seed), tmp_path / name)
    save(fine_tuned(vit(0)), tmp_path / "tuned")
    places = [tmp_path / name for name in ("source", "tuned", "target")]
    result = transfuse.port(*places, method="theseus", inputs=DRAWN)
    assert result.report["equivalence"] is None, "there is no mapped source"
    models = open_models(places[0], places[2], places[1])
    drawn = open_inputs(models, get_method("theseus"), DRAWN).task
    assert drawn is not None and models.tuned is not None
    source, target = (probe_of_model(one, models.layout, "cpu") for one in (models.source, models.target))
    batches = list(drawn.batches())
    for name in target.sites:
        ends = zip(("in", "out"), both_ends(target, batches, name), both_ends(source, batches, name), strict=True)
        maps = {}
        for end, ours, theirs in ends:
            u, v = procrustes(ours, theirs)
            found = result.maps[f"{name.removesuffix('.weight')}:{end}"]
            if found is None:  # what users see stays
                assert (name, end) == ("classifier.weight", "out")
                maps[end] = np.eye(ours.shape[1])
                continue
            maps[end] = found.matrix().numpy()
            np.testing.assert_allclose(maps[end] @ maps[end].T, np.eye(len(maps[end])), atol=1e-9)
            np.testing.assert_allclose(maps[end] @ v, u, atol=1e-4)
        tau = (models.tuned.tensor(name) - models.source.tensor(name)).numpy()
        np.testing.assert_allclose(result.tensors.update.of(name), maps["out"] @ tau @ maps["in"].T, atol=1e-12)
        bias = name.replace(".weight", ".bias")
        tau = (models.tuned.tensor(bias) - models.source.tensor(bias)).numpy()
        np.testing.assert_allclose(result.tensors.update.of(bias), maps["out"] @ tau, atol=1e-12)
    layer = "encoder.layer.0"
    readers = {"layernorm_before": "attention.attention.query", "layernorm_after": "intermediate.dense"}
    norms = {f"{layer}.{norm}": f"{layer}.{reader}" for norm, reader in readers.items()} | {"layernorm": "classifier"}
    for norm, reader in norms.items():  # moved as what the norm gives is
        inward = result.maps[f"{reader}:in"]
        assert inward is not None
        for name in (f"{norm}.weight", f"{norm}.bias"):
            tau = (models.tuned.tensor(name) - models.source.tensor(name)).numpy()
            np.testing.assert_allclose(result.tensors.update.of(name), inward.matrix().numpy() @ tau, atol=1e-9)


@pytest.mark.parametrize(
    ("kind", "tower"), [(CLIPVisionModelWithProjection, "vision"), (CLIPTextModelWithProjection, "text")]
)
def test_theseus_maps_a_joint_embedding(tmp_path: Path, kind: Any, tower: str) -> None:
    """Target embeds like source, turned by a rotation: the task vector of its projection has to turn, too."""
    config = getattr(clip(CLIPModel, 0).config, f"{tower}_config")
    config.projection_dim = 12
    source, target = (randomise(kind(config).double(), 0) for _ in range(2))
    tuned, projection = fine_tuned(source), f"{tower.replace('vision', 'visual')}_projection"
    rotation = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    with torch.no_grad():
        target.get_submodule(projection).weight.copy_(rotation @ source.get_submodule(projection).weight)
    places = [save(one, tmp_path / str(i)) for i, one in enumerate((source, tuned, target))]
    result = transfuse.port(*places, method="theseus", inputs=DRAWN)
    weights = [one.get_submodule(projection).weight.detach() for one in (tuned, source)]
    added, right = result.tensors.update.of(f"{projection}.weight"), rotation @ (weights[0] - weights[1])
    assert float((added * right).sum() / added.norm() / right.norm()) > 0.99


def test_norms_move_with_what_reads_them() -> None:
    """By module: of a decoder, of two towers with a joint embedding, and behind the sum as before it."""
    for model, expected in (
        (
            clip(CLIPModel, 0),
            {
                "vision_model.pre_layrnorm.weight": "vision.stream.0",
                "vision_model.encoder.layers.1.layer_norm2.bias": "vision_model.encoder.layers.1.mlp.fc1:in",
                "vision_model.post_layernorm.weight": "visual_projection:in",
                "text_model.final_layer_norm.bias": "text_projection:in",
            },
        ),
        (
            bert(BertForMaskedLM),
            {
                "encoder.layer.0.attention.output.LayerNorm.weight": "encoder.layer.0.intermediate.dense:in",
                "encoder.layer.1.output.LayerNorm.bias": "cls.predictions.transform.dense:in",
            },
        ),
        (
            randomise(T5ForConditionalGeneration(T5Config(**T5)).double(), 0),
            {
                "decoder.block.0.layer.0.layer_norm.weight": "decoder.block.0.layer.0.SelfAttention.*:in",
                "decoder.block.0.layer.1.layer_norm.weight": "decoder.block.0.layer.1.EncDecAttention.q:in",
                "encoder.final_layer_norm.weight": "decoder.block.*.layer.1.EncDecAttention.*:in",
            },
        ),
    ):
        params = as_models(model).layout.with_ties(streams="module").params
        for name, space in expected.items():
            (found,) = params[name].spaces
            assert fnmatch(found, space), name


def test_a_seen_module_that_adds_to_nothing_gives_what_it_gives() -> None:
    x, y = torch.ones(2, 3), torch.full((2, 3), 2.0)
    assert torch.equal(Seen(x, y).own, y) and torch.equal(Seen(x, y, x).own, y - x)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_methods_that_go_by_activations_need_inputs(tmp_path: Path) -> None:
    places = [save(vit(seed), tmp_path / str(seed)) for seed in (0, 1)]
    for method in ("activation", "activation-permutation", "theseus", "functional"):
        with pytest.raises(InputError, match=f"method {method} goes by activations: give unlabelled inputs"):
            transfuse.match(*places, method=method)


# --- two masks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["no-mask-of-the-decoder", "masks-of-both"])
def test_every_tower_has_its_own_mask(masked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts and answers of one length, the texts padded: no answer is cut by the mask of its text, nor the reverse."""
    next(case for case in CASES if case.name == "T5ForConditionalGeneration").source.save(tmp_path / "t5", 0)
    models, probe = probed(tmp_path / "t5")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 30, (2, 4, 6), generator=generator)
    masks = [(torch.arange(6) < torch.tensor(lengths)[:, None]).long() for lengths in ([6, 4, 3, 2], [1, 6, 5, 5])]
    batch = {"input_ids": ids[0], "attention_mask": masks[0], "decoder_input_ids": ids[1]}
    batch |= {"decoder_attention_mask": masks[1]} if masked else {}
    kept = {"encoder": masks[0].bool(), "decoder": masks[1].bool() if masked else torch.ones(4, 6).bool()}

    def tower(name: str) -> str:
        of_encoder = name.startswith("encoder.") or re.search(r"EncDecAttention\.[kv]\.", name)
        return "encoder" if of_encoder else "decoder"

    inputs = prepared(batch, 4)
    form = models.layout.with_ties(streams="junction")
    seen = probe.see(batch, list(probe.sites))
    found = collect(probe, probe, form, inputs)
    assert {tower(name) for one in found.values() for name in one} == {"encoder", "decoder"}
    for space, one in found.items():
        for name, moments in one.items():
            assert moments.rows == int(kept[tower(name)].sum()), (space, name)
            if "/" in space and not name.endswith(".o.weight"):
                torch.testing.assert_close(moments.target, seen[name].y[kept[tower(name)]].double().sum(0), msg=name)

    fitted: dict[str, float] = {}

    def noted(student: Probe, site: Any, halves: Any, ridge: float | None) -> dict[str, Tensor]:
        fitted[site.name] = halves[0].weight + halves[1].weight
        return {}

    means = functional._means(functional.Teachers(probe, probe, probe, Maps({})), form, list(seen), inputs)
    for name, (mine, _) in means.items():
        torch.testing.assert_close(mine, seen[name].y[kept[tower(name)]].double().mean(0), msg=name)
    monkeypatch.setattr(functional, "_solved", noted)
    functional.fit(
        probe, functional.Teachers(probe, probe, probe, Maps({})), form, Unlabelled(inputs), functional.FitOptions()
    )
    assert {tower(name) for name in fitted} == {"encoder", "decoder"}
    for name, weight in fitted.items():
        assert weight == int(kept[tower(name)].sum()) + 7 * 4, name  # the first token of each counts 8
