"""Moments of inputs in a file: plain sums, what is drawn from them, and the commands that write and take them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import transfuse
from test_seq2seq import t5_spec
from tiny import fine_tuned, save
from tiny_data import (
    PROMPTS,
    bert_spec,
    clip_spec,
    image_task,
    prepared,
    text_data,
    vit_spec,
    write_images,
    write_texts,
)
from transfuse import InputError
from transfuse.bench.ports import Ports
from transfuse.bench.recipes.reading import load_recipe, parse_recipe, plain
from transfuse.bench.workbench import Recent
from transfuse.cli.common import app
from transfuse.data.tasks import TaskSpec
from transfuse.running.live import LiveModel, load_live
from transfuse.running.moments import Chain, Counted, Moments, Pictures
from transfuse.running.unlabelled import unlabelled
from transfuse.study.initial import initialise


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and texts, and models: `clip`, two `vit`s and a fine-tune, `bert`, `t5`."""
    place = tmp_path_factory.mktemp("moments")
    write_images(place / "images")
    write_texts(place / "texts")
    initialise(clip_spec(), place / "clip")
    initialise(vit_spec(), place / "vit")
    initialise(vit_spec(3), place / "other")
    save(fine_tuned(load_live(place / "vit").model, size=0.3), place / "tuned")
    initialise(bert_spec(text_data(place / "texts")), place / "bert")
    initialise(t5_spec(place), place / "t5")
    return place


def images_of(folder: Path, name: str = "vit", **changes: Any) -> Any:
    return unlabelled(image_task(folder / "images", **changes), load_live(folder / name), count=20)


# --- images -----------------------------------------------------------------------------------------------------------


def test_mean_and_covariance_are_those_of_a_plain_loop() -> None:
    x = torch.randn(37, 3, 4, 4, generator=generator()) * torch.rand(1, 3, 4, 4, generator=generator(1)) + 2
    found = Pictures.of(prepared({"pixel_values": x}, batch_size=5))
    rows = x.double().numpy().reshape(37, -1)
    mean, covariance = np.zeros(48), np.zeros((48, 48))
    for row in rows:
        mean += row / 37
    for row in rows:
        covariance += np.outer(row - mean, row - mean) / 37
    np.testing.assert_allclose(found.mean.flatten(), mean, rtol=1e-6)
    components = found.components.flatten(1).double().numpy()
    assert len(components) == 36, "of so many images, less one for the mean"
    np.testing.assert_allclose(components.T @ components, covariance, atol=1e-6)


def test_the_largest_components_are_kept() -> None:
    """Images of four directions, of which two are strong: these two are found, batch after batch."""
    axes = torch.linalg.qr(torch.randn(48, 4, generator=generator(), dtype=torch.float64)).Q
    weights = torch.randn(60, 4, generator=generator(1), dtype=torch.float64) * torch.tensor([9.0, 5.0, 0.1, 0.05])
    x = (weights @ axes.T).reshape(60, 3, 4, 4)
    found = Pictures.of(prepared({"pixel_values": x}, batch_size=7), most=2).components.flatten(1).double()
    values, vectors = torch.linalg.eigh(torch.cov(x.flatten(1).T, correction=0))
    best = vectors[:, -2:] * values[-2:] @ vectors[:, -2:].T
    assert len(found) == 2
    torch.testing.assert_close(found.T @ found, best, rtol=0, atol=1e-2)


def test_drawn_images_have_the_moments(folder: Path) -> None:
    live = load_live(folder / "vit")
    found = Moments.of(images_of(folder), live)
    assert found.pictures is not None
    drawn = found.drawn(live, count=20000, seed=1).batch(torch.arange(20000))["pixel_values"].double().flatten(1)
    components = found.pictures.components.flatten(1).double()
    covariance = components.T @ components
    scale = float(covariance.diagonal().max())
    torch.testing.assert_close(drawn.mean(0), found.pictures.mean.flatten().double(), rtol=0, atol=0.03 * scale**0.5)
    torch.testing.assert_close(torch.cov(drawn.T), covariance, rtol=0, atol=0.05 * scale)
    again, other = (found.drawn(live, count=3, seed=seed).batch(torch.arange(3))["pixel_values"] for seed in (1, 2))
    assert again.shape == (3, 3, 8, 8) and not torch.equal(again, other)
    assert torch.equal(again, found.drawn(live, count=3, seed=1).batch(torch.arange(3))["pixel_values"])


# --- texts ------------------------------------------------------------------------------------------------------------


def test_numbers_are_counted_and_drawn() -> None:
    found = Counted.of(torch.tensor([7, 2, 2]), Counted.of(torch.tensor([[5, 2], [9, 9]])))
    assert found.values.tolist() == [2, 5, 7, 9] and found.counts.tolist() == [3, 1, 1, 2]
    drawn = found.draw(70000, generator()).bincount(minlength=10).double() / 10000
    torch.testing.assert_close(drawn[[2, 5, 7, 9]], torch.tensor([3.0, 1, 1, 2]).double(), rtol=0.05, atol=0)
    low, high = torch.tensor([1, 3, 2]), torch.tensor([3, 4, 2])
    some = torch.stack([found.between(low, high, generator(seed)) for seed in range(40)])
    assert set(some[:, 0].tolist()) == {5, 7} and set(some[:, 1].tolist()) == {9}
    assert set(some[:, 2].tolist()) == {2, 5, 7, 9}, "where there are none one of all"


def test_pairs_are_those_of_a_plain_loop() -> None:
    ids = torch.randint(1, 6, (30, 9), generator=generator())
    length = torch.randint(2, 10, (30,), generator=generator(1))
    mask = torch.arange(9) < length[:, None]
    ids = ids.masked_fill(~mask, 0)
    found = Chain.of(ids[11:], mask[11:], Chain.of(ids[:11], mask[:11]))
    pairs: dict[tuple[int, int], int] = {}
    ends = set()
    for row, count in zip(ids.tolist(), length.tolist(), strict=True):
        ends.add(row[count - 1])
        for one in pairwise(row[: count - 1]):
            pairs[one] = pairs.get(one, 0) + 1
    counted = zip(found.pairs.values.tolist(), found.pairs.counts.tolist(), strict=True)
    assert {(code // 2**32, code % 2**32): number for code, number in counted} == pairs
    assert found.lengths.counts.sum() == 30 and found.padding.values.tolist() == [0]
    assert found.last.values.tolist() == sorted(ends)


def test_drawn_texts_follow_the_chain() -> None:
    """Of texts that count upwards only such are drawn, with the same ends."""
    ids = torch.stack([torch.tensor([1, *range(n, n + 4), 2, 0]) for n in range(10, 20)])
    mask = (ids != 0).clone()
    mask[0, 4:], ids[0, 4:], ids[0, 3] = False, 3, 2
    drawn, seen = Chain.of(ids, mask).draw(200, generator())
    assert set(seen.sum(1).tolist()) == {4, 6}
    for row, length in zip(drawn.tolist(), seen.sum(1).tolist(), strict=True):
        inner = row[1 : length - 1]
        assert row[0] == 1 and row[length - 1] == 2 and set(row[length:]) <= {0, 3}
        assert inner == list(range(inner[0], inner[0] + len(inner)))


def test_texts_of_two_words_have_no_inside() -> None:
    drawn, _ = Chain.of(torch.tensor([[4, 5]]), torch.ones(1, 2).bool()).draw(3, generator())
    assert drawn.tolist() == [[4, 5]] * 3


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_drawn_texts_fit_the_model(folder: Path, name: str) -> None:
    live = load_live(folder / name)
    data = text_data(folder / "texts")
    kinds = {"bert": TaskSpec(kind="text-classification", data=data), "t5": TaskSpec(kind="seq2seq", data=data)}
    rows = unlabelled(kinds[name], live, count=20)
    moments = Moments.of(rows, live)
    drawn = moments.drawn(live, count=6)
    inputs = drawn.batch(torch.arange(6))
    assert inputs.keys() == {"input_ids", "attention_mask", *(["decoder_input_ids"] if name == "t5" else [])}
    known = set(torch.cat([batch["input_ids"].flatten() for batch in rows.batches()]).tolist())
    assert set(inputs["input_ids"].flatten().tolist()) <= known and not drawn.has_images
    with torch.no_grad():
        assert torch.isfinite(live.model(**inputs).logits).all()


# --- the file ---------------------------------------------------------------------------------------------------------


def both_kinds(folder: Path) -> list[tuple[Moments, LiveModel]]:
    vit, bert = (load_live(folder / name) for name in ("vit", "bert"))
    texts = unlabelled(TaskSpec(kind="text-classification", data=text_data(folder / "texts")), bert, count=20)
    return [(Moments.of(images_of(folder), vit), vit), (Moments.of(texts, bert), bert)]


def test_a_file_draws_the_same(folder: Path, tmp_path: Path) -> None:
    for moments, live in both_kinds(folder):
        for name in ("one", "two"):
            moments.save(tmp_path / name)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
        read = Moments.load(tmp_path / "one")
        assert (read.examples, read.form, read.masked) == (20, moments.form, moments.masked)
        mine, its = (one.drawn(live, count=5, seed=3).batch(torch.arange(5)) for one in (moments, read))
        assert mine.keys() == its.keys() and all(torch.equal(x, its[name]) for name, x in mine.items())
        assert [one.name for one in tmp_path.iterdir() if "partial" in one.name] == []


def test_texts_are_no_longer_than_a_model_has_positions_for(folder: Path, tmp_path: Path) -> None:
    live = load_live(folder / "bert")
    task = TaskSpec(kind="text-classification", data=text_data(folder / "texts"), max_length=12)
    found = Moments.of(unlabelled(task, live, count=20), live)
    live.model.config.max_position_embeddings = int(found.chains["input_ids"].lengths.values[-1]) - 1  # type: ignore[union-attr]
    with pytest.raises(InputError, match="has positions for"):
        found.drawn(live, count=2)


def test_a_text_without_tokens_is_left_out() -> None:
    ids, mask = torch.tensor([[5, 6, 0], [0, 0, 0]]), torch.tensor([[True, True, False], [False] * 3])
    found = Chain.of(ids, mask)
    assert found.lengths.values.tolist() == [2] and found.last.values.tolist() == [6] and found.is_sound(9)


def test_what_is_no_file_of_moments(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match="not a moments file"):
        Moments.load(place)
    save_file({"w": torch.zeros(2)}, place)
    with pytest.raises(InputError, match=r"m\.safetensors: not a moments file"):
        Moments.load(place)
    both_kinds(folder)[0][0].save(place)
    place.write_bytes(place.read_bytes()[:-8])
    with pytest.raises(InputError, match="not a moments file"):
        Moments.load(place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": "1"}, "no format version"),
        ({"format_version": 99}, "newer than 1: update transfuse"),
        ({"examples": None}, "'examples' in its metadata is not int"),
        ({"form": {}}, "says nothing about inputs"),
        ({"masked": ["labels"]}, "says nothing about inputs"),
        ({"masked": [["input_ids"]]}, "says nothing about inputs"),
        ({"examples": -5}, "says nothing about inputs"),
        ({"form": {"pixel_values": {"shape": [3, 8, 9]}}}, "'pixel_values' are none of such images"),
        ({"form": {"pixel_values": {}}}, "'shape'"),
        ({"form": {"pixel_values": 5}}, "damaged"),
        ({"form": {"input_ids": {"tokens": 5}}}, "input_ids#lengths"),
    ],
)
def test_damaged_metadata_is_named(folder: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    moments, place = both_kinds(folder)[0][0], tmp_path / "m.safetensors"
    about = {"format_version": 1, "examples": 20, "form": moments.form, "masked": [], **change}
    assert moments.pictures is not None
    tensors = {f"pixel_values#{key}": x for key, x in vars(moments.pictures).items()}
    save_file(tensors, place, metadata={"transfuse_moments": json.dumps(about)})
    with pytest.raises(InputError, match=message) as error:
        Moments.load(place)
    assert str(place) in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("pixel_values#mean", torch.full((3, 8, 8), float("nan"))),
        ("pixel_values#components", torch.zeros(2, 3, 8, 7)),
        ("input_ids#first.values", torch.tensor([10**6])),
        ("input_ids#first.counts", torch.tensor([0])),
        ("input_ids#lengths.values", torch.tensor([0])),
        ("input_ids#lengths.values", torch.tensor([2**40])),
        ("input_ids#last.values", torch.tensor([1.5])),
        ("input_ids#last.values", torch.tensor([1.5], dtype=torch.float8_e4m3fn)),
        ("input_ids#pairs.counts", torch.tensor([2**62])),
        ("input_ids#pairs.values", torch.tensor([2 * 2**32 + 10**6])),
    ],
)
def test_damaged_tensors_are_named(folder: Path, tmp_path: Path, key: str, value: torch.Tensor) -> None:
    moments, place = both_kinds(folder)["input" in key][0], tmp_path / "m.safetensors"
    moments.save(place)
    tensors = {**load_file(place), key: value}
    if not key.startswith("pixel"):
        part = key.rpartition(".")[0]
        other = f"{part}.{'counts' if key.endswith('values') else 'values'}"
        tensors[other] = tensors[other][:1]
    about = {"format_version": 1, "examples": 20, "form": moments.form, "masked": list(moments.masked)}
    save_file(tensors, place, metadata={"transfuse_moments": json.dumps(about)})
    with pytest.raises(InputError, match=f"{key.partition('#')[0]}.*damaged"):
        Moments.load(place)


def test_another_model_takes_other_inputs(folder: Path, tmp_path: Path) -> None:
    (images, vit), (texts, bert) = both_kinds(folder)
    assert len(images.drawn(load_live(folder / "other"), count=2)) == 2, "other weights, the same inputs"
    initialise(vit_spec(image_size=16), tmp_path / "large")
    with pytest.raises(InputError, match=r"large.*\[3, 8, 8\].*there.*\[3, 16, 16\].*here"):
        images.drawn(load_live(tmp_path / "large"), count=2)
    words = bert_spec(text_data(folder / "texts"))
    assert words.tokenizer is not None
    fewer = words.tokenizer.model_copy(update={"vocab_size": 40})
    initialise(words.model_copy(update={"tokenizer": fewer}), tmp_path / "words")
    with pytest.raises(InputError, match="words takes"):
        texts.drawn(load_live(tmp_path / "words"), count=2)
    with pytest.raises(InputError, match="no image processor"):
        images.drawn(bert, count=2)
    with pytest.raises(InputError, match="no tokenizer"):
        texts.drawn(vit, count=2)


# --- the commands -----------------------------------------------------------------------------------------------------


def cli(*args: object) -> Result:
    return CliRunner().invoke(app, [str(one) for one in args])


def spec_file(folder: Path, place: Path) -> Path:
    place.write_text(image_task(folder / "images").model_dump_json())
    return place


def test_a_port_keeps_by_a_file(folder: Path, tmp_path: Path) -> None:
    """The command writes what Python gives, and a port by the file is one by the inputs that are drawn from it."""
    task, place = spec_file(folder, tmp_path / "task.json"), tmp_path / "m.safetensors"
    said = cli("moments", folder / "other", "--inputs", task, "-o", place, "--json", "-q")
    assert said.exit_code == 0, said.stderr
    report = json.loads(said.stdout)
    found = transfuse.moments(folder / "other", inputs=str(task), out=tmp_path / "same.safetensors")
    assert report["examples"] == found.examples == 27 and report["form"] == found.form
    assert place.read_bytes() == (tmp_path / "same.safetensors").read_bytes()
    models, rest = [folder / name for name in ("vit", "tuned", "other")], {"inputs_count": 20, "null_trials": 0}
    out = tmp_path / "out"
    how = ["--method", "functional", "--inputs", "synthetic", "--inputs-count", 20, "--keep-weight", 2.0, "-q"]
    ported = cli("port", *models, *how, "--keep", place, "--keep-count", 50, "-o", out)
    assert ported.exit_code == 0, ported.stderr
    assert json.loads((out / "result.json").read_text())["kept"] == {"examples": 50, "weight": 2.0}
    options = {"method": "functional", "inputs": "synthetic", "keep_weight": 2.0, "keep_count": 50, **rest}
    by_object, alone = (transfuse.port(*models, **options, **given).state_dict() for given in ({"keep": found}, {}))
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(x, by_object[name]) for name, x in written.items())
    assert not all(torch.equal(x, alone[name]) for name, x in written.items())
    assert transfuse.port(*models, inputs="synthetic", keep=place, train_steps=1).report["method"] == "two-teachers"


def test_a_clip_is_held_to_inputs_drawn_from_moments(folder: Path, tmp_path: Path) -> None:
    task = image_task(folder / "images", "zero-shot-image-classification", templates=[PROMPTS[0].replace("red", "{}")])
    moments = transfuse.moments(folder / "clip", inputs=task)
    assert moments.pictures is not None and "prompt_input_ids" not in moments.form


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-o", "m.safetensors"], "Missing option '--inputs'"),
        (["--inputs", "task.json"], "Missing option '-o'"),
        (["--inputs", "task.json", "-o", "nowhere/m.safetensors"], "there is no folder"),
        (["--inputs", "task.json", "-o", "there.safetensors"], "it exists"),
        (["--inputs", "task.json", "-o", "there.safetensors", "--force"], "not a moments file"),
        (["--inputs", "none.json", "-o", "m.safetensors"], "the task cannot be read"),
        (["--inputs", "task.json", "-o", "m.safetensors", "--inputs-count", "1"], "inputs-count"),
    ],
)
def test_what_cannot_be_asked_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    spec_file(folder, tmp_path / "task.json")
    save_file({"w": torch.zeros(2)}, tmp_path / "there.safetensors")
    monkeypatch.chdir(tmp_path)
    said = cli("moments", folder / "vit", *args)
    assert said.exit_code == 2 and message in said.stderr


def test_a_wrong_file_to_keep_is_2(folder: Path, tmp_path: Path) -> None:
    models = [folder / name for name in ("vit", "tuned", "other")]
    for keep in (folder / "vit" / "model.safetensors", tmp_path / "none.safetensors"):
        said = cli("port", *models, "--inputs", "synthetic", "--keep", keep, "-o", tmp_path / "out")
        assert said.exit_code == 2 and "not a moments file" in said.stderr and not (tmp_path / "out").exists()


def test_a_recipe_keeps_by_moments(folder: Path) -> None:
    content = plain(load_recipe("worth-small"))
    content["worth"]["methods"] = [{"method": "functional", "keep": {"task": "cifar10", "moments": True}}]
    method = parse_recipe(content).worth.methods[0]  # type: ignore[union-attr]
    assert method.keep is not None and method.keep.moments
    content["worth"]["methods"][0]["keep"]["task"] = "synthetic"
    with pytest.raises(InputError, match="moments are taken of the rows of a task"):
        parse_recipe(content)
    task = image_task(folder / "images")
    about = SimpleNamespace(recipe=SimpleNamespace(tasks={"cifar10": task}), settings=SimpleNamespace(data_dir=None))
    ports = SimpleNamespace(
        bench=about, seed=0, paths=("", str(folder / "vit")), _about=lambda _: task, _moments=Recent(1)
    )
    keep, again = (Ports._keep(cast(Any, ports), method) for _ in range(2))
    assert keep.task is again.task, "taken once for all rows"
    assert isinstance(keep.task, Moments) and (keep.task.examples, keep.count, keep.weight) == (27, 2048, 1.0)
