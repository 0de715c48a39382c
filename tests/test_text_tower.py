"""Text classification on CLIP's text encoder: trained, evaluated, carried to another encoder with its head as it is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPTextModelWithProjection

from tiny_data import TEXTS, TOWER, clip_spec, text_data, write_texts
from transfuse import port
from transfuse.data.splits import DataSpec, load_split
from transfuse.data.tasks import TaskSpec
from transfuse.models.opening import open_models
from transfuse.porting.convert import convert
from transfuse.porting.planted import PLANTED_MAPS, plant
from transfuse.running.inputs import prepare
from transfuse.running.live import load_live, with_state
from transfuse.running.scores import evaluate, score_dict
from transfuse.running.text_tower import CLIPTextModelForSequenceClassification
from transfuse.running.tokens import texts_of
from transfuse.study.initial import InitSpec, TokenizerSpec, initialise
from transfuse.study.train import TrainSpec, train

WORDS = [text for texts in TEXTS.values() for text in texts]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`texts`; the CLIP `clip` and its text tower `tower`; `tuned`, trained from the tower, and `tuned-whole`."""
    place = tmp_path_factory.mktemp("tower")
    write_texts(place / "texts")
    base = clip_spec(tokenizer=TokenizerSpec(vocab_size=100, texts=WORDS)).config
    spec = InitSpec(
        config={**base, "text_config": {**TOWER, "max_position_embeddings": 16}},
        std=0.2,
        tokenizer=TokenizerSpec(vocab_size=100, texts=WORDS),
    )
    initialise(spec, place / "clip")
    convert(place / "clip", place / "tower", tower="text")
    for name, start in (("tuned", "tower"), ("tuned-whole", "clip")):
        train(place / start, training(place), place / name)
    return place


def task(folder: Path, **changes: Any) -> TaskSpec:
    return TaskSpec(kind="text-classification", data=text_data(folder / "texts"), max_length=12, **changes)


def training(folder: Path) -> TrainSpec:
    return TrainSpec(task=task(folder), steps=40, batch_size=16, lr=3e-3, seed=5)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


IDS = torch.randint(5, 40, (6, 9), generator=torch.Generator().manual_seed(0))


def test_it_learns_and_is_an_ordinary_folder(folder: Path) -> None:
    live = load_live(folder / "tuned")
    assert type(live.model) is CLIPTextModelForSequenceClassification
    scores = score_dict(evaluate(live, task(folder), prepare(task(folder), "test", live)))
    assert scores["accuracy"] == 1.0
    assert live.config["id2label"] == {"0": "bad", "1": "good"} and live.config["model_type"] == "clip_text_model"
    state, before = load_file(folder / "tuned" / "model.safetensors"), load_file(folder / "tower" / "model.safetensors")
    assert state.keys() - before.keys() == {"classifier.weight", "classifier.bias"} and before.keys() <= state.keys()
    assert all(not torch.equal(before[name], state[name]) for name in before)  # the whole encoder is trained


def test_the_classifier_reads_the_text_embedding(folder: Path) -> None:
    encoder: Any = CLIPTextModelWithProjection.from_pretrained(folder / "tuned").eval()
    state = load_file(folder / "tuned" / "model.safetensors")
    with torch.no_grad():
        expected = encoder(IDS).text_embeds @ state["classifier.weight"].T + state["classifier.bias"]
    torch.testing.assert_close(logits(load_live(folder / "tuned").model, IDS), expected)


def test_the_same_bytes_again_and_from_the_whole_clip(folder: Path, tmp_path: Path) -> None:
    train(folder / "tower", training(folder), tmp_path / "again")
    weights = [one / "model.safetensors" for one in (folder / "tuned", tmp_path / "again", folder / "tuned-whole")]
    assert len({file.read_bytes() for file in weights}) == 1
    assert not any("vision" in name for name in load_file(weights[-1]))


@pytest.mark.parametrize("base", ["tower", "clip"])
def test_a_planted_order_is_found_and_the_head_comes_along(folder: Path, base: str, tmp_path: Path) -> None:
    """Old base and new base are text towers, or whole CLIPs: then the new one's text tower is taken."""
    plant(folder / base, tmp_path / "target", seed=3)
    tuned, target = folder / "tuned", tmp_path / "target"
    expected = logits(load_live(tuned).model, IDS)
    ways: dict[str, dict[str, Any]] = {"oracle": {"maps": target / PLANTED_MAPS}, "tied": {"method": "tied"}}
    for name, options in ways.items():
        result = port(folder / base, tuned, target, out=tmp_path / name, double=True, **options)
        assert result.report["equivalence"]["error"] < 1e-9
        assert sorted(result.report["carried"]) == ["classifier.bias", "classifier.weight"]
        assert result.report["loads"] == "CLIPTextModelForSequenceClassification"
        torch.testing.assert_close(logits(load_live(tmp_path / name).model, IDS), expected, atol=1e-4, rtol=1e-4)
    moved, head = (load_file(one / "model.safetensors") for one in (tmp_path / "tied", tuned))
    assert torch.equal(moved["classifier.weight"], head["classifier.weight"])
    assert not any("vision" in name for name in moved)
    naive = port(folder / base, tuned, target, method="naive")
    broken = with_state(load_live(tmp_path / "tied"), naive.state_dict())
    assert (logits(broken.model, IDS) - expected).abs().max() > 0.1


# --- pairs of texts -----------------------------------------------------------------------------------------------


def pairs(folder: Path, rows: list[tuple[str, str]]) -> DataSpec:
    folder.mkdir()
    lines = "".join(f"{one}\t{two}\t{number % 2}\n" for number, (one, two) in enumerate(rows))
    (folder / "train.tsv").write_text("sentence1\tsentence2\tlabel\n" + lines)
    return DataSpec(path=str(folder), test="train", text_pair=("sentence1", "sentence2"))


def test_both_texts_of_a_pair_are_read(folder: Path, tmp_path: Path) -> None:
    data = pairs(tmp_path / "pairs", [("a fine film", "lovely"), ("a fine film", "terrible"), ("truly", "lovely")])
    spec = TaskSpec(kind="text-classification", data=data, max_length=12)
    live = load_live(folder / "tuned")
    batch = next(iter(prepare(spec, "test", live).batches()))
    with torch.no_grad():
        found = live.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    distances = torch.cdist(found, found)
    assert (distances + torch.eye(3) > 1e-3).all()
    ends = (batch["input_ids"] == live.tokenizer.eos_token_id).sum(1)
    assert ends.tolist() == [1, 1, 1]


def test_the_longer_text_of_a_pair_is_cut(folder: Path, tmp_path: Path) -> None:
    long, short = "a fine film " * 6, "truly lovely"
    rows = [(long, short), (short, long), (long, long), (short, short)]
    spec = TaskSpec(kind="text-classification", data=pairs(tmp_path / "pairs", rows), max_length=12)
    live = load_live(folder / "tuned")
    found = texts_of(spec, load_split(spec.data, "test"), live)
    tokens = [live.tokenizer.convert_ids_to_tokens(row[:n]) for row, n in zip(*rows_of(found), strict=True)]
    start, end = "[CLS]", "[SEP]"
    three = ["a", "fine", "film"]
    assert tokens[0] == [start, *(three * 3)[:8], "truly", "lovely", end]
    assert tokens[1] == [start, "truly", "lovely", *(three * 3)[:8], end]
    assert tokens[2] == [start, *(three * 2)[:5], *(three * 2)[:5], end]
    assert tokens[3] == [start, "truly", "lovely", "truly", "lovely", end]


def rows_of(found: Any) -> tuple[list[list[int]], list[int]]:
    return found.fields["input_ids"].tolist(), found.lengths.tolist()


def test_a_tower_of_images_is_no_text_classifier(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The layout tells the two classifiers apart: that of images reads the stream."""
    caplog.set_level(logging.ERROR)
    models = open_models(folder / "tower", folder / "tower", folder / "tuned")
    assert models.layout.params["classifier.weight"].spaces == set()
    assert "text.stream.4" in models.layout.params["text_projection.weight"].spaces
