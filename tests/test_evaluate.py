"""Live models, inputs and scores, against plain oracles on tiny data and tiny models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest
import torch
import transformers as library
from click.testing import CliRunner
from safetensors.torch import load_file

from tiny_data import (
    COLOURS,
    bert_spec,
    clip_spec,
    image,
    image_data,
    image_task,
    plain_data,
    text_data,
    vit_spec,
    write_images,
    write_texts,
)
from transfuse.cli.common import app
from transfuse.data.splits import DataSpec, load_split
from transfuse.data.tasks import TaskSpec, load_task
from transfuse.errors import InputError
from transfuse.running import inputs
from transfuse.running.corruption import CONTRAST, NOISE, corrupted
from transfuse.running.inputs import prepare
from transfuse.running.live import load_live, module_params, with_state
from transfuse.running.scores import calibration_error, class_logits, evaluate, loss_of, score_dict
from transfuse.running.tokens import mask_tokens
from transfuse.study.train import initialise

transformers: Any = library  # its classes say too little of themselves for a type checker
ZERO_SHOT = "zero-shot-image-classification"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets `images` and `texts`; models `clip`, `vit` and `bert`."""
    place = tmp_path_factory.mktemp("evaluate")
    write_images(place / "images")
    write_texts(place / "texts")
    initialise(clip_spec(), place / "clip")
    initialise(vit_spec(), place / "vit")
    initialise(bert_spec(text_data(place / "texts")), place / "bert")
    return place


# --- live models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "vit", "bert"])
def test_other_weights_in_the_same_model(folder: Path, tmp_path: Path, name: str) -> None:
    """ViT's stored names are not its names in memory."""
    spec = {"clip": clip_spec(5), "vit": vit_spec(5), "bert": bert_spec(text_data(folder / "texts"), 5)}[name]
    other = load_live(initialise(spec, tmp_path / "other"))
    live = load_live(folder / name)
    before = {key: one.clone() for key, one in live.model.state_dict().items()}
    state = load_file(tmp_path / "other" / "model.safetensors")
    for changed in (with_state(live, state), with_state(with_state(live, state), state)):
        for key, tensor in changed.model.state_dict().items():
            assert torch.equal(tensor, other.model.state_dict()[key]), key
    assert all(torch.equal(one, before[key]) for key, one in live.model.state_dict().items())
    assert torch.equal(
        load_live(folder / name, state=state).model.state_dict()[key],
        other.model.state_dict()[key],
    )


def test_names_in_memory(folder: Path) -> None:
    live = load_live(folder / "vit")
    state = load_file(folder / "vit" / "model.safetensors")
    params = module_params(live, state)
    memory = dict(live.model.named_parameters())
    assert params.keys() == memory.keys() and params.keys() != state.keys()
    assert all(torch.equal(params[name], memory[name]) for name in memory)


def test_a_missing_head_is_an_error(folder: Path) -> None:
    live = load_live(folder / "vit")
    state = load_file(folder / "vit" / "model.safetensors")
    body = {name: tensor for name, tensor in state.items() if not name.startswith("classifier")}
    with pytest.raises(InputError, match=r"lacks weights of ViTForImageClassification: classifier\.bias"):
        with_state(live, body)
    wide = {**state, "classifier.weight": torch.zeros(5, 16)}
    with pytest.raises(InputError, match="other shapes"):
        with_state(live, wide)


def test_a_head_without_a_place_is_an_error(folder: Path) -> None:
    live = load_live(folder / "bert")
    state = load_file(folder / "bert" / "model.safetensors")
    with pytest.raises(InputError, match=r"no place for classifier\.weight"):
        with_state(live, {**state, "classifier.weight": torch.zeros(2, 16)})


def test_only_transformers_models_run(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="in the format of transformers"):
        load_live(tmp_path)


# --- inputs -------------------------------------------------------------------------------------------------------

PROCESSORS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no normalisation": {"do_normalize": False},
    "uneven normalisation": {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
    "enlarged": {"size": {"height": 12, "width": 12}},
    "not rescaled": {"do_rescale": False, "do_normalize": False},
}


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("memory", [2 * 10**9, 0])
def test_pixels_are_those_of_the_processor(
    folder: Path, kind: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "MEMORY", memory)
    live = load_live(folder / "vit")
    for key, value in PROCESSORS[kind].items():
        setattr(live.image_processor, key, value)
    task = image_task(folder / "images", batch_size=5)
    rows = load_split(task.data, "test")
    wanted = live.image_processor(images=rows["image"][:], return_tensors="pt")["pixel_values"]
    prepared = prepare(task, "test", live)
    batches = list(prepared.batches())
    assert [len(batch["labels"]) for batch in batches] == [5, 5, 2]
    torch.testing.assert_close(torch.cat([batch["pixel_values"] for batch in batches]), wanted.float())
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == rows["label"][:]


def test_images_of_many_sizes_and_modes(tmp_path: Path, folder: Path) -> None:
    made = [image("red", 0), image("blue", 1, 13), image("green", 2).convert("L"), image("red", 3).convert("RGBA")]
    rows = datasets.Dataset.from_dict(
        {"image": made, "label": [0, 2, 1, 0]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))}),
    )
    rows.to_parquet(tmp_path / "test.parquet")
    live = load_live(folder / "clip")
    found = next(prepare(image_task(tmp_path, ZERO_SHOT), "test", live).batches())["pixel_values"]
    plain = [one.convert("RGB") for one in made]
    wanted = live.image_processor(images=plain, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found, wanted)


def test_grey_models_get_grey_images(folder: Path, tmp_path: Path) -> None:
    live = load_live(initialise(vit_spec(num_channels=1), tmp_path / "grey"))
    batch = next(prepare(image_task(folder / "images"), "test", live).batches())
    grey = numpy.asarray(load_split(image_data(folder / "images"), "test")[0]["image"].convert("L"))
    torch.testing.assert_close(batch["pixel_values"][0, 0], torch.tensor(grey / 127.5 - 1, dtype=torch.float32))


def test_select_and_shots(folder: Path) -> None:
    live, task = load_live(folder / "vit"), image_task(folder / "images")
    prepared = prepare(task, "test", live)
    some = prepared.select(torch.tensor([4, 2]))
    assert len(some) == 2
    assert torch.equal(some.batch(torch.tensor([1]))["pixel_values"], prepared.batch(torch.tensor([2]))["pixel_values"])
    shots = prepare(task, "train", live, shots=2)
    assert sorted(torch.cat([batch["labels"] for batch in shots.batches()]).tolist()) == [0, 0, 1, 1, 2, 2]


def test_texts_are_those_of_the_tokenizer(folder: Path) -> None:
    live = load_live(folder / "bert")
    task = TaskSpec(kind="text-classification", data=text_data(folder / "texts"), max_length=8, batch_size=7)
    rows = load_split(task.data, "test")
    seen = []
    for batch in prepare(task, "test", live).batches():
        assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
        for ids_, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            assert ids_[mask == 0].eq(live.tokenizer.pad_token_id).all()
            seen.append((tuple(ids_[mask == 1].tolist()), int(label)))
    tokens = live.tokenizer(rows["text"][:], truncation=True, max_length=8)["input_ids"]
    assert sorted(seen) == sorted((tuple(one), label) for one, label in zip(tokens, rows["label"][:], strict=True))


def test_masks() -> None:
    made = torch.randint(5, 60, (200, 50), generator=torch.Generator().manual_seed(0))
    made[:, 0] = 2
    special = torch.tensor([0, 1, 2, 3, 4])
    seen, chosen = mask_tokens(made, 0.3, 4, special, 60, torch.Generator().manual_seed(1))
    assert not chosen[:, 0].any() and abs(chosen[:, 1:].float().mean() - 0.3) < 0.02
    assert torch.equal(seen[~chosen], made[~chosen])
    hidden = seen[chosen]
    assert abs((hidden == 4).float().mean() - 0.8) < 0.03
    assert abs((hidden == made[chosen]).float().mean() - 0.1) < 0.03


def test_masks_are_fixed_for_evaluation_and_new_in_training(folder: Path) -> None:
    live = load_live(folder / "bert")
    task = TaskSpec(kind="masked-lm", data=plain_data(folder / "texts"), max_length=10)
    first, again, other = (prepare(task, "test", live, seed=seed).batch(torch.arange(4)) for seed in (0, 0, 1))
    assert torch.equal(first["input_ids"], again["input_ids"]) and torch.equal(first["labels"], again["labels"])
    assert not torch.equal(first["labels"], other["labels"])
    prepared, generator = prepare(task, "test", live), torch.Generator().manual_seed(0)
    drawn = [prepared.batch(torch.arange(4), generator)["labels"] for _ in range(2)]
    assert not torch.equal(*drawn)
    assert first["input_ids"].shape == (4, 10)
    assert first["input_ids"][:, 0].eq(live.tokenizer.cls_token_id).all()
    assert first["input_ids"][:, -1].eq(live.tokenizer.sep_token_id).all()


def test_too_little_text_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("lovely\n")
    task = TaskSpec(kind="masked-lm", data=DataSpec(path=str(tmp_path), train=None), max_length=16)
    with pytest.raises(InputError, match="lower max_length"):
        prepare(task, "test", load_live(folder / "bert"))


# --- scores -------------------------------------------------------------------------------------------------------


def plain_scores(logits: torch.Tensor, labels: list[int]) -> dict[str, float]:
    """Loss, accuracy and calibration error by loops."""
    losses = [
        math.log(sum(math.exp(v) for v in row)) - row[label] for row, label in zip(logits.tolist(), labels, strict=True)
    ]
    right = [row.index(max(row)) == label for row, label in zip(logits.tolist(), labels, strict=True)]
    chances = [[math.exp(one) for one in row] for row in logits.tolist()]
    sure = [max(row) / sum(row) for row in chances]
    off = 0.0
    for number in range(15):
        inside = [i for i, one in enumerate(sure) if number / 15 < one <= (number + 1) / 15]
        off += abs(sum(right[i] - sure[i] for i in inside)) / len(sure)
    return {"loss": sum(losses) / len(losses), "accuracy": sum(right) / len(right), "calibration_error": off}


def test_a_model_that_is_as_sure_as_it_is_right_is_calibrated() -> None:
    """Sure of four fifths of its answers' worth, and right in four of five; then always right, and never."""
    scores = torch.tensor([[math.log(4.0), 0.0]]).expand(5, 2)
    assert calibration_error(scores, torch.tensor([0, 0, 0, 0, 1])) == pytest.approx(0, abs=1e-7)
    assert calibration_error(scores, torch.zeros(5, dtype=torch.long)) == pytest.approx(0.2)
    assert calibration_error(scores, torch.ones(5, dtype=torch.long)) == pytest.approx(0.8)


def test_corrupted_images_are_the_same_every_time_and_as_bad_as_said(folder: Path) -> None:
    live = load_live(folder / "vit")
    rows = prepare(image_task(folder / "images"), "test", live)
    clean = rows.batch(torch.tensor([3, 1]))["pixel_values"]
    noisy, blurred, flat = (one.batch(torch.tensor([3, 1])) for one in corrupted(rows))
    assert torch.equal(noisy["labels"], rows.batch(torch.tensor([3, 1]))["labels"])
    alone = corrupted(rows)[0].batch(torch.tensor([1]))["pixel_values"]
    assert torch.equal(alone[0], noisy["pixel_values"][1]), "whatever the batch"
    ratio = (noisy["pixel_values"] - clean).std((1, 2, 3)) / clean.std((1, 2, 3))
    assert ratio.tolist() == pytest.approx([NOISE, NOISE], rel=0.1)
    assert (flat["pixel_values"].std((1, 2, 3)) / clean.std((1, 2, 3))).tolist() == pytest.approx([CONTRAST] * 2)
    torch.testing.assert_close(flat["pixel_values"].mean((1, 2, 3)), clean.mean((1, 2, 3)))
    box = clean[0, 1, 3:6, 4:7].mean()  # the box of one pixel inside the image, by hand
    assert blurred["pixel_values"][0, 1, 4, 5].item() == pytest.approx(box.item(), abs=1e-6)


def test_texts_are_not_corrupted(folder: Path) -> None:
    task = TaskSpec(kind="masked-lm", data=plain_data(folder / "texts"), max_length=10)
    assert corrupted(prepare(task, "test", load_live(folder / "bert"))) == []


def test_classification(folder: Path) -> None:
    live, task = load_live(folder / "vit"), image_task(folder / "images", batch_size=5)
    prepared = prepare(task, "test", live)
    found = score_dict(evaluate(live, task, prepared))
    model = transformers.ViTForImageClassification.from_pretrained(folder / "vit")
    rows = load_split(task.data, "test")
    with torch.no_grad():
        logits = model(**live.image_processor(images=rows["image"][:], return_tensors="pt")).logits
    assert found == pytest.approx({**plain_scores(logits, rows["label"][:]), "examples": 12}, abs=1e-5)
    small = score_dict(evaluate(live, image_task(folder / "images", batch_size=1), prepared))
    assert small == pytest.approx(found, abs=1e-6)


def test_labels_are_matched_by_name(folder: Path, tmp_path: Path) -> None:
    """A head that knows the classes in another order, and one more."""
    names = ["blue", "white", "red", "green"]
    live = load_live(initialise(vit_spec(id2label=dict(enumerate(names)), label2id={}), tmp_path / "four"))
    task = image_task(folder / "images")
    prepared = prepare(task, "test", live)
    batch = next(prepared.batches())
    with torch.no_grad():
        logits = live.model(pixel_values=batch["pixel_values"]).logits[:, [names.index(one) for one in COLOURS]]
    found = score_dict(evaluate(live, task, prepared))
    assert found["loss"] == pytest.approx(plain_scores(logits, batch["labels"].tolist())["loss"], abs=1e-5)
    assert loss_of(live, task, batch).item() == pytest.approx(found["loss"], abs=1e-5)


def test_a_head_for_other_classes_is_an_error(folder: Path, tmp_path: Path) -> None:
    live = load_live(initialise(vit_spec(id2label={0: "cat", 1: "dog"}, label2id={}), tmp_path / "pets"))
    task = image_task(folder / "images")
    with pytest.raises(InputError, match=r"its head has 2 labels \(cat, dog.*the data 3 \(red"):
        evaluate(live, task, prepare(task, "test", live))


@pytest.mark.parametrize("templates", [["a photo of a {}."], ["a photo of a {}.", "a {}", "photo {} photo"]])
def test_zero_shot(folder: Path, templates: list[str]) -> None:
    live = load_live(folder / "clip")
    task = image_task(folder / "images", ZERO_SHOT, templates=templates, batch_size=5)
    prepared = prepare(task, "test", live)
    found = score_dict(evaluate(live, task, prepared))
    model = transformers.CLIPModel.from_pretrained(folder / "clip")
    rows = load_split(task.data, "test")
    with torch.no_grad():
        prototypes = []
        for name in COLOURS:
            texts = live.tokenizer([one.format(name) for one in templates], padding=True, return_tensors="pt")
            features = model.get_text_features(texts["input_ids"], texts["attention_mask"]).pooler_output
            mean = (features / features.norm(dim=1, keepdim=True)).mean(0)
            prototypes.append(mean / mean.norm())
        images = live.image_processor(images=rows["image"][:], return_tensors="pt")["pixel_values"]
        seen = model.get_image_features(images).pooler_output
        logits = model.logit_scale.exp() * (seen / seen.norm(dim=1, keepdim=True)) @ torch.stack(prototypes).T
    assert found == pytest.approx({**plain_scores(logits, rows["label"][:]), "examples": 12}, abs=1e-4)


def test_zero_shot_with_one_template_is_the_forward_pass(folder: Path) -> None:
    live, task = load_live(folder / "clip"), image_task(folder / "images", ZERO_SHOT)
    batch = next(prepare(task, "test", live).batches())
    texts = {name.removeprefix("prompt_"): one for name, one in batch.items() if name.startswith("prompt_")}
    with torch.no_grad():
        wanted = live.model(pixel_values=batch["pixel_values"], **texts).logits_per_image
        torch.testing.assert_close(class_logits(live, task, batch), wanted)


def test_zero_shot_of_siglip(folder: Path, tmp_path: Path) -> None:
    spec = clip_spec()
    config = {**spec.config, "model_type": "siglip", "architectures": ["SiglipModel"]}
    text = {**config["text_config"], "projection_size": 16}
    made = spec.model_copy(update={"config": {**config, "text_config": text}})
    live, task = load_live(initialise(made, tmp_path / "siglip")), image_task(folder / "images", ZERO_SHOT)
    batch = next(prepare(task, "test", live).batches())
    assert batch["prompt_input_ids"].shape == (3, 16)  # padded to the full length, no mask
    with torch.no_grad():
        wanted = live.model(pixel_values=batch["pixel_values"], input_ids=batch["prompt_input_ids"]).logits_per_image
        found = class_logits(live, task, batch)
    torch.testing.assert_close(found.softmax(-1), wanted.softmax(-1))


def test_zero_shot_needs_two_towers(folder: Path) -> None:
    live, task = load_live(folder / "vit"), image_task(folder / "images", ZERO_SHOT)
    with pytest.raises(InputError, match="no tokenizer"):
        prepare(task, "test", live)
    prepared = prepare(task, "test", load_live(folder / "clip"))
    with pytest.raises(InputError, match="need CLIP or SigLIP"):
        evaluate(live, task, prepared)


def test_masked_language_model(folder: Path) -> None:
    live = load_live(folder / "bert")
    task = TaskSpec(kind="masked-lm", data=plain_data(folder / "texts"), max_length=10, mask_share=0.4, batch_size=3)
    prepared = prepare(task, "test", live)
    batches = list(prepared.batches())
    total, count = 0.0, 0
    for batch in batches:
        tokens = int((batch["labels"] >= 0).sum())
        with torch.no_grad():
            mean = live.model(**batch).loss.item()
        assert loss_of(live, task, batch).item() == pytest.approx(mean, abs=1e-5)
        total, count = total + mean * tokens, count + tokens
    found = score_dict(evaluate(live, task, prepared))
    assert found["loss"] == pytest.approx(total / count, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["examples"] == len(prepared) == sum(len(batch["labels"]) for batch in batches)


def test_causal_language_model(folder: Path, tmp_path: Path) -> None:
    spec = bert_spec(text_data(folder / "texts"))
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 16, "n_layer": 1, "n_head": 2}
    made = spec.model_copy(update={"config": {**config, "n_positions": 16}})
    live = load_live(initialise(made, tmp_path / "gpt"))
    task = TaskSpec(kind="causal-lm", data=plain_data(folder / "texts"), max_length=12)
    batch = next(prepare(task, "test", live).batches())
    with torch.no_grad():
        assert loss_of(live, task, batch).item() == pytest.approx(live.model(**batch).loss.item(), abs=1e-5)


class _Fixed(torch.nn.Module):
    """Answers with logits that were given."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = transformers.PretrainedConfig(num_labels=logits.shape[1])
        self.logits = logits

    def forward(self, **_: Any) -> Any:
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=self.logits)


@pytest.mark.parametrize("metric", ["matthews_correlation", "f1", "accuracy"])
def test_metrics(folder: Path, metric: Any) -> None:
    guesses = torch.randint(2, (48,), generator=torch.Generator().manual_seed(3))
    task = TaskSpec(kind="text-classification", data=text_data(folder / "texts"), metric=metric)
    live = load_live(folder / "bert")
    prepared = prepare(task, "test", live)
    labels = next(prepared.batches())["labels"]
    fixed = type(live)(_Fixed(torch.nn.functional.one_hot(guesses).float()), {}, None, None, "fixed", {})
    found = score_dict(evaluate(fixed, task, prepared))[metric]
    tp, tn, fp, fn = (int(((guesses == g) & (labels == t)).sum()) for g, t in ((1, 1), (0, 0), (1, 0), (0, 1)))
    wanted = {
        "accuracy": (tp + tn) / 48,
        "f1": 2 * tp / (2 * tp + fp + fn),
        "matthews_correlation": (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)),
    }
    assert found == pytest.approx(wanted[metric]) and task.higher_is_better


def test_a_metric_of_another_kind_is_an_error(folder: Path) -> None:
    live = load_live(folder / "bert")
    task = TaskSpec(kind="masked-lm", data=plain_data(folder / "texts"), max_length=10, metric="f1")
    with pytest.raises(InputError, match="'f1' does not exist"):
        evaluate(live, task, prepare(task, "test", live))


@pytest.mark.parametrize("name", ["clip", "vit", "bert"])
def test_the_loss_can_be_differentiated_by_given_weights(folder: Path, name: str) -> None:
    live = load_live(folder / name, dtype=torch.float64)
    kind: Any = {"clip": ZERO_SHOT, "vit": "image-classification", "bert": "masked-lm"}[name]
    data = plain_data(folder / "texts") if name == "bert" else image_data(folder / "images")
    task = TaskSpec(kind=kind, data=data, max_length=10)
    batch = next(prepare(task, "test", live).batches())
    state = {key: one.double() for key, one in load_file(folder / name / "model.safetensors").items()}
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def loss(alpha: Any) -> torch.Tensor:
        params = module_params(live, {key: one * alpha for key, one in state.items()})
        return loss_of(live, task, batch, params=params)

    assert loss(scale).item() == pytest.approx(loss_of(live, task, batch).item(), abs=1e-12)
    (slope,) = torch.autograd.grad(loss(scale), scale)
    step = 1e-5
    wanted = (loss(1 + step) - loss(1 - step)).item() / (2 * step)
    assert slope.item() == pytest.approx(wanted, rel=1e-4, abs=1e-8)


# --- tasks and the command ----------------------------------------------------------------------------------------


def test_tasks_from_files_and_text(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text("kind: masked-lm\ndata: {path: wikitext, name: wikitext-2-v1}\n")
    from_file = load_task(tmp_path / "task.yaml")
    assert from_file == load_task('{"kind": "masked-lm", "data": {"path": "wikitext", "name": "wikitext-2-v1"}}')
    assert from_file.primary == "loss" and not from_file.higher_is_better


BAD_TASKS = {
    "no such kind": ('{"kind": "vqa", "data": {"path": "x"}}', "kind: "),
    "unknown key": ('{"kind": "masked-lm", "data": {"path": "x", "column": "y"}}', "data.column: Extra inputs"),
    "bad part": ('{"kind": "masked-lm", "data": {"path": "x", "part": [0.5, 0.5]}}', "part is"),
    "no place": ('{"kind": "masked-lm", "data": {"path": "x"}, "templates": ["photo"]}', "has no {} for the class"),
    "not JSON": ("{kind", "not valid YAML or JSON"),
    "no file": ("missing.yaml", "cannot be read"),
}


@pytest.mark.parametrize("fault", BAD_TASKS)
def test_bad_tasks(fault: str) -> None:
    text, message = BAD_TASKS[fault]
    ran = CliRunner().invoke(app, ["eval", "model", "--task", text])
    assert ran.exit_code == 2 and message in ran.stderr and not ran.stdout


def test_the_command(folder: Path) -> None:
    text = json.dumps({"kind": ZERO_SHOT, "data": {"path": "nobody/images", "local": "images"}})
    call = ["eval", str(folder / "clip"), "--task", text, "--data-dir", str(folder)]
    ran = CliRunner().invoke(app, [*call, "--json", "--limit", "6"])
    report = json.loads(ran.stdout)
    assert report["scores"]["examples"] == 6 and report["primary"] == "accuracy" and report["split"] == "test"
    live = load_live(folder / "clip")
    task = load_task(text)
    wanted = score_dict(evaluate(live, task, prepare(task, "test", live, data_dir=folder)))
    said = CliRunner().invoke(app, call).stdout
    assert f"accuracy   {wanted['accuracy']:.4f} *" in said and "examples   12\n" in said
