"""Unlabelled inputs: of data sets without labels, drawn ones, and the commands that take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file

import digits
import transfuse
from families import CASES
from test_seq2seq import SMALL, t5_spec
from tiny import fine_tuned, save
from tiny_data import COLOURS, bert_spec, clip_spec, image, image_task, text_data, vit_spec, write_images, write_texts
from transfuse import InputError
from transfuse.cli.common import app
from transfuse.data.splits import DataSpec
from transfuse.data.tasks import TaskSpec
from transfuse.methods.match import open_inputs
from transfuse.methods.table import METHODS, get_method
from transfuse.models.opening import open_models
from transfuse.options.groups import Inputs
from transfuse.running.drawn import synthetic
from transfuse.running.inputs import prepare
from transfuse.running.live import LiveModel, load_live
from transfuse.running.unlabelled import read_inputs, unlabelled
from transfuse.study.initial import initialise
from transfuse.study.interpolate import interpolate
from vision_families import VISION_CASES


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and texts with and without labels, and the models `clip`, `vit`, `bert` and `t5`."""
    place = tmp_path_factory.mktemp("unlabelled")
    write_images(place / "images")
    write_texts(place / "texts")
    (place / "bare").mkdir()
    features = datasets.Features({"img": datasets.Image()})
    pictures = {"img": [image(list(COLOURS)[i % 3], i) for i in range(20)]}
    datasets.Dataset.from_dict(pictures, features=features).to_parquet(place / "bare" / "train.parquet")
    hidden = "".join(f"a film of {word}\t-1\n" for word in ("war", "peace", "love", "men", "mice"))
    (place / "hidden").mkdir()
    (place / "hidden" / "train.tsv").write_text("sentence\tlabel\n" + hidden)
    initialise(clip_spec(), place / "clip")
    initialise(vit_spec(), place / "vit")
    initialise(bert_spec(text_data(place / "texts")), place / "bert")
    initialise(t5_spec(place), place / "t5")
    return place


def whole(found: Any) -> dict[str, torch.Tensor]:
    return found.batch(torch.arange(len(found)))


# --- of a data set ----------------------------------------------------------------------------------------------------


def test_inputs_without_labels_are_those_with(folder: Path) -> None:
    live = load_live(folder / "vit")
    found = unlabelled(image_task(folder / "bare", batch_size=6), live, count=20)
    labelled = unlabelled(image_task(folder / "images"), live, count=20)
    assert len(found) == 18 and len(labelled) == 20 and found.batch_size == 6, "a tenth is held out"
    rows = prepare(image_task(folder / "images"), "train", live)
    known = {tuple(one.flatten().tolist()) for one in whole(rows)["pixel_values"]}
    assert {tuple(one.flatten().tolist()) for one in whole(labelled)["pixel_values"]} <= known
    assert whole(found)["pixel_values"].shape == (18, 3, 8, 8)


@pytest.mark.parametrize("count", [2, 7, 500])
def test_the_count_is_kept(folder: Path, count: int) -> None:
    found = unlabelled(image_task(folder / "images"), load_live(folder / "vit"), count=count)
    assert len(found) == sum(len(batch["pixel_values"]) for batch in found.batches()) == min(count, 27)
    task = TaskSpec(kind="text-classification", data=text_data(folder / "texts"))
    assert len(unlabelled(task, load_live(folder / "bert"), count=count)) == min(count, 43)


def test_the_seed_chooses(folder: Path) -> None:
    live = load_live(folder / "vit")
    one, two, other = (whole(unlabelled(image_task(folder / "images"), live, count=9, seed=s)) for s in (0, 0, 1))
    assert torch.equal(one["pixel_values"], two["pixel_values"])
    assert not torch.equal(one["pixel_values"], other["pixel_values"])


def test_hidden_labels_are_not_looked_at(folder: Path) -> None:
    task = TaskSpec(kind="text-classification", data=DataSpec(path=str(folder / "hidden"), validation_share=0))
    assert len(unlabelled(task, load_live(folder / "bert"), count=5)) == 5


def test_blocks_of_language_models(folder: Path) -> None:
    data = DataSpec(path=str(folder / "texts"), train="plain", test="plain")
    found = whole(
        unlabelled(TaskSpec(kind="masked-lm", data=data, max_length=10), load_live(folder / "bert"), count=30)
    )
    assert found["input_ids"].shape[1] == 10 and len(found["input_ids"]) >= 2


def test_classes_of_a_zero_shot_task_are_prompts(folder: Path) -> None:
    live, kind = load_live(folder / "clip"), "zero-shot-image-classification"
    for spec in (image_task(folder / "images", kind), image_task(folder / "bare", kind)):
        found = unlabelled(spec, live, count=6)
        has_classes = spec.data.path.endswith("images")
        assert ("prompt_input_ids" in found.extra) == has_classes, "without classes there is nothing to ask"
        assert len(found.extra.get("prompt_input_ids", ())) == (3 if has_classes else 0)
    data = DataSpec(path=str(folder / "bare"), classes=["red", "blue"])
    assert len(unlabelled(TaskSpec(kind=kind, data=data), live, count=6).extra["prompt_input_ids"]) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["texts", "hidden"])
def test_targets_take_turns_before_a_decoder(folder: Path, place: str) -> None:
    live = load_live(folder / "t5")
    data = DataSpec(path=str(folder / place), validation_share=0, label=[])
    targets = ["a very good film", "poor", "great"]
    task = TaskSpec(kind="seq2seq", data=data, targets=targets)
    found = whole(unlabelled(task, live, count=5))
    start = live.model.config.decoder_start_token_id  # type: ignore[union-attr]
    expected = live.tokenizer(targets, padding=True, return_tensors="pt")["input_ids"]
    seen = {tuple(row) for row in found["decoder_input_ids"].tolist()}
    assert seen <= {(start, *row[:-1]) for row in expected.tolist()} and len(seen) > 1
    assert found.keys() >= {"input_ids", "attention_mask"} and "targets" not in found
    with pytest.raises(InputError, match="no label column"):
        unlabelled(task.model_copy(update={"targets": None}), live, count=5)
    named = task.model_copy(update={"targets": None, "data": data.model_copy(update={"classes": ["good", "bad"]})})
    assert len(whole(unlabelled(named, live, count=5))["decoder_input_ids"].unique(dim=0)) == 2


def test_a_decoder_has_to_see_something(folder: Path) -> None:
    """Read as a task of another kind, texts are inputs of an encoder alone."""
    task = TaskSpec(kind="text-classification", data=text_data(folder / "texts"), max_length=12)
    assert len(read_inputs(Inputs(task, count=4), load_live(folder / "bert"))) == 4
    with pytest.raises(InputError, match="of kind text-classification: it says nothing about what the decoder of T5"):
        read_inputs(Inputs(task, count=4), load_live(folder / "t5"))


def test_one_input_says_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("sentence\nalone\n")
    task = TaskSpec(kind="text-classification", data=DataSpec(path=str(tmp_path), validation_share=0))
    with pytest.raises(InputError, match="train split has one input; two at least are needed"):
        unlabelled(task, load_live(folder / "bert"), count=5)
    with pytest.raises(InputError, match="inputs_count is 1; a whole number of at least 2 is needed"):
        Inputs("synthetic", count=1)


# --- drawn ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "vit", "bert", "t5"])
def test_drawn_inputs_fit_the_model(folder: Path, name: str) -> None:
    live = load_live(folder / name)
    one, two, other = (synthetic(live, count=5, batch_size=2, seed=seed) for seed in (0, 0, 1))
    assert len(one) == 5 and [len(next(iter(batch.values()))) for batch in one.batches()] == [2, 2, 1]
    inputs = whole(one)
    assert all(torch.equal(x, whole(two)[key]) for key, x in inputs.items())
    assert all(not torch.equal(x, whole(other)[key]) for key, x in inputs.items() if key != "attention_mask")
    if name in ("clip", "vit"):
        assert inputs.keys() == {"pixel_values"} and inputs["pixel_values"].shape == (5, 3, 8, 8)
    else:
        assert inputs.keys() == {"input_ids", "attention_mask", *(["decoder_input_ids"] if name == "t5" else [])}
        with torch.no_grad():
            assert torch.isfinite(live.model(**inputs).logits).all()


def test_inputs_that_nothing_is_known_of() -> None:
    class Model(torch.nn.Module):
        config = object()

    with pytest.raises(InputError, match="nowhere: its config does not say what inputs look like"):
        synthetic(LiveModel(Model(), {}, None, None, "nowhere", {}))


# --- texts before a decoder -------------------------------------------------------------------------------------------


def test_a_t5_is_carried_over(folder: Path, tmp_path: Path) -> None:
    """Where the bases are one model, to what tuned does; the last norm stays, as nothing fitted comes behind it."""
    config = {**SMALL, "num_layers": 2, "num_decoder_layers": 1}
    initialise(t5_spec(folder).model_copy(update={"config": config}), tmp_path / "source")
    source: Any = load_live(tmp_path / "source").model.double()
    tuned = fine_tuned(source, size=0.5)
    tuned.decoder.final_layer_norm.weight.data.copy_(source.decoder.final_layer_norm.weight.data)
    places = [save(one, tmp_path / name) for name, one in (("source", source), ("tuned", tuned), ("target", source))]
    for place in places:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (place / name).write_bytes((folder / "t5" / name).read_bytes())
    given = Inputs(TaskSpec(kind="seq2seq", data=text_data(folder / "texts"), max_length=12), count=40)
    models = open_models(places[0], places[2], places[1])
    batch = whole(open_inputs(models, get_method("functional"), given).task)
    inputs = {name: x for name, x in batch.items() if name != "labels"}
    assert len(inputs["decoder_input_ids"].unique(dim=0)) == 2

    def logits(place: Path) -> torch.Tensor:
        with torch.no_grad():
            return load_live(place, dtype=torch.float64).model(**inputs).logits

    out = tmp_path / "out"
    options = {"inputs": given, "ridge": 1e-9, "null_trials": 0, "out": out}
    report = transfuse.port(*places, method="functional", **options).report
    assert report["loads"] == "T5ForConditionalGeneration"
    assert (logits(places[2]) - logits(places[1])).abs().max() > 0.1
    torch.testing.assert_close(logits(out), logits(places[1]), rtol=0, atol=1e-4)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, `tuned`, `target`: ViTs; `data` and `task.yaml`: digits; and `others` that are not run on inputs."""
    place = tmp_path_factory.mktemp("cli")
    digits.write_data(place / "data")
    (place / "task.yaml").write_text(f"kind: image-classification\ndata: {{path: {place / 'data'}}}\n")
    base = digits.vit(0)
    made = {"source": base, "tuned": fine_tuned(base, size=0.3), "target": digits.vit(4)}
    for name, model in made.items():
        digits.save(model, place / name)
    return place


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, (result.output, result.exception)
    return json.loads(result.stdout)


def refused(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), (result.output, result.exception)
    assert result.stdout == "" and "Traceback" not in result.stderr
    return result.stderr


def three(models: Path) -> list[Path]:
    return [models / name for name in ("source", "tuned", "target")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "method functional goes by activations: give unlabelled inputs (--inputs TASK"),
        (("--inputs", "nowhere.yaml"), "nowhere.yaml: the task cannot be read"),
        (("--inputs", '{"kind": "none"}'), "task text: kind: Input should be"),
        (("--inputs", '{"kind": "image-classification", "data": {"path": "no/where.csv"}}'), "no such file or folder"),
        (("--inputs", "synthetic", "--inputs-count", "1"), "'--inputs-count'"),
    ],
)
@pytest.mark.parametrize("command", ["match", "port"])
def test_bad_inputs_write_nothing(models: Path, tmp_path: Path, command: str, options: Any, message: str) -> None:
    places = three(models) if command == "port" else three(models)[::2]
    assert message in refused(command, *places, "-o", tmp_path / "out", "--method", "functional", *options)
    assert list(tmp_path.iterdir()) == []


def test_models_of_other_libraries_are_not_run(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "reference-pre")
    for seed in (0, 1):
        case.source.save(tmp_path / str(seed), seed)
    said = refused(
        "match", tmp_path / "0", tmp_path / "1", "-o", tmp_path / "m", "--method", "theseus", "--inputs", "synthetic"
    )
    assert str(tmp_path / "1") in said and not (tmp_path / "m").exists()
    for name, kind in (("open_clip-plain", "open_clip"), ("timm-plain", "timm")):
        case = next(case for case in VISION_CASES if case.name == name).from_table()
        for seed in (0, 1):
            case.source.save(tmp_path / f"{kind}{seed}", seed)
        places = [tmp_path / f"{kind}{seed}" for seed in (0, 1)]
        said = refused("match", *places, "-o", tmp_path / "m", "--method", "activation", "--inputs", "synthetic")
        assert f"a checkpoint of kind '{kind}'; only models in the format of transformers are run on inputs" in said
        assert not (tmp_path / "m").exists()


def test_models_of_no_known_family(tmp_path: Path) -> None:
    """Even distillation, which needs no maps, has to know which tensor is which."""
    base, tuned = {"some.weight": torch.ones(2, 2)}, {"some.weight": torch.zeros(2, 2)}
    with pytest.raises(InputError, match="family"):
        transfuse.port(base, tuned, base, method="distillation", inputs=Inputs("synthetic"))


@pytest.mark.parametrize("method", ["theseus", "functional", "distillation"])
def test_there_is_no_line_without_a_mapped_source(models: Path, method: str) -> None:
    task = digits.task(models / "data")
    with pytest.raises(InputError, match=f"method {method} gives no mapped source"):
        interpolate(models / "source", models / "target", task, method=method, inputs=Inputs("synthetic"))


def test_inspection_goes_by_weights(models: Path) -> None:
    for method in (name for name, row in METHODS.items() if row.needs_inputs):
        said = refused("inspect", models / "source", "--target", models / "target", "--method", method)
        assert f"method {method} goes by activations" in said


# --- commands ---------------------------------------------------------------------------------------------------------


def test_port_by_the_command(models: Path, tmp_path: Path) -> None:
    given = ("--method", "functional", "--inputs", models / "task.yaml", "--inputs-count", 32, "--null-trials", 0)
    out = tmp_path / "out"
    report = ok("port", *three(models), "-o", out, *given)
    assert report["method"] == "functional" and report["match"]["examples"] == 32
    assert report["loads"] == "ViTForImageClassification" and report["options"]["ridge"] is None
    assert json.loads((out / "result.json").read_text()) == {k: v for k, v in report.items() if k != "out"}
    assert (out / "README.md").exists() and (out / "preprocessor_config.json").exists()
    expected = transfuse.port(*three(models), method="functional", inputs=Inputs(models / "task.yaml", count=32))
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], one) for name, one in expected.state_dict().items())
    strict = ok("port", *three(models), "-o", tmp_path / "strict", *given, "--ridge", 100)
    assert strict["options"]["ridge"] == 100
    old, far = (load_file(place / "model.safetensors") for place in (models / "target", tmp_path / "strict"))
    name = next(one for one in written if one.endswith("layer.0.output.dense.weight"))
    assert 0 < (far[name] - old[name]).norm() < 0.1 * (written[name] - old[name]).norm()


@pytest.mark.parametrize("method", ["activation", "theseus", "functional"])
def test_match_then_port_by_the_commands(models: Path, tmp_path: Path, method: str) -> None:
    given = ("--inputs", models / "task.yaml", "--inputs-count", 32)
    maps = tmp_path / "maps.safetensors"
    found = ok("match", *three(models)[::2], "-o", maps, "--method", method, *given)
    assert found["method"] == method and found["examples"] == 32 and 0 < min(found["alignment"].values()) <= 1 + 1e-9
    again = given if method == "functional" else ()
    report = ok("port", *three(models), "-o", tmp_path / "one", "--maps", maps, *again)
    assert report["method"] == method
    ok("port", *three(models), "-o", tmp_path / "two", "--method", method, *given)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    if method == "functional":
        said = refused("port", *three(models), "-o", tmp_path / "three", "--maps", maps)
        assert "method functional goes by activations: give unlabelled inputs" in said
        assert not (tmp_path / "three").exists()


def test_text_for_people(models: Path, tmp_path: Path) -> None:
    given = ("--method", "activation", "--inputs", "synthetic", "--inputs-count", 16)
    result = run("match", *three(models)[::2], "-o", tmp_path / "maps", *given)
    assert result.exit_code == 0 and "matching   on 16 inputs; the maps bring " in result.stdout
    result = run("port", *three(models), "-o", tmp_path / "out", *given)
    assert result.exit_code == 0 and "method     activation, alpha 1.0" in result.stdout


def test_data_lie_where_the_option_says(models: Path, tmp_path: Path) -> None:
    task = tmp_path / "task.json"
    task.write_text(json.dumps({"kind": "image-classification", "data": {"path": "none/none", "local": "data"}}))
    given = ("--method", "activation", "--inputs", task, "--inputs-count", 16)
    report = ok("match", *three(models)[::2], "-o", tmp_path / "maps", *given, "--data-dir", models)
    assert report["examples"] == 16
    about = ("--data-dir", models, "--points", 3, "--limit", 20)
    lines = ok("interpolate", *three(models)[::2], "--task", task, *given, *about)
    assert lines["curves"][0]["method"] == "activation"
