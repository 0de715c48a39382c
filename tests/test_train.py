"""Random models and training, on tiny data: the same bytes, the right start, what is frozen stays, and it learns."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as library
from click.testing import CliRunner
from safetensors.torch import load_file

from tiny_data import (
    COLOURS,
    PROMPTS,
    bert_spec,
    clip_spec,
    image_data,
    image_task,
    plain_data,
    text_data,
    vit_spec,
    write_images,
    write_texts,
)
from transfuse.cli.common import app
from transfuse.data.splits import DataSpec
from transfuse.data.tasks import TaskSpec
from transfuse.errors import InputError, TransfuseError
from transfuse.files.opening import open_checkpoint
from transfuse.running.drawn import synthetic
from transfuse.running.inputs import prepare
from transfuse.running.live import load_live
from transfuse.running.scores import evaluate, score_dict
from transfuse.study.initial import TokenizerSpec
from transfuse.study.train import InitSpec, TrainSpec, initialise, rate, shifted, train, train_spec

transformers: Any = library  # its classes say too little of themselves for a type checker
ZERO_SHOT = "zero-shot-image-classification"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets `images` and `texts`; models `clip`, `vit` and `bert`."""
    place = tmp_path_factory.mktemp("train")
    write_images(place / "images", train=96, test=24)
    write_texts(place / "texts")
    initialise(clip_spec(), place / "clip")
    initialise(vit_spec(), place / "vit")
    initialise(bert_spec(text_data(place / "texts")), place / "bert")
    return place


def state_of(model: Path) -> State:
    return load_file(model / "model.safetensors")


def changed(before: State, after: State) -> set[str]:
    """Names of tensors that are not bit by bit the same."""
    return {name for name in before.keys() | after.keys() if not _same(before.get(name), after.get(name))}


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def contents(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(place.rglob("*")) if file.is_file()}


def texts_task(folder: Path, **changes: Any) -> TaskSpec:
    return TaskSpec(kind="text-classification", data=text_data(folder / "texts", **changes), max_length=12)


# --- random models ------------------------------------------------------------------------------------------------

_AGAIN = """
import sys, json
from pathlib import Path
from transfuse.study.initial import InitSpec, initialise
initialise(InitSpec.model_validate_json(sys.argv[1]), sys.argv[2])
"""


def test_another_process_makes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """The trainer of tokenizers numbers pieces as a hash table has them, which differs from process to process."""
    spec = bert_spec(text_data(folder / "texts"))
    subprocess.run([sys.executable, "-c", _AGAIN, spec.model_dump_json(), str(tmp_path / "bert")], check=True)
    assert contents(tmp_path / "bert") == contents(folder / "bert")


def test_the_seed_changes_weights_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    initialise(clip_spec(1), tmp_path / "clip")
    files, others = contents(folder / "clip"), contents(tmp_path / "clip")
    assert {name for name in files if files[name] != others[name]} == {"model.safetensors"}
    weights = {name for name, tensor in state_of(folder / "clip").items() if tensor.ndim > 1}
    assert weights <= changed(state_of(folder / "clip"), state_of(tmp_path / "clip"))


def test_parameters_can_have_a_seed_of_their_own(folder: Path, tmp_path: Path) -> None:
    states = {}
    for name, seed, seeds in (("a", 0, {"^text_": 7}), ("b", 1, {"^text_": 7}), ("c", 1, {})):
        initialise(clip_spec(seed, seeds=seeds), tmp_path / name)
        states[name] = load_file(tmp_path / name / "model.safetensors")
    matrices = [name for name, one in states["a"].items() if one.ndim > 1]
    same = {name for name in matrices if torch.equal(states["a"][name], states["b"][name])}
    assert same == {name for name in matrices if name.startswith("text_")}
    assert not any(torch.equal(states["c"][name], states["b"][name]) for name in same)
    with pytest.raises(InputError, match="no parameter has a name like 'txt'"):
        initialise(clip_spec(0, seeds={"txt": 1}), tmp_path / "d")


def test_std(folder: Path) -> None:
    matrices = [tensor for tensor in state_of(folder / "clip").values() if tensor.ndim > 1]
    spread = torch.cat([one.flatten() for one in matrices]).std().item()
    assert spread == pytest.approx(0.1, rel=0.05)


def test_a_clip_is_complete(folder: Path) -> None:
    place = folder / "clip"
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    processor = transformers.AutoImageProcessor.from_pretrained(place)
    model = transformers.CLIPModel.from_pretrained(place)
    config = model.config.text_config
    assert config.vocab_size == len(tokenizer) and config.eos_token_id == tokenizer.eos_token_id != 2
    batch = tokenizer(["a photo of a red.", "red"], padding=True, return_tensors="pt")
    assert tokenizer.unk_token_id not in tokenizer(PROMPTS[0])["input_ids"]
    with torch.no_grad():
        found = model.text_model(batch["input_ids"], batch["attention_mask"])
    last = batch["attention_mask"].sum(1) - 1
    assert batch["input_ids"][torch.arange(2), last].eq(tokenizer.eos_token_id).all()
    torch.testing.assert_close(found.pooler_output, found.last_hidden_state[torch.arange(2), last])
    assert processor.crop_size["height"] == 8


def test_no_dropout_unless_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "bert" / "config.json").read_text())
    assert config["hidden_dropout_prob"] == config["attention_probs_dropout_prob"] == 0
    initialise(bert_spec(text_data(folder / "texts"), hidden_dropout_prob=0.3), tmp_path / "bert")
    assert json.loads((tmp_path / "bert" / "config.json").read_text())["hidden_dropout_prob"] == 0.3


BAD_INITS: dict[str, tuple[dict[str, Any], str]] = {
    "no class": ({"config": {"model_type": "vit"}}, "needs model_type and architectures"),
    "unknown class": ({"config": {"model_type": "vit", "architectures": ["ViTForPoetry"]}}, "'ViTForPoetry'"),
    "bad config": (
        {"config": {"model_type": "vit", "architectures": ["ViTModel"], "hidden_size": "wide"}},
        "cannot be built",
    ),
    "no texts": ({"config": clip_spec().config, "tokenizer": TokenizerSpec()}, "neither data nor texts"),
}


@pytest.mark.parametrize("fault", BAD_INITS)
def test_bad_inits(tmp_path: Path, fault: str) -> None:
    fields, message = BAD_INITS[fault]
    with pytest.raises(InputError, match=message):
        initialise(InitSpec(**fields), tmp_path / "out")
    assert not any(tmp_path.iterdir())


# --- training -----------------------------------------------------------------------------------------------------


def test_it_learns_zero_shot_with_a_frozen_text_tower(folder: Path, tmp_path: Path) -> None:
    task = image_task(folder / "images", ZERO_SHOT)
    spec = TrainSpec(task=task, epochs=12, batch_size=16, lr=3e-3, augment="flip-crop", freeze=["pre_layrnorm"])
    report = train(folder / "clip", spec, tmp_path / "tuned")
    before, after = state_of(folder / "clip"), state_of(tmp_path / "tuned")
    moved = changed(before, after)
    assert moved == {
        name for name in before if name.startswith(("vision_model", "visual_projection")) and "pre_layrnorm" not in name
    }
    live = load_live(tmp_path / "tuned")
    accuracy = score_dict(evaluate(live, task, prepare(task, "test", live)))["accuracy"]
    assert accuracy > 0.9 and report["validation"]["accuracy"] > 0.9
    assert report["steps"] == 12 * (86 // 16)


def test_the_text_tower_trains_if_asked(folder: Path, tmp_path: Path) -> None:
    spec = TrainSpec(task=image_task(folder / "images", ZERO_SHOT), steps=2, batch_size=16, train_text=True)
    train(folder / "clip", spec, tmp_path / "tuned")
    moved = changed(state_of(folder / "clip"), state_of(tmp_path / "tuned"))
    assert "logit_scale" in moved and "text_projection.weight" in moved


def test_what_is_kept_stays_nearly_as_it_is(folder: Path, tmp_path: Path) -> None:
    """With labels turned round, and images on which the base's answers shall stay."""
    task = image_task(folder / "images", ZERO_SHOT)
    base = load_live(folder / "clip")
    images = torch.cat([one["pixel_values"] for one in synthetic(base, count=64, seed=7).batches()])

    def moved(name: str, **keep: Any) -> float:
        spec = TrainSpec(task=task, steps=30, batch_size=16, lr=3e-3, seed=1, **keep)
        train(folder / "clip", spec, tmp_path / name)
        with torch.no_grad():
            both: Any = (load_live(tmp_path / name).model, base.model)
            mine, its = (one.get_image_features(images).pooler_output for one in both)
        return ((mine - its).norm() / its.norm()).item()

    free, kept = moved("free"), moved("kept", keep={"task": "synthetic", "count": 48, "weight": 10.0})
    assert kept < 0.5 * free
    nothing = moved("nothing", keep={"task": "synthetic", "count": 48, "weight": 0.0})
    assert nothing == free, "a weight of nothing is as if there were none"


@pytest.mark.parametrize("augment", ["none", "flip-crop", "shift"])
def test_the_same_seed_gives_the_same_bytes(folder: Path, tmp_path: Path, augment: Any) -> None:
    task = image_task(folder / "images")
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        spec = TrainSpec(task=task, steps=3, batch_size=8, augment=augment, seed=seed)
        torch.randn(3)  # the global generator must not matter
        state = torch.get_rng_state()
        train(folder / "vit", spec, tmp_path / name)
        assert torch.equal(torch.get_rng_state(), state)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert changed(state_of(tmp_path / "one"), state_of(tmp_path / "other"))


def test_dropout_is_seeded(folder: Path, tmp_path: Path) -> None:
    base = initialise(vit_spec(hidden_dropout_prob=0.5), tmp_path / "base")
    spec = TrainSpec(task=image_task(folder / "images"), steps=2, batch_size=8)
    for name in ("one", "two"):
        torch.randn(3)
        train(base, spec, tmp_path / name)
    plain = train(folder / "vit", spec, tmp_path / "plain")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert json.loads((tmp_path / "one" / "train.json").read_text())["loss"] != plain["loss"]


def test_it_starts_from_the_weights_of_base(folder: Path, tmp_path: Path) -> None:
    spec = TrainSpec(task=image_task(folder / "images"), steps=1, lr=1e-30, weight_decay=0.0)
    train(folder / "vit", spec, tmp_path / "tuned")
    before, after = state_of(folder / "vit"), state_of(tmp_path / "tuned")
    assert before.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-25)


def test_a_head_for_the_same_classes_is_kept(folder: Path, tmp_path: Path) -> None:
    data = image_data(folder / "images", transform="rotate90")
    task = TaskSpec(kind="image-classification", data=data)
    train(folder / "vit", TrainSpec(task=task, steps=1, lr=1e-30, weight_decay=0.0), tmp_path / "tuned")
    before, after = state_of(folder / "vit"), state_of(tmp_path / "tuned")
    torch.testing.assert_close(after["classifier.weight"], before["classifier.weight"], rtol=0, atol=1e-25)


@pytest.mark.parametrize("classes", [["ant", "bee", "cat"], ["ant", "bee", "cat", "dog"]])
def test_other_classes_get_a_new_head(folder: Path, tmp_path: Path, classes: list[str]) -> None:
    task = TaskSpec(kind="image-classification", data=image_data(folder / "images", classes=classes))
    spec = TrainSpec(task=task, steps=1, lr=1e-30, weight_decay=0.0)
    for name in ("one", "two"):
        train(folder / "vit", spec, tmp_path / name)
    before, after = state_of(folder / "vit"), state_of(tmp_path / "one")
    assert after["classifier.weight"].shape == (len(classes), 16)
    assert after["classifier.weight"].std() == pytest.approx(0.02, rel=0.5)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert json.loads((tmp_path / "one" / "config.json").read_text())["id2label"] == {
        str(number): name for number, name in enumerate(classes)
    }
    body = [name for name in before if not name.startswith("classifier")]
    for name in body:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-25)


def test_a_clip_becomes_an_image_classifier(folder: Path, tmp_path: Path) -> None:
    spec = TrainSpec(task=image_task(folder / "images"), epochs=8, batch_size=16, lr=3e-3)
    report = train(folder / "clip", spec, tmp_path / "tuned")
    assert type(load_live(tmp_path / "tuned").model).__name__ == "CLIPForImageClassification"
    assert report["validation"]["accuracy"] > 0.9


def test_masked_language_model_then_classifier(folder: Path, tmp_path: Path) -> None:
    """Pre-training keeps the class; fine-tuning takes the body, and makes pooler and head anew."""
    task = TaskSpec(kind="masked-lm", data=plain_data(folder / "texts"), max_length=10, mask_share=0.3)
    live = load_live(folder / "bert")
    first = score_dict(evaluate(live, task, prepare(task, "test", live)))["loss"]
    report = train(folder / "bert", TrainSpec(task=task, steps=60, batch_size=8, lr=5e-3), tmp_path / "base")
    assert report["validation"]["loss"] < first - 1
    assert state_of(tmp_path / "base").keys() == state_of(folder / "bert").keys()
    spec = TrainSpec(task=texts_task(folder), epochs=15, batch_size=8, lr=3e-3)
    tuned = train(tmp_path / "base", spec, tmp_path / "tuned")
    config = open_checkpoint(tmp_path / "tuned").config
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert tuned["validation"]["accuracy"] == 1.0
    assert (tmp_path / "tuned" / "tokenizer.json").read_bytes() == (folder / "bert" / "tokenizer.json").read_bytes()
    new = state_of(tmp_path / "tuned").keys() - state_of(tmp_path / "base").keys()
    assert new == {f"{part}.{kind}" for part in ("bert.pooler.dense", "classifier") for kind in ("weight", "bias")}


def test_shots_and_limit(folder: Path, tmp_path: Path) -> None:
    task = image_task(folder / "images")
    assert train(folder / "vit", TrainSpec(task=task, steps=1, shots=4), tmp_path / "shots")["examples"] == 12
    assert train(folder / "vit", TrainSpec(task=task, steps=1, limit=7), tmp_path / "limit")["examples"] == 7


def test_what_was_done_is_written_down(folder: Path, tmp_path: Path) -> None:
    spec = TrainSpec(task=image_task(folder / "images"), steps=2, batch_size=8)
    report = train(folder / "vit", spec, tmp_path / "tuned")
    written = json.loads((tmp_path / "tuned" / "train.json").read_text())
    assert written == {key: value for key, value in report.items() if key != "seconds"}
    assert TrainSpec.model_validate(written["spec"]) == spec
    assert written["base"]["fingerprint"] == open_checkpoint(folder / "vit").fingerprint()


BAD_RUNS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "pattern that finds nothing": ({"freeze": ["no_such_layer"]}, InputError, "'no_such_layer' finds no parameter"),
    "nothing left": ({"freeze": ["."]}, InputError, "nothing is left to train"),
    "diverged": ({"lr": 1e30, "clip_norm": None, "warmup": 0.0, "steps": 60}, TransfuseError, "diverged"),
    "few rows": ({"shots": 1000}, InputError, "fewer than 1000 shots"),
}


@pytest.mark.parametrize("fault", BAD_RUNS)
def test_a_failed_run_leaves_nothing(folder: Path, tmp_path: Path, fault: str) -> None:
    fields, error, message = BAD_RUNS[fault]
    spec = TrainSpec(**{"task": image_task(folder / "images"), "steps": 2, "batch_size": 8, **fields})
    with pytest.raises(error, match=message):
        train(folder / "vit", spec, tmp_path / "tuned")
    assert not any(tmp_path.iterdir())


def test_a_base_of_another_kind_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no text-classification class for model_type 'vit'"):
        train(folder / "vit", TrainSpec(task=texts_task(folder), steps=1), tmp_path / "tuned")


BAD_SPECS = {
    "both": {"epochs": 1, "steps": 1},
    "neither": {},
    "bad pattern": {"steps": 1, "freeze": ["("]},
    "no rate": {"steps": 1, "lr": 0},
}


@pytest.mark.parametrize("fault", BAD_SPECS)
def test_bad_specs(fault: str) -> None:
    task = TaskSpec(kind="masked-lm", data=DataSpec(path="x"))
    with pytest.raises(InputError, match="training: "):
        train_spec(task=task, **BAD_SPECS[fault])


# --- parts --------------------------------------------------------------------------------------------------------


def test_learning_rate() -> None:
    rates = [rate(step, 20, 0.2, "cosine") for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and rates[4] == 1.0
    assert rates[12] == pytest.approx(0.5) and 0 < rates[19] < 0.02
    assert rates[10] == pytest.approx((1 + math.cos(math.pi * 6 / 16)) / 2)
    assert [rate(step, 4, 0.0, "constant") for step in range(4)] == [1.0] * 4


@pytest.mark.parametrize("flip", [False, True])
def test_shifts_and_flips(flip: bool) -> None:
    """Every image is its original, moved by up to an eighth, perhaps mirrored; and not all in one way."""
    images = torch.rand(40, 3, 16, 24, generator=torch.Generator().manual_seed(0)) + 1
    found = shifted(images, torch.Generator().manual_seed(1), flip=flip)
    assert found.shape == images.shape
    seen = set()
    for original, one in zip(images, found, strict=True):
        padded = torch.zeros(3, 20, 30)
        padded[:, 2:18, 3:27] = original
        crops = {(top, left): padded[:, top : top + 16, left : left + 24] for top in range(5) for left in range(7)}
        ways = {(place, False) for place, crop in crops.items() if torch.equal(crop, one)}
        ways |= {(place, True) for place, crop in crops.items() if torch.equal(crop.flip(2), one)}
        assert len(ways) == 1
        seen |= ways
    assert len(seen) > 20 and {mirrored for _, mirrored in seen} == ({False, True} if flip else {False})


def test_the_command(folder: Path, tmp_path: Path) -> None:
    task = json.dumps({"kind": "image-classification", "data": {"path": str(folder / "images")}})
    out = str(tmp_path / "tuned")
    call = ["finetune", str(folder / "vit"), "--task", task, "-o", out]
    ran = CliRunner().invoke(app, [*call, "--steps", "2", "--lr", "0.01", "--freeze", "embeddings", "--json"])
    report = json.loads(ran.stdout)
    assert report["steps"] == 2 and report["out"] == out and report["spec"]["freeze"] == ["embeddings"]
    again = CliRunner().invoke(app, [*call, "--steps", "2"])
    assert again.exit_code == 2 and "it exists" in again.stderr
    said = CliRunner().invoke(app, [*call, "--epochs", "1", "--force"]).stdout
    assert "steps      1 on 86 rows" in said and "accuracy" in said
    wrong = CliRunner().invoke(app, [*call, "--epochs", "1", "--steps", "1", "--force"])
    assert wrong.exit_code == 2 and "epochs or steps" in wrong.stderr


def test_a_quiet_training_says_nothing(folder: Path, tmp_path: Path) -> None:
    task = json.dumps({"kind": "image-classification", "data": {"path": str(folder / "images")}})
    call = ["finetune", str(folder / "vit"), "--task", task, "-o", str(tmp_path / "tuned"), "--steps", "1", "-q"]
    library.utils.logging.enable_progress_bar()  # as outside of tests
    try:
        ran = CliRunner().invoke(app, call)
        assert library.utils.logging.is_progress_bar_enabled(), "the caller's choice is put back"
    finally:
        library.utils.logging.disable_progress_bar()
    assert ran.exit_code == 0 and ran.stderr == ""


def test_colours_are_what_the_data_hold(folder: Path) -> None:
    assert list(open_checkpoint(folder / "vit").config["id2label"].values()) == list(COLOURS)
