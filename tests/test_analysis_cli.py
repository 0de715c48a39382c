"""The commands interpolate, sweep, scale and merge: what they print, and how they fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import digits
import tiny
from transfuse.cli.common import app
from transfuse.files.opening import open_checkpoint


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ok(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source, two fine-tunes and a re-ordered target, the digits, and a task file."""
    place = tmp_path_factory.mktemp("commands")
    digits.write_data(place / "digits")
    source = digits.trained(digits.vit(), 20)
    digits.save(source, place / "source")
    for seed in (1, 2):
        digits.save(digits.trained(source, 40, seed=seed), place / f"tuned{seed}")
    digits.save(tiny.planted(source, 3, noise=0.02)[0], place / "target")
    task = {"kind": "image-classification", "data": {"path": "nowhere/digits", "local": "digits"}}
    (place / "task.yaml").write_text(json.dumps(task))
    return place


@pytest.fixture(scope="module")
def data(folder: Path) -> tuple[object, ...]:
    return "--task", folder / "task.yaml", "--data-dir", folder, "--limit", 60, "-q"


def three(folder: Path) -> tuple[Path, Path, Path]:
    return folder / "source", folder / "tuned1", folder / "target"


def json_of(*arguments: object) -> dict[str, Any]:
    return json.loads(ok(*arguments, "--json").stdout)


def test_interpolate(folder: Path, data: tuple[object, ...], tmp_path: Path) -> None:
    both = folder / "source", folder / "target"
    found = json_of("interpolate", *both, *data, "--points", 3, "--method", "transfusion", "--split-qkv")
    assert [curve["skips"] for curve in found["curves"]] == ["linear", "rounded"]
    assert found["curves"][0]["lambdas"] == [0, 0.5, 1] and found["curves"][0]["equivalence"] < 1e-4
    text = ok("interpolate", *both, *data, "--points", 3, "--split", "validation").stdout
    assert "tied, identity skips" in text and "barrier" in text and "midpoint" in text
    ok("match", *both, "-o", tmp_path / "maps.safetensors", "-q", "--null-trials", 0)
    given = json_of("interpolate", *both, *data, "--points", 3, "--maps", tmp_path / "maps.safetensors")
    assert given == json_of("interpolate", *both, *data, "--points", 3)
    for command, models in (("interpolate", both), ("sweep", three(folder))):
        wrong = run(command, *models, *data, "--maps", tmp_path / "maps.safetensors", "--method", "transfusion")
        assert wrong.exit_code == 2 and "maps bring their method along" in wrong.stderr


def test_sweep(folder: Path, data: tuple[object, ...]) -> None:
    options = (*data, "--alphas", "0.5,1", "--null-trials", 0, "--support", folder / "task.yaml")
    found = json_of("sweep", *three(folder), *options)
    assert found["alphas"] == [0.5, 1] and found["chosen"] in (0.5, 1) and found["test"] == found["test_support"]
    text = ok("sweep", *three(folder), *options).stdout
    assert "chosen     alpha" in text and "target alone" in text and "WARNING" not in text
    careless = ok("sweep", *three(folder), *data, "--alphas", "1", "--choose-on", "test", "--allow-test").stdout
    assert "WARNING: alpha was chosen on the test split" in careless


def test_scale(folder: Path, data: tuple[object, ...], tmp_path: Path) -> None:
    options = (*data, "--shots", 4, "--steps", 5, "--null-trials", 0, "--baseline-lr", 1e-3)
    found = json_of("scale", *three(folder), *options, "-o", tmp_path / "out")
    scale = found["scale"]
    assert set(scale["test"]) == {"zero-shot", "alpha-1", "scaled", "few-shot"} and scale["examples"] == 40
    assert set(scale["alphas"]) >= {"encoder.layer.0", "encoder.layer.1"} and len(scale["losses"]) == 5
    assert json.loads((tmp_path / "out" / "result.json").read_text())["scale"] == scale
    assert "learned per layer from 40 examples" in (tmp_path / "out" / "README.md").read_text()
    written, target = open_checkpoint(tmp_path / "out"), open_checkpoint(folder / "target")
    whole = tmp_path / "whole"
    ok("port", *three(folder), "-o", whole, "-q", "--null-trials", 0)
    name = next(one for one in target if "layer.1" in one and "output.dense.weight" in one)
    update = open_checkpoint(whole).tensor(name) - target.tensor(name)
    changed = target.tensor(name) + scale["alphas"]["encoder.layer.1"] * update
    assert (written.tensor(name) - changed).abs().max() < 1e-6
    text = ok("scale", *three(folder), *options).stdout
    assert "part" in text and "few-shot" in text and "output" not in text.split("part")[0]


def test_merge(folder: Path, tmp_path: Path) -> None:
    models = folder / "source", folder / "tuned1", folder / "tuned2", folder / "target"
    found = json_of("merge", *models, "-o", tmp_path / "out", "--how", "ties", "--density", 0.3, "-q")
    assert found["merge"]["how"] == "ties" and len(found["merge"]["tuned"]) == 2 and found["loads"]
    assert found["out"] == str(tmp_path / "out") and (tmp_path / "out" / "config.json").exists()
    assert run("merge", *models, "-o", tmp_path / "out", "-q").exit_code == 2
    text = ok("merge", *models, "-o", tmp_path / "out", "-q", "--force", "--null-trials", 0).stdout
    assert "2 fine-tunes (sum, density 1)" in text and str(folder / "tuned2") in text


def test_a_merge_never_replaces_its_inputs(folder: Path, tmp_path: Path) -> None:
    models = folder / "source", folder / "tuned1", folder / "tuned2", folder / "target"
    before = (folder / "tuned2" / "model.safetensors").read_bytes()
    result = run("merge", *models, "-o", folder / "tuned2", "--force", "-q", "--null-trials", 0)
    assert result.exit_code == 2 and "where the tuned lies" in result.stderr
    options = ("--shots", 1, "--steps", 1, "-o", folder / "tuned1", "--force", "-q", "--null-trials", 0)
    task = ("--task", folder / "task.yaml", "--data-dir", folder)
    assert run("scale", *three(folder), *task, *options).exit_code == 2
    assert (folder / "tuned2" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sweep", "--choose-on", "test"), "best of many"),
        (("sweep", "--alphas", "1,a"), "numbers with commas"),
        (("sweep", "--alphas", "nan"), "all finite"),
        (("sweep", "--maps", "m.safetensors", "--method", "tied"), "m.safetensors: not a maps file"),
        (("scale", "--shots", "1", "--lr", "0"), "'--lr': 0.0 is not in the range x>0"),
        (("scale",), "--shots"),
    ],
)
def test_bad_use_is_2(folder: Path, data: tuple[object, ...], arguments: tuple[str, ...], message: str) -> None:
    command, *options = arguments
    result = run(command, *three(folder), *data, "--null-trials", 0, *options)
    assert result.exit_code == 2 and message in result.stderr, result.output


def test_a_task_that_cannot_be_read_is_2(folder: Path) -> None:
    result = run("sweep", *three(folder), "--task", folder / "none.yaml")
    assert result.exit_code == 2 and "none.yaml" in result.stderr


@pytest.mark.parametrize("name", ["interpolate", "sweep", "scale", "merge"])
def test_help_shows_examples(name: str) -> None:
    assert f"transfuse {name} " in ok(name, "--help").stdout.partition("Examples")[2]
