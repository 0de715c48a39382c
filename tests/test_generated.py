"""Inputs for who has none: coloured noise, prompts beside it, and texts that a masked language model writes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import transfuse
from tiny_data import COLOURS, bert_spec, clip_spec, image_task, text_data, vit_spec, write_images, write_texts
from transfuse import InputError
from transfuse.bench.ports import DRAWN, Ports
from transfuse.bench.recipes.parts import MethodSpec
from transfuse.data.splits import DataSpec
from transfuse.data.tasks import ZERO_SHOT, TaskSpec
from transfuse.methods.auto import choose
from transfuse.methods.match import open_inputs
from transfuse.methods.table import get_method
from transfuse.models.opening import open_models
from transfuse.options.groups import Data, Inputs, Keep
from transfuse.options.requests import PortRequest
from transfuse.running.drawn import generated, synthetic
from transfuse.running.inputs import Prepared, ends_of_pixels
from transfuse.running.live import LiveModel, load_live
from transfuse.running.noise import drawn_images
from transfuse.running.unlabelled import read_inputs, unlabelled
from transfuse.running.written import STEPS, written_texts
from transfuse.study.initial import initialise

NAMED = TaskSpec(kind=ZERO_SHOT, data=DataSpec(path="nowhere", classes=list(COLOURS)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `clip`, `vit`, a classifier `bert`, masked language models `writer`, `writer-tuned` and `new`; images."""
    place = tmp_path_factory.mktemp("generated")
    write_images(place / "images")
    write_texts(place / "texts")
    data = text_data(place / "texts")
    for seed, name in enumerate(("clip", "clip-tuned", "clip-new")):
        initialise(clip_spec(seed, seeds={"^text_": 1}), place / name)
    initialise(vit_spec(), place / "vit")
    for seed, name in enumerate(("bert", "writer", "writer-tuned", "new")):
        kind = "BertForSequenceClassification" if name == "bert" else "BertForMaskedLM"
        initialise(bert_spec(data, seed, kind), place / name)
    return place


@pytest.fixture(scope="module")
def writer(folder: Path) -> LiveModel:
    return load_live(folder / "writer")


def whole(found: Prepared) -> dict[str, Tensor]:
    return found.batch(torch.arange(len(found)))


# --- noise ------------------------------------------------------------------------------------------------------------


def noise(count: int = 200, size: tuple[int, int] = (32, 32), seed: int = 0) -> Tensor:
    return drawn_images(count, 3, size, torch.Generator().manual_seed(seed))


def test_noise_is_the_same_bytes_for_a_seed() -> None:
    one, two, other = noise(70), noise(70), noise(70, seed=1)
    assert one.dtype == torch.uint8 and one.shape == (70, 3, 32, 32)
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert len({bytes(image.numpy().tobytes()) for image in one}) == 70
    assert noise(3, (8, 12)).shape == (3, 3, 8, 12)


def test_amplitude_falls_with_frequency_as_in_photographs() -> None:
    """Slopes of log amplitude over log frequency, by least squares; white noise has 0."""
    x = noise().double()
    amplitude = torch.fft.fft2(x - x.mean((-2, -1), keepdim=True)).abs().mean(1)
    step = torch.fft.fftfreq(32, dtype=torch.float64)
    frequency = (step[:, None].square() + step.square()).sqrt()
    inside = (frequency > 0) & (frequency < 0.4)
    logs = frequency[inside].log()
    logs = logs - logs.mean()
    slopes = (amplitude[:, inside].clamp_min(1e-3).log() @ logs) / logs.square().sum()
    assert -1.5 < slopes.mean() < -0.8
    assert slopes.quantile(0.1) < -1.4 and slopes.quantile(0.9) > -0.8


def test_images_differ_in_brightness_and_contrast_and_their_channels_go_together() -> None:
    x = noise().double() / 255
    assert x.mean((1, 2, 3)).std() > 0.1 and 0.4 < x.mean() < 0.6
    contrast = x.std((2, 3)).mean(1)
    assert 0.05 < contrast.min() < 0.12 and 0.2 < contrast.max() < 0.4
    flat = x.flatten(2) - x.flatten(2).mean(-1, keepdim=True)
    first, second = flat[:, 0], flat[:, 1]
    together = (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))
    assert 0.5 < together.mean() < 0.98


def test_drawn_images_reach_the_model_as_its_processor_gives_them(folder: Path) -> None:
    """The image processor itself, on the same bytes."""
    live = load_live(folder / "clip")
    live.image_processor.image_mean, live.image_processor.image_std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    stored = drawn_images(5, 3, (8, 8), torch.Generator().manual_seed(3))
    pictures = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in stored]
    expected = live.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    found = whole(synthetic(live, count=5, seed=3))["pixel_values"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    bare = whole(synthetic(replace(live, image_processor=None), count=5, seed=3))["pixel_values"]
    torch.testing.assert_close(bare, stored / 127.5 - 1)


# --- prompts beside drawn images --------------------------------------------------------------------------------------


def test_classes_of_a_task_make_prompts_without_its_data(folder: Path) -> None:
    live = load_live(folder / "clip")
    found = read_inputs(Inputs("synthetic", count=4, classes=NAMED), live)
    expected = unlabelled(image_task(folder / "images", ZERO_SHOT), live, count=4)
    assert found.extra.keys() == expected.extra.keys() == {"prompt_input_ids", "prompt_attention_mask"}
    assert all(torch.equal(x, expected.extra[name]) for name, x in found.extra.items())
    # What "nowhere" lacks can also come from data.
    read = read_inputs(Inputs("synthetic", count=4, classes=image_task(folder / "images", ZERO_SHOT)), live)
    assert torch.equal(read.extra["prompt_input_ids"], found.extra["prompt_input_ids"])


@pytest.mark.parametrize(
    ("inputs", "model", "message"),
    [
        (Inputs("synthetic", classes=image_task(Path("x"))), "clip", "only a task of kind zero-shot"),
        (Inputs("synthetic", classes=NAMED), "vit", "has no image and text tower"),
        (Inputs(NAMED, classes=NAMED), "clip", "inputs_classes: the inputs are those of a task"),
    ],
)
def test_classes_that_nothing_would_be_done_with(folder: Path, inputs: Inputs, model: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_inputs(inputs, load_live(folder / model))


def test_training_by_two_teachers_needs_no_data(folder: Path) -> None:
    """It needs scores, so prompts: without classes it is refused, with them it is a port like any other."""
    places = [folder / name for name in ("clip", "clip-tuned", "clip-new")]
    options: dict[str, Any] = {"method": "distillation", "train_steps": 3, "verify": False}
    with pytest.raises(InputError, match="needs class scores"):
        transfuse.port(*places, inputs=Inputs("synthetic", count=8), **options)
    inputs = Inputs("synthetic", count=8, classes=NAMED)
    one, two = (transfuse.port(*places, inputs=inputs, **options).state_dict() for _ in range(2))
    target = load_live(folder / "clip-new").model.state_dict()
    assert all(torch.equal(x, two[name]) for name, x in one.items())
    assert any(not torch.equal(x, target[name]) for name, x in one.items() if name in target)


# --- texts that a model writes ----------------------------------------------------------------------------------------


def test_texts_are_drawn_from_the_models_own_conditionals(writer: LiveModel) -> None:
    """A plain loop: one text and one place at a time, probabilities by a softmax in float64."""
    tokenizer, count, tokens = writer.tokenizer, 5, 12
    mask, special = tokenizer.mask_token_id, tokenizer.all_special_ids
    generator = torch.Generator().manual_seed(3)
    texts = [[tokenizer.cls_token_id, *[mask] * (tokens - 2), tokenizer.sep_token_id] for _ in range(count)]
    orders = torch.rand(count, tokens - 2, generator=generator).argsort(1) + 1
    sizes = [len(part) for part in torch.arange(tokens - 2).tensor_split(STEPS)]
    done = 0
    for size in sizes:
        rows, where = [], []
        for number, text in enumerate(texts):
            with torch.no_grad():
                logits = writer.model(input_ids=torch.tensor([text])).logits[0].double()
            for place in sorted(orders[number, done : done + size].tolist()):
                allowed = logits[place].clone()
                allowed[special] = -torch.inf
                rows.append(allowed.softmax(-1).float())
                where.append((number, place))
        if rows:
            drawn = torch.multinomial(torch.stack(rows), 1, generator=generator)[:, 0].tolist()
            for (number, place), token in zip(where, drawn, strict=True):
                texts[number][place] = token
        done += size
    found = written_texts(writer, count=count, tokens=tokens, seed=3)
    assert found.tolist() == texts
    assert not torch.isin(found[:, 1:-1], torch.tensor(special)).any()


def test_what_the_model_is_sure_of_is_written_but_no_special_token(folder: Path) -> None:
    live = load_live(folder / "writer")
    word = live.tokenizer.convert_tokens_to_ids("f")
    assert word not in live.tokenizer.all_special_ids
    bias = live.model.get_output_embeddings().bias  # type: ignore[operator]
    with torch.no_grad():
        bias[word], bias[live.tokenizer.all_special_ids] = 1e3, 1e6
    assert (written_texts(live, count=3, tokens=9)[:, 1:-1] == word).all()


def test_written_texts_are_inputs_like_any_other(writer: LiveModel) -> None:
    one, two, other = (generated(writer, count=70, tokens=10, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(whole(one)["input_ids"], whole(two)["input_ids"])
    assert not torch.equal(whole(one)["input_ids"], whole(other)["input_ids"])
    assert whole(one)["input_ids"].shape == (70, 10) and whole(one)["attention_mask"].all()
    assert len(whole(one)["input_ids"].unique(dim=0)) == 70


@pytest.mark.parametrize(
    ("model", "message"),
    [("bert", "BertForSequenceClassification predicts no tokens"), ("clip", "it reads no texts"),
     ("vit", "it reads no texts")],
)  # fmt: skip
def test_models_that_write_nothing(folder: Path, model: str, message: str) -> None:
    with pytest.raises(InputError, match=f"masked language model.*{message}.*'synthetic'"):
        read_inputs(Inputs("generated", count=4), load_live(folder / model))


def test_a_special_token_beyond_the_table_is_never_drawn(folder: Path, tmp_path: Path) -> None:
    """Tokens that were added to a tokenizer and not to the model are common."""
    shutil.copytree(folder / "writer", tmp_path / "added")
    live = load_live(tmp_path / "added")
    live.tokenizer.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    live.tokenizer.save_pretrained(tmp_path / "added")
    added = load_live(tmp_path / "added")
    rows = added.model.config.vocab_size  # type: ignore[union-attr]
    assert max(added.tokenizer.all_special_ids) >= int(rows)  # type: ignore[arg-type]
    plain = load_live(folder / "writer")
    assert torch.equal(written_texts(added, count=3, tokens=9), written_texts(plain, count=3, tokens=9))


def test_a_processor_for_other_channels_does_not_stop_drawing(folder: Path, tmp_path: Path) -> None:
    config = {**vit_spec().config, "num_channels": 1}
    live = load_live(initialise(vit_spec().model_copy(update={"config": config}), tmp_path / "grey"))
    live.image_processor.image_mean = live.image_processor.image_std = [0.5, 0.5, 0.5]
    drawn = synthetic(live, count=3).batch(torch.arange(3))["pixel_values"]
    assert drawn.shape[:2] == (3, 1) and drawn.min() >= -1 and drawn.max() <= 1
    with pytest.raises(InputError, match="its image processor"):
        ends_of_pixels(live)


def test_a_head_that_was_never_trained_writes_nothing(folder: Path, tmp_path: Path) -> None:
    """A body that is saved without the head its class has: the head would be drawn at random."""
    place = shutil.copytree(folder / "new", tmp_path / "body")
    state = load_file(place / "model.safetensors")
    save_file({name: x for name, x in state.items() if not name.startswith("cls.")}, place / "model.safetensors")
    models = open_models(folder / "writer", place, folder / "writer-tuned")
    with pytest.raises(InputError, match="lacks weights of BertForMaskedLM"):
        open_inputs(models, get_method("functional"), Inputs("generated", count=4), Data())


def test_auto_lets_a_masked_language_model_write(folder: Path) -> None:
    names = ("writer", "new", "writer-tuned")
    found = choose(open_models(*(folder / name for name in names), need_layout=False), PortRequest.of())
    assert found.inputs == Inputs("generated") and "texts that it writes itself" in found.because
    places = [folder / name for name in ("writer", "writer-tuned", "new")]
    result = transfuse.port(*places, inputs=Inputs("generated", count=8), method="functional", verify=False)
    target = load_live(folder / "new").model.state_dict()
    assert any(not torch.equal(x, target[name]) for name, x in result.state_dict().items() if name in target)


def test_recipes_know_the_words_and_give_the_prompts_of_the_task() -> None:
    """Classes of the task that is carried go along with drawn inputs, where it is a zero-shot task."""
    texts = NAMED.model_copy(update={"kind": "text-classification"})
    ports = object.__new__(Ports)
    ports.bench = SimpleNamespace(recipe=SimpleNamespace(tasks={"images": NAMED, "texts": texts}))  # type: ignore[assignment]
    for word in ("synthetic", "generated"):
        both = {"inputs": {"task": word, "count": 9}, "keep": {"task": word}}
        method = MethodSpec.model_validate({"method": "functional", **both})
        assert ports._inputs(method, "texts") == Inputs(word, count=9)
        assert ports._inputs(method, "images").classes == (NAMED if word == "synthetic" else None)
        assert ports._keep(method) == Keep(word)
    # Records of inputs that were drawn otherwise are not taken for those of today's.
    assert ports.method_depends_on(method)["inputs"][1] == DRAWN
