"""Porting tiny models of real classes: what is computed, what is written, and that a failure leaves nothing behind."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    CLIPForImageClassification,
    CLIPModel,
    ViTForImageClassification,
)

from tiny import Model, State, bert, clip, fine_tuned, planted, randomise, save, state_of, vit
from transfuse import InputError, Inputs, VerificationError, match, port
from transfuse.data.tasks import DataSpec, TaskSpec
from transfuse.porting import output, run
from transfuse.porting.inspection import inspect_models
from transfuse.porting.merge import merge
from transfuse.porting.verify import Equivalence
from transfuse.running.building import Loading
from transfuse.study.gradfix import refine
from transfuse.study.interpolate import interpolate
from transfuse.study.scale import scale
from transfuse.study.sweep import sweep
from transfuse.update.ported import Ported

EXACT = 1e-9
IDS = torch.tensor([[3, 5, 7, 9, 11, 2], [4, 6, 8, 10, 12, 1]])
PIXELS = torch.linspace(-1, 1, 2 * 64, dtype=torch.float64).sin().view(2, 1, 8, 8)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Folders of a base, a fine-tune of it, and a release with its units in another order and noise on top."""
    folder = tmp_path_factory.mktemp("trio")
    source = bert(BertForMaskedLM)
    target, _ = planted(source, 1, noise=0.2)
    return save(source, folder / "source"), save(fine_tuned(source), folder / "tuned"), save(target, folder / "target")


def read(folder: Path) -> State:
    """All weights of a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(kind: Any, folder: Path) -> Model:
    """The written model in its class; no weight may be missing, unexpected or of another shape."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    return model.eval()


def logits(model: Any, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def distance(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert one.dtype == other.dtype == torch.float64
    return float((one - other).abs().max() / one.abs().max())


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.3, -1.0])
def test_naive_adds_the_task_vector(trio: tuple[Path, Path, Path], alpha: float) -> None:
    source, tuned, target = map(read, trio)
    found = port(*trio, method="naive", alpha=alpha).state_dict()
    assert found.keys() == target.keys()
    for name in target:
        assert torch.equal(found[name], target[name] + alpha * (tuned[name] - source[name])), name


def test_alpha_zero_gives_target(trio: tuple[Path, Path, Path]) -> None:
    for method in ("naive", "tied", "transfusion", "random"):
        assert same(port(*trio, method=method, alpha=0.0, null_trials=0).state_dict(), read(trio[2]))


def test_the_update_is_linear_in_alpha(trio: tuple[Path, Path, Path]) -> None:
    maps, target = match(trio[0], trio[2]), read(trio[2])
    ported = {alpha: port(*trio, maps=maps, alpha=alpha, null_trials=0).state_dict() for alpha in (0.5, 1.0)}
    for name in target:
        half, whole = (ported[alpha][name] - target[name] for alpha in (0.5, 1.0))
        torch.testing.assert_close(2 * half, whole, rtol=1e-12, atol=1e-14)
        assert half.any()


def test_random_has_the_norms_of_the_task_vector(trio: tuple[Path, Path, Path]) -> None:
    source, tuned, target = map(read, trio)
    found = {seed: port(*trio, method="random", seed=seed).state_dict() for seed in (0, 1)}
    assert same(found[0], port(*trio, method="random", seed=0).state_dict())
    for name in target:
        updates = [found[seed][name] - target[name] for seed in (0, 1)]
        delta = tuned[name] - source[name]
        for update in updates:
            assert update.norm() == pytest.approx(float(delta.norm()), rel=1e-9)
        if delta.numel() > 100:
            cosines = [float((update * delta).sum() / delta.norm() ** 2) for update in updates]
            assert max(map(abs, cosines)) < 0.5 and not torch.allclose(updates[0], updates[1])


def test_the_release_in_another_order_gets_the_fine_tune(tmp_path: Path) -> None:
    """Without noise on the release, the port is the fine-tune itself in that order: the same logits."""
    source = bert(BertForMaskedLM)
    tuned, (target, _) = fine_tuned(source), planted(source, 1)
    folders = [save(model, tmp_path / name) for model, name in ((source, "s"), (tuned, "t"), (target, "r"))]
    expected = logits(tuned, input_ids=IDS)
    port(*folders, out=tmp_path / "tied", null_trials=2)
    assert distance(logits(load(BertForMaskedLM, tmp_path / "tied"), input_ids=IDS), expected) < EXACT
    port(*folders, out=tmp_path / "naive", method="naive")
    assert distance(logits(load(BertForMaskedLM, tmp_path / "naive"), input_ids=IDS), expected) > 0.1


@pytest.mark.parametrize("method", ["tied", "transfusion"])
def test_maps_are_used_again(trio: tuple[Path, Path, Path], tmp_path: Path, method: str) -> None:
    maps = match(trio[0], trio[2], method=method, null_trials=1)
    maps.save(tmp_path / "maps")
    port(*trio, out=tmp_path / "anew", method=method, null_trials=1)
    # The maps know which method made them.
    port(*trio, out=tmp_path / "file", maps=tmp_path / "maps", null_trials=1)
    port(*trio, out=tmp_path / "held", maps=maps, null_trials=1)
    assert contents(tmp_path / "anew") == contents(tmp_path / "file") == contents(tmp_path / "held")
    assert json.loads((tmp_path / "file" / "result.json").read_text())["method"] == method


@pytest.mark.parametrize("method", ["naive", "random", "tied", "transfusion"])
def test_two_runs_write_the_same_bytes(trio: tuple[Path, Path, Path], tmp_path: Path, method: str) -> None:
    for number in range(2):
        torch.manual_seed(number)
        result = port(*trio, out=tmp_path / str(number), method=method, null_trials=1, seed=5)
        assert same(result.state_dict(), read(tmp_path / str(number)))
    one, other = contents(tmp_path / "0"), contents(tmp_path / "1")
    assert one == other and one.keys() == {"README.md", "config.json", "model.safetensors", "result.json"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert json.loads(one["result.json"])["options"]["seed"] == 5


def test_in_memory_is_what_would_be_written(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    held = port(*trio, null_trials=0)
    assert held.out is None and held.report["lost_updates"] is None
    port(*trio, out=tmp_path / "out", null_trials=0)
    assert same(held.state_dict(), read(tmp_path / "out"))
    config = json.loads((trio[0] / "config.json").read_text())
    states = port(*map(read, trio), config=config, null_trials=0)
    assert same(states.state_dict(), held.state_dict())
    assert states.report["equivalence"]["passed"] and states.report["equivalence"]["checked"] == "BertForMaskedLM"
    port(*map(read, trio), config=config, out=tmp_path / "states", null_trials=0)
    load(BertForMaskedLM, tmp_path / "states")


def test_a_state_dict_as_it_is_in_memory(trio: tuple[Path, Path, Path]) -> None:
    """`state_dict()` has the tied decoder too, which is then moved as the embeddings are."""
    models = [load(BertForMaskedLM, folder) for folder in trio]
    found = port(
        *(model.state_dict() for model in models), config=models[0].config.to_dict(), null_trials=0
    ).state_dict()
    expected = port(*trio, null_trials=0).state_dict()
    assert found.keys() - expected.keys() == {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}
    assert same({name: found[name] for name in expected}, expected)
    assert torch.equal(found["cls.predictions.decoder.weight"], found["bert.embeddings.word_embeddings.weight"])


def test_unknown_architectures() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [{n: torch.randn(4, 3, generator=generator) for n in ("blob.w", "zip.w")} for _ in range(3)]
    source, tuned, target = states
    for method in ("naive", "random"):
        found = port(source, tuned, target, method=method).state_dict()
        for name in target:
            update = found[name] - target[name]
            assert update.norm() == pytest.approx(float((tuned[name] - source[name]).norm()), rel=1e-5)
    torch.testing.assert_close(port(source, tuned, target, method="naive").state_dict()["zip.w"],
                               target["zip.w"] + (tuned["zip.w"] - source["zip.w"]))  # fmt: skip
    for method in ("tied", "transfusion"):
        with pytest.raises(InputError, match=r"source in memory: no layout is known .*bert, roberta.*--method naive"):
            port(source, tuned, target, method=method)


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source_kind", [BertForMaskedLM, BertModel])
@pytest.mark.parametrize("target_kind", [BertModel, BertForPreTraining, BertForMaskedLM])
@pytest.mark.parametrize("tuned_kind", [BertForSequenceClassification, BertForTokenClassification])
def test_a_classifier_comes_along(source_kind: Any, target_kind: Any, tuned_kind: Any, tmp_path: Path) -> None:
    full = bert(BertForPreTraining)
    labels = {0: "bad", 1: "fair", 2: "good"}
    tuned = fine_tuned(full, tuned_kind, id2label=labels, label2id={name: i for i, name in labels.items()})
    folders = [save(as_kind(full, source_kind), tmp_path / "s"), save(tuned, tmp_path / "t")]
    folders.append(save(as_kind(planted(full, 1)[0], target_kind), tmp_path / "r"))
    result = port(*folders, out=tmp_path / "out", null_trials=0)
    assert {"classifier.weight", "classifier.bias"} <= set(result.report["carried"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [tuned_kind.__name__] and config["id2label"]["2"] == "good"
    assert config["label2id"] == {"bad": 0, "fair": 1, "good": 2}
    ported = load(tuned_kind, tmp_path / "out")
    assert not [name for name in read(tmp_path / "out") if name.startswith("cls.")]
    dropped = result.report["dropped"]
    assert bool([name for name in dropped if name.startswith("cls.")]) == (target_kind is not BertModel)
    assert distance(logits(ported, input_ids=IDS), logits(tuned, input_ids=IDS)) < EXACT


def as_kind(model: Model, kind: Any) -> Model:
    """The same weights in another class of the family."""
    other = randomise(kind(copy.deepcopy(model.config)).to(model.dtype), 9)
    bare = other if isinstance(other, BertModel) else other.base_model
    held, wanted = model.base_model.state_dict(), bare.state_dict()  # either may be without a pooler
    bare.load_state_dict({name: held.get(name, tensor) for name, tensor in wanted.items()})
    mine, whole = other.state_dict(), model.state_dict()
    other.load_state_dict({name: whole.get(name, tensor) for name, tensor in mine.items()})
    return other


def test_an_image_classifier_with_fewer_labels(tmp_path: Path) -> None:
    source = vit()  # 7 labels
    target, _ = planted(source, 1)
    tuned = fine_tuned(source, ViTForImageClassification, num_labels=3)
    folders = [save(model, tmp_path / str(i)) for i, model in enumerate((source, tuned, target))]
    result = port(*folders, out=tmp_path / "out", null_trials=2)
    assert result.report["carried"] == ["classifier.bias", "classifier.weight"] and not result.report["dropped"]
    ported = load(ViTForImageClassification, tmp_path / "out")
    assert ported.config.num_labels == 3
    assert distance(logits(ported, pixel_values=PIXELS), logits(tuned, pixel_values=PIXELS)) < EXACT


@pytest.mark.parametrize("tied", [True, False])
def test_a_language_model_on_a_bare_target(tmp_path: Path, tied: bool) -> None:
    source = bert(BertForMaskedLM, tie_word_embeddings=tied)
    tuned, bare = fine_tuned(source), as_kind(planted(source, 1)[0], BertModel)
    bare.config.tie_word_embeddings = True  # as most bare models say, who have nothing to tie
    folders = [save(model, tmp_path / str(i)) for i, model in enumerate((source, tuned, bare))]
    port(*folders, out=tmp_path / "out", null_trials=0)
    ported = load(BertForMaskedLM, tmp_path / "out")
    assert distance(logits(ported, input_ids=IDS), logits(tuned, input_ids=IDS)) < EXACT
    embeddings, decoder = ported.get_input_embeddings(), ported.get_output_embeddings()
    assert (embeddings.weight.data_ptr() == decoder.weight.data_ptr()) == tied
    assert ported.config.tie_word_embeddings == tied


def test_a_head_alone_comes_along(tmp_path: Path) -> None:
    """A probe on a frozen body: the task vector of the body is zero, but the head has to be carried."""
    source = bert()
    tuned, (target, _) = fine_tuned(source, BertForSequenceClassification, size=0.0), planted(source, 1)
    folders = [save(model, tmp_path / str(i)) for i, model in enumerate((source, tuned, target))]
    result = port(*folders, out=tmp_path / "out", null_trials=0)
    assert result.report["delta"]["verdict"] == "head-only"
    ported = load(BertForSequenceClassification, tmp_path / "out")
    assert distance(logits(ported, input_ids=IDS), logits(tuned, input_ids=IDS)) < EXACT


def test_an_image_tower_over_bases_of_two_towers(tmp_path: Path) -> None:
    source = clip(CLIPModel)
    target, _ = planted(source, 1)
    tuned = randomise(CLIPForImageClassification(copy.deepcopy(source.config)).double(), 5)
    source_state, tuned_state = source.state_dict(), tuned.state_dict()
    tuned.load_state_dict({name: source_state.get(name, t) for name, t in tuned_state.items()})
    assert len(source_state.keys() & tuned_state.keys()) > 30
    tuned = fine_tuned(tuned)
    folders = [save(model, tmp_path / str(i)) for i, model in enumerate((source, tuned, target))]
    result = port(*folders, out=tmp_path / "out", null_trials=0)
    ported = load(CLIPForImageClassification, tmp_path / "out")
    assert "visual_projection.weight" in result.report["dropped"]
    pixels = PIXELS.expand(2, 3, 8, 8)
    assert distance(logits(ported, pixel_values=pixels), logits(tuned, pixel_values=pixels)) < EXACT


def test_heads_that_tuned_lacks_stay_where_none_is_carried(tmp_path: Path) -> None:
    full = bert(BertForPreTraining)
    tuned = as_kind(fine_tuned(full), BertModel)
    target, _ = planted(full, 1, noise=0.1)
    folders = [save(model, tmp_path / str(i)) for i, model in enumerate((full, tuned, target))]
    result = port(*folders, out=tmp_path / "out", null_trials=0)
    assert not result.report["carried"] and not result.report["dropped"] and result.report["tensors"]["copy"] == 7
    written, old = read(tmp_path / "out"), read(folders[2])
    assert written.keys() == old.keys()
    for name in old:  # the decoder's partner is moved with the embeddings
        assert torch.equal(written[name], old[name]) == name.startswith("cls."), name
    load(BertForPreTraining, tmp_path / "out")


# --- the form of what is written --------------------------------------------------------------------------------------


def test_tied_tensors_stay_tied(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    port(*trio, out=tmp_path / "out", null_trials=0)
    model = load(BertForMaskedLM, tmp_path / "out")
    assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    assert "cls.predictions.decoder.weight" not in read(tmp_path / "out")


def test_a_target_that_stores_both_of_a_tied_pair(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    model = load(BertForMaskedLM, trio[2])
    old = tmp_path / "old"
    old.mkdir()
    model.config.save_pretrained(old)
    position_ids = torch.arange(14)[None]
    torch.save(model.state_dict() | {"bert.embeddings.position_ids": position_ids}, old / "pytorch_model.bin")
    port(trio[0], trio[1], old, out=tmp_path / "out", null_trials=0)
    written = read(tmp_path / "out")
    assert torch.equal(written["cls.predictions.decoder.weight"], written["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(written.pop("bert.embeddings.position_ids"), position_ids)  # an integer buffer is copied
    expected = port(*trio, null_trials=0).state_dict()
    assert same({name: written[name] for name in expected}, expected)
    loaded: Any = BertForMaskedLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.get_input_embeddings().weight.data_ptr() == loaded.get_output_embeddings().weight.data_ptr()
    assert torch.equal(loaded.get_input_embeddings().weight, expected["bert.embeddings.word_embeddings.weight"])


def test_an_untied_decoder_moves_on_its_own(tmp_path: Path) -> None:
    source = bert(BertForMaskedLM, tie_word_embeddings=False)
    tuned, (target, _) = fine_tuned(source), planted(source, 1)
    folders = [save(model, tmp_path / str(i)) for i, model in enumerate((source, tuned, target))]
    assert "cls.predictions.decoder.weight" in read(folders[0])
    port(*folders, out=tmp_path / "out", null_trials=0)
    ported = load(BertForMaskedLM, tmp_path / "out")
    decoder, embeddings = ported.get_output_embeddings().weight, ported.get_input_embeddings().weight
    assert decoder.data_ptr() != embeddings.data_ptr() and not torch.equal(decoder, embeddings)
    assert distance(logits(ported, input_ids=IDS), logits(tuned, input_ids=IDS)) < EXACT


def test_shards_are_the_targets(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    target = save(load(BertForMaskedLM, trio[2]), tmp_path / "target", max_shard_size="20KB")
    port(trio[0], trio[1], target, out=tmp_path / "out", null_trials=0)
    files = {path.name: set(load_file(path)) for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(files) > 2 and files == {path.name: set(load_file(path)) for path in target.glob("*.safetensors")}
    index = "model.safetensors.index.json"
    written, old = (json.loads((folder / index).read_text()) for folder in (tmp_path / "out", target))
    assert written["weight_map"] == old["weight_map"]
    assert same(read(tmp_path / "out"), port(*trio, null_trials=0).state_dict())
    load(BertForMaskedLM, tmp_path / "out")
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_dtype_of_target_is_kept_and_what_it_loses_is_said(tmp_path: Path) -> None:
    base = vit().float()
    tuned = fine_tuned(base, size=0.003)
    with torch.no_grad():  # an entry that did not change loses nothing
        tuned.vit.layernorm.weight.copy_(base.vit.layernorm.weight)
        tuned.classifier.weight.copy_(base.classifier.weight)
    target = planted(base, 1)[0].to(torch.bfloat16)
    folders = [save(model, tmp_path / str(i)) for i, model in enumerate((base, tuned, target))]
    for method in ("naive", "tied"):
        result = port(*folders, out=tmp_path / method, method=method, null_trials=0)
        written, states = read(tmp_path / method), [read(folder) for folder in folders]
        assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
        assert json.loads((tmp_path / method / "config.json").read_text())["dtype"] == "bfloat16"
        if method == "naive":  # in the plainest way: which updates leave the stored number as it was
            deltas = {name: states[1][name] - states[0][name] for name in written}
            kept = {n: (states[2][n].float() + delta).bfloat16() for n, delta in deltas.items()}
            assert same(kept, written)
            lost = sum(int(((deltas[n] != 0) & (kept[n] == states[2][n])).sum()) for n in kept)
            share = lost / sum(int((delta != 0).sum()) for delta in deltas.values())
            assert result.report["lost_updates"] == pytest.approx(share) and 0.05 < share < 0.95
            assert f"{share:.2%}" in (tmp_path / method / "README.md").read_text()
        else:
            assert 0.05 < result.report["lost_updates"] < 0.95
        load(ViTForImageClassification, tmp_path / method)


def test_nothing_is_lost_in_float64(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    assert port(*trio, out=tmp_path / "out", null_trials=0).report["lost_updates"] == 0


def test_a_carried_head_takes_the_dtype_of_target(tmp_path: Path) -> None:
    base = bert().float()
    tuned = fine_tuned(base, BertForSequenceClassification)
    folders = [save(m, tmp_path / str(i)) for i, m in enumerate((base, tuned, planted(base, 1)[0].to(torch.bfloat16)))]
    port(*folders, out=tmp_path / "out", null_trials=0)
    assert {tensor.dtype for tensor in read(tmp_path / "out").values()} == {torch.bfloat16}
    assert load(BertForSequenceClassification, tmp_path / "out").dtype == torch.bfloat16


CARD = """---
license: mit
language: [en]
pipeline_tag: fill-mask
---
# Base
"""


@pytest.mark.parametrize(
    ("kind", "name"), [(None, "vit.layernorm.bias"), (ViTForImageClassification, "classifier.bias")]
)
def test_what_overflows_in_the_dtype_of_target_is_refused(tmp_path: Path, kind: Any, name: str) -> None:
    """Also without the checks, which would load it."""
    base = vit().float()
    tuned: Any = fine_tuned(base, kind, num_labels=3) if kind else fine_tuned(base)
    with torch.no_grad():
        (tuned.classifier if kind else tuned.vit.layernorm).bias[1] = 1e5
    models = base, tuned, planted(base, 1)[0].half()
    folders = [save(model, tmp_path / "given" / str(i)) for i, model in enumerate(models)]
    with pytest.raises(InputError, match=rf"tensor '{name}' of the output overflows torch\.float16.*alpha too large"):
        port(*folders, out=tmp_path / "out", verify=False, null_trials=0)
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_companions_card_and_result(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    target = save(load(BertForMaskedLM, trio[2]), tmp_path / "target")
    (target / "vocab.txt").write_text("[PAD]\n[UNK]\n")
    (target / "tokenizer_config.json").write_text("{}")
    (target / "README.md").write_text(CARD)
    result = port(trio[0], trio[1], target, out=tmp_path / "out", null_trials=2, alpha=0.5)
    out = tmp_path / "out"
    assert result.out == out
    assert (out / "vocab.txt").read_text() == "[PAD]\n[UNK]\n" and (out / "tokenizer_config.json").read_text() == "{}"
    card: Any = ModelCard.load(out / "README.md")
    assert card.data.license == "mit" and card.data.language == ["en"] and card.data.pipeline_tag is None
    assert card.data.library_name == "transformers" and "transfuse-tied" in (card.data.tags or [])
    assert "alpha 0.5" in card.text and str(trio[1]) in card.text
    report = strict_json((out / "result.json").read_text())
    assert report == json.loads(json.dumps(result.report))
    assert report["alpha"] == 0.5 and report["method"] == "tied" and report["loads"] == "BertForMaskedLM"
    assert report["relation"]["verdict"] == "related-coordinates" and report["delta"]["verdict"] == "fine-tune"
    assert report["equivalence"]["passed"] and report["equivalence"]["error"] < 1e-3
    assert report["models"]["source"] == {"location": str(trio[0]), "fingerprint": result.maps.source}
    assert report["tensors"] == {"add": len(read(out))}


def strict_json(text: str) -> Any:
    """JSON without NaN and Infinity, which are none."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_a_part_that_was_zero_is_still_json(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Freshly initialised biases are zero, and a change relative to them has no number."""
    states = [read(folder) for folder in trio]
    for state, pooler in zip(states, (0.0, 1.0, 0.0), strict=True):
        state["bert.pooler.dense.weight"] = torch.full((16, 16), pooler, dtype=torch.float64)
        state["bert.pooler.dense.bias"] = torch.full((16,), pooler, dtype=torch.float64)
        state["cls.seq_relationship.bias"] = torch.zeros(2, dtype=torch.float64)
        state["cls.seq_relationship.weight"] = torch.zeros(2, 16, dtype=torch.float64)
    config = json.loads((trio[0] / "config.json").read_text())
    result = port(*states, config=config, null_trials=0, verify=False, out=tmp_path / "out")
    report = strict_json((tmp_path / "out" / "result.json").read_text())
    parts = report["delta"]["parts"]
    assert parts["pooler"] is None and parts["embeddings"] > 0 and result.report["delta"]["relative_norm"] > 0


def test_reports_without_checks(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    result = port(*trio, out=tmp_path / "out", method="tied", verify=False, null_trials=0)
    assert result.report["equivalence"] is None and "loads" not in result.report
    assert result.report["relation"]["verdict"] == "not-tested"
    assert "not checked" in (tmp_path / "out" / "README.md").read_text()


def test_checks_in_float64(trio: tuple[Path, Path, Path]) -> None:
    found = port(*trio, double=True, null_trials=0).report["equivalence"]
    assert found["passed"] and found["error"] < 1e-12 and found["dtype"] == "torch.float64"
    found = port(*trio, method="transfusion", null_trials=0).report["equivalence"]
    assert found["passed"] and not found["stock"] and "permuted skips" in found["reason"]


def test_dry_run(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    result = port(*trio, out=tmp_path / "out", dry_run=True)
    assert result.report["dry_run"] and result.report["tensors"] == {"add": len(read(trio[2]))}
    assert not list(tmp_path.iterdir())


def test_force_replaces_an_output(trio: tuple[Path, Path, Path], tmp_path: Path) -> None:
    port(*trio, out=tmp_path / "out", method="naive")
    before = contents(tmp_path / "out")
    with pytest.raises(InputError, match=r"out: it exists"):
        port(*trio, out=tmp_path / "out", method="naive", alpha=0.5)
    assert contents(tmp_path / "out") == before
    port(*trio, out=tmp_path / "out", method="naive", alpha=0.5, force=True)
    assert contents(tmp_path / "out") != before and [path.name for path in tmp_path.iterdir()] == ["out"]


# --- what is refused --------------------------------------------------------------------------------------------------

Folders = tuple[Path, Path, Path]


def _another_architecture(folders: Folders, path: Path) -> dict[str, Any]:
    return {"target": save(vit(), path / "bad")}


def _another_depth(folders: Folders, path: Path) -> dict[str, Any]:
    return {"target": save(bert(BertForMaskedLM, num_hidden_layers=3), path / "bad"), "method": "tied"}


def _other_heads(folders: Folders, path: Path) -> dict[str, Any]:
    return {"target": save(bert(BertForMaskedLM, num_attention_heads=2), path / "bad"), "method": "tied"}


def _another_width(folders: Folders, path: Path) -> dict[str, Any]:
    return {"target": save(bert(BertForMaskedLM, hidden_size=32), path / "bad"), "method": "tied"}


def _another_inner_width(folders: Folders, path: Path) -> dict[str, Any]:
    return {"target": save(bert(BertForMaskedLM, intermediate_size=32), path / "bad"), "method": "tied"}


def _resized_vocabulary(folders: Folders, path: Path) -> dict[str, Any]:
    return {"tuned": save(bert(BertForMaskedLM, vocab_size=33), path / "bad")}


def _nothing_tuned(folders: Folders, path: Path) -> dict[str, Any]:
    return {"tuned": folders[0]}


def _maps_for_others(folders: Folders, path: Path) -> dict[str, Any]:
    match(folders[2], folders[0]).save(path / "bad")
    return {"maps": path / "bad"}


def _maps_for_another_target(folders: Folders, path: Path) -> dict[str, Any]:
    match(folders[0], folders[1]).save(path / "bad")
    return {"maps": path / "bad"}


def _no_maps(folders: Folders, path: Path) -> dict[str, Any]:
    return {"maps": folders[0] / "model.safetensors"}


def _an_unknown_method(folders: Folders, path: Path) -> dict[str, Any]:
    return {"method": "best"}


def _an_unknown_family(folders: Folders, path: Path) -> dict[str, Any]:
    return {"family": "gpt9"}


def _broken(change: Callable[[State], None], role: str, path: Path, folder: Path) -> dict[str, Any]:
    model = save(load(BertForMaskedLM, folder), path / "bad")
    state = read(model)
    change(state)
    save_file(state, model / "model.safetensors", metadata={"format": "pt"})
    return {role: model}


def _a_nan(folders: Folders, path: Path) -> dict[str, Any]:
    def change(state: State) -> None:
        state["bert.encoder.layer.1.output.dense.weight"][3, 2] = float("nan")

    return _broken(change, "tuned", path, folders[1])


def _a_missing_tensor(folders: Folders, path: Path) -> dict[str, Any]:
    def change(state: State) -> None:
        del state["bert.encoder.layer.1.output.dense.weight"]

    return _broken(change, "target", path, folders[2])


def _a_tensor_nobody_knows(folders: Folders, path: Path) -> dict[str, Any]:
    def change(state: State) -> None:
        state["bert.adapter.weight"] = torch.ones(16, 16)

    return _broken(change, "tuned", path, folders[1])


def _a_nan_in_a_carried_head(folders: Folders, path: Path) -> dict[str, Any]:
    """Read only when it is written, half-way through."""
    model: Any = fine_tuned(load(BertForMaskedLM, folders[0]), BertForSequenceClassification)
    with torch.no_grad():
        model.classifier.bias[1] = float("inf")
    return {"tuned": save(model, path / "bad"), "verify": False}


def _a_truncated_shard(folders: Folders, path: Path) -> dict[str, Any]:
    model = save(load(BertForMaskedLM, folders[2]), path / "bad", max_shard_size="20KB")
    shard = sorted(model.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    return {"target": model}


def _a_missing_shard(folders: Folders, path: Path) -> dict[str, Any]:
    model = save(load(BertForMaskedLM, folders[2]), path / "bad", max_shard_size="20KB")
    sorted(model.glob("*.safetensors"))[1].unlink()
    return {"target": model}


def _quantised(folders: Folders, path: Path) -> dict[str, Any]:
    model = save(load(BertForMaskedLM, folders[2]), path / "bad")
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (model / "config.json").write_text(json.dumps(config))
    return {"target": model}


def _a_quantised_tensor(folders: Folders, path: Path) -> dict[str, Any]:
    def change(state: State) -> None:
        name = "bert.encoder.layer.0.output.dense.weight"
        state[name] = state[name].to(torch.float8_e4m3fn)

    return _broken(change, "target", path, folders[2])


def _no_folder_for_it(folders: Folders, path: Path) -> dict[str, Any]:
    return {"out": path / "missing" / "out"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_another_architecture, r"different architectures: source \(.*source\) is bert, .*target \(.*bad\) is vit"),
        (_another_depth, r"number of layers differs: 2 in tuned \(.*tuned\), 3 in target \(.*bad\)"),
        (_other_heads, r"heads differ: 4 in tuned \(.*tuned\), 2 in target \(.*bad\)"),
        (_another_width, r"tensor '.*' is \(.*\) in source \(.*source\) and \(.*\) in target \(.*bad\): another size"),
        (_another_inner_width, r"tensor 'encoder\.layer\.0\.intermediate.* is \(24.* and \(32.* in target \(.*bad\)"),
        (
            _resized_vocabulary,
            r"'embeddings.word_embeddings.weight' is \(31, 16\) in source .*\(33, 16\).*\(.*bad\)",
        ),
        (_nothing_tuned, r"tuned .*source has the same weights as source .*source: the task vector is zero"),
        (_maps_for_others, r"made for another source than .*source \(fingerprints differ\)"),
        (_maps_for_another_target, r"made for another target than .*target \(fingerprints differ\)"),
        (_no_maps, r"source/model\.safetensors: not a maps file of transfuse"),
        (_an_unknown_method, r"unknown method 'best'; known: naive, random, git-rebasin, "),
        (_an_unknown_family, r"unknown family 'gpt9'; known: bert, roberta"),
        (
            _a_nan,
            r"bad/model\.safetensors: tensor 'bert\.encoder\.layer\.1\.output\.dense\.weight' holds nan at .*3",
        ),
        (_a_nan_in_a_carried_head, r"bad/model\.safetensors: tensor 'classifier\.bias' holds inf at index \(1,\)"),
        (_a_missing_tensor, r"'encoder\.layer\.1\.output\.dense\.weight' is in source .* but not in target \(.*bad\)"),
        (_a_tensor_nobody_knows, r"bad: tensor '.*adapter.weight' \(16, 16\) is not in the layout of family 'bert'"),
        (_a_truncated_shard, r"bad/model-00002-of-.*\.safetensors: not a valid safetensors file"),
        (
            _a_missing_shard,
            r"bad/model-00002-of-.*\.safetensors: missing, though model\.safetensors\.index\.json",
        ),
        (_quantised, r"bad: its config has a 'quantization_config'; quantised weights cannot be merged"),
        (_a_quantised_tensor, r"bad, file 'model.safetensors': tensor 'bert\..*0\.output\.dense\.weight' is quantised"),
        (_no_folder_for_it, r"missing/out: the folder .*missing does not exist"),
    ],
)
def test_refused(trio: Folders, tmp_path: Path, make: Callable[[Folders, Path], dict[str, Any]], message: str) -> None:
    (tmp_path / "given").mkdir()
    (tmp_path / "place").mkdir()
    given = {**dict(zip(("source", "tuned", "target"), trio, strict=True)), **make(trio, tmp_path / "given")}
    with pytest.raises(InputError, match=message):
        port(**{"out": tmp_path / "place" / "out", "null_trials": 0, **given})
    assert not list((tmp_path / "place").iterdir()) and not (tmp_path / "given" / "missing").exists()


def test_a_failed_check_writes_nothing(trio: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = Equivalence("BertForMaskedLM", 0.7, ("logits",), "torch.float32", True, False)
    monkeypatch.setattr(run, "check_equivalence", lambda *_, **__: failed)
    with pytest.raises(VerificationError, match=r"differs from source by 7\.0e-01 in BertForMaskedLM"):
        port(*trio, out=tmp_path / "out", null_trials=0)
    assert not list(tmp_path.iterdir())


def test_an_output_that_does_not_load_is_undone(trio: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, missing = output.load_transformers, ["bert.pooler.dense.weight"]  # which none of the inputs has either

    def load_some(*given: Any) -> tuple[Any, Loading]:
        return loaded(*given)[0], Loading(frozenset(missing), frozenset(), frozenset())

    monkeypatch.setattr(output, "load_transformers", load_some)
    assert port(*trio, out=tmp_path / "out", null_trials=0).report["loads"] == "BertForMaskedLM"
    missing.append("bert.encoder.layer.1.output.dense.weight")
    with pytest.raises(VerificationError, match=r"BertForMaskedLM misses \['bert\.encoder\.layer\.1\.output.*\]"):
        port(*trio, out=tmp_path / "again", null_trials=0)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_leaves_nothing(trio: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = Ported.read
    seen: list[str] = []

    def interrupted(self: Any, out: str) -> Tensor:
        seen.append(out)
        if len(seen) == 9:
            raise KeyboardInterrupt
        return moved(self, out)

    monkeypatch.setattr(Ported, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        port(*trio, out=tmp_path / "out", null_trials=0)
    assert len(seen) == 9 and not list(tmp_path.iterdir())


def test_no_output_over_an_input(trio: Folders, tmp_path: Path) -> None:
    model = save(load(BertForMaskedLM, trio[2]), tmp_path / "target")
    before = contents(model)
    with pytest.raises(InputError, match=r"target is where the target lies .*give another place"):
        port(trio[0], trio[1], model, out=model, method="naive", force=True)
    assert contents(model) == before and len(list(tmp_path.iterdir())) == 1


def test_inputs_are_not_changed(trio: Folders, tmp_path: Path) -> None:
    before = [contents(folder) for folder in trio]
    states = [read(folder) for folder in trio]
    copies = copy.deepcopy(states)
    port(*trio, out=tmp_path / "out", null_trials=0)
    port(*states, config=json.loads((trio[0] / "config.json").read_text()), null_trials=0)
    assert [contents(folder) for folder in trio] == before
    assert all(same(one, other) for one, other in zip(states, copies, strict=True))


def test_state_of_is_what_is_on_disk(trio: Folders) -> None:
    assert same(state_of(load(BertForMaskedLM, trio[0])), read(trio[0]))


def test_the_result_is_of_the_models_as_they_were_given() -> None:
    """Models in memory are trained on afterwards, and what the port gives is trained too: neither changes the port."""
    source = bert(BertForMaskedLM)
    tuned = fine_tuned(source, BertForSequenceClassification)
    models = source, tuned, bert(BertForMaskedLM, seed=1)
    config = source.config.to_dict() | {"architectures": ["BertForSequenceClassification"]}
    wanted = port(*(copy.deepcopy(one.state_dict()) for one in models), config=config, method="naive").state_dict()
    result = port(*(one.state_dict() for one in models), config=config, method="naive")
    for model in models:
        for parameter in model.parameters():
            parameter.data.zero_()
    first = result.state_dict()
    assert same(first, wanted)
    for tensor in first.values():
        tensor.zero_()
    assert same(result.state_dict(), wanted)


def test_modules_are_models(tmp_path: Path) -> None:
    """Modules with a config are what their folders are, whatever class their config remembers."""
    source = bert(BertForMaskedLM)
    tuned = fine_tuned(source, BertForSequenceClassification, num_labels=3)
    target, _ = planted(source, 1, noise=0.1)
    modules = source, torch.nn.DataParallel(tuned), target
    places = [save(one, tmp_path / str(n)) for n, one in enumerate((source, tuned, target))]
    tuned.config.architectures = ["BertForMaskedLM"]  # as after loading the base to train a head on it
    found, wanted = port(*modules, method="tied", null_trials=0), port(*places, method="tied", null_trials=0)
    state, expected = found.state_dict(), wanted.state_dict()
    assert expected.keys() == state.keys()
    assert all((state[name] - one).abs().max() < EXACT for name, one in expected.items())
    assert sorted(found.report["carried"]) == sorted(wanted.report["carried"]) and "classifier.bias" in state
    equivalence = found.report["equivalence"]
    assert equivalence["passed"] and equivalence["checked"] == wanted.report["equivalence"]["checked"]
    maps = match(source, target, null_trials=0)
    assert all(torch.equal(one.matrix(), wanted.maps[space].matrix()) for space, one in maps.spaces.items())  # pyright: ignore
    report = inspect_models(source, tuned, target, null_trials=0)
    assert report["models"]["tuned"]["architectures"] == ["BertForSequenceClassification"]


def test_labels_of_a_module_are_those_of_its_folder(tmp_path: Path) -> None:
    models = vit(0), fine_tuned(vit(0)), vit(1)
    place = save(models[1], tmp_path / "tuned")
    result = port(models[0], place, models[2], method="naive")
    assert result.report["carried"] == [], "the heads have the same labels"


@pytest.mark.parametrize("role", ["source", "tuned", "target"])
@pytest.mark.parametrize("given", [None, 3, [1.0], {"weight"}])
def test_what_is_no_model(role: str, given: Any) -> None:
    models: dict[str, Any] = dict.fromkeys(("source", "tuned", "target"), bert()) | {role: given}
    with pytest.raises(InputError, match=f"{role} is given as {type(given).__name__}, which is no model"):
        port(**models)
    if role != "tuned":
        with pytest.raises(InputError, match=f"{role} is given as"):
            match(models["source"], models["target"])
    if given is not None:
        with pytest.raises(InputError, match=f"{role} is given as {type(given).__name__}"):
            inspect_models(**models)


def test_a_report_says_the_options_of_its_own_run(trio: Folders) -> None:
    """Of given maps the options stand beside them, and those that only say how maps are sought are not the run's."""
    maps = match(trio[0], trio[2], null_trials=0, seed=5, max_sweeps=3, tie_qkv=True)
    report = port(*trio, maps=maps, null_trials=0, seed=9, keep_embeddings=True).report
    assert report["options"] == {
        "tie_qkv": True, "ridge": None, "keep_embeddings": True, "seed": 9, "device": "cpu",
    }  # fmt: skip
    assert report["maps_options"] == dict(maps.options) and report["maps_options"]["max_sweeps"] == 3
    assert report["equivalence"]["passed"]
    made = port(*trio, method="tied", null_trials=0, seed=9, max_sweeps=3).report
    assert made["options"]["max_sweeps"] == 3 and made["options"]["seed"] == 9 and "maps_options" not in made
    merged = merge(trio[0], [trio[1]], trio[2], maps=maps, seed=9).report
    assert merged["options"]["seed"] == 9 and merged["maps_options"]["seed"] == 5


def test_maps_of_another_method_than_asked_for(trio: Folders) -> None:
    """A method that is named is the one that runs, or an error; one that is not named is that of the maps."""
    maps = match(trio[0], trio[2], method="git-rebasin", null_trials=0)
    task = TaskSpec(kind="masked-lm", data=DataSpec(path="none"))
    wrong = "the maps were made by method 'git-rebasin' and method 'tied' is asked for"
    runs: dict[str, Callable[..., Any]] = {
        "port": lambda **options: port(*trio, **options),
        "merge": lambda **options: merge(trio[0], [trio[1]], trio[2], **options),
        "sweep": lambda **options: sweep(*trio, task, **options),
        "scale": lambda **options: scale(*trio, task, shots=2, **options),
        "refine": lambda **options: refine(*trio, task, per_class=2, **options),
        "interpolate": lambda **options: interpolate(trio[0], trio[2], task, **options),
    }
    for name, ran in runs.items():
        with pytest.raises(InputError, match=wrong):
            ran(method="tied", maps=maps)
        if name in ("port", "merge"):
            assert ran(maps=maps).report["method"] == "git-rebasin"
            assert ran(maps=maps, method="git-rebasin").report["method"] == "git-rebasin"
    assert port(*trio, maps=maps, method="auto").report["method"] == "git-rebasin"
    assert merge(trio[0], [trio[1]], trio[2], null_trials=0).report["method"] == "tied"


def test_a_classifier_given_twice_is_no_fine_tune(trio: Folders) -> None:
    with pytest.raises(InputError, match="the task vector is zero"):
        port(trio[1], trio[1], trio[2], dry_run=True)


def test_modules_can_be_run_on_inputs() -> None:
    source, target = (vit(seed).float() for seed in (0, 1))
    tuned = fine_tuned(source)
    before = {name: x.clone() for name, x in target.state_dict().items()}
    found = port(source, tuned, target, inputs=Inputs("synthetic", count=8), verify=False)
    assert found.report["method"] == "functional"
    assert all(torch.equal(x, before[name]) and not x.is_meta for name, x in target.state_dict().items())


def test_a_config_of_transformers_completes_a_state_dict() -> None:
    models = [bert(seed=seed) for seed in (0, 1)]
    given = [match(*map(state_of, models), config=one) for one in (models[0].config, models[0].config.to_dict())]
    assert given[0].report == given[1].report and given[0].spaces


def test_an_output_inside_target_is_no_part_of_the_next(trio: Folders, tmp_path: Path) -> None:
    target = Path(shutil.copytree(trio[2], tmp_path / "target"))
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling/config.json").write_text("{}")
    port(trio[0], trio[1], target, method="naive", out=target / "first", verify=False)
    port(trio[0], trio[1], target, method="naive", out=tmp_path / "second", verify=False)
    assert (tmp_path / "second/1_Pooling/config.json").exists() and not (tmp_path / "second/first").exists()
