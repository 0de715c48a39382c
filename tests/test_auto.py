"""What auto takes: from close relatives to strangers, with inputs and without, with a few labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import digits
import tiny
from transfuse import InputError, port
from transfuse.cli.common import app
from transfuse.methods.auto import ALPHAS, choose
from transfuse.models.opening import open_models
from transfuse.options.groups import Inputs, Labelled
from transfuse.options.requests import PortRequest
from transfuse.porting.planted import plant
from transfuse.running.inputs import prepare
from transfuse.running.live import load_live
from transfuse.running.scores import evaluate, score_dict

DRAWN = Inputs("synthetic", count=16)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A digit reader, its fine-tune, and bases at growing distance."""
    folder = tmp_path_factory.mktemp("auto")
    digits.write_data(folder / "data")
    source = digits.trained(digits.vit(), 40)
    continued = digits.trained(source, 10, seed=2)
    made = {
        "source": source,
        "tuned": digits.trained(source, 80, seed=1),
        "continued": continued,
        "stranger": digits.trained(digits.vit(seed=9), 40, seed=3),
    }
    places = {name: digits.save(model, folder / name) for name, model in made.items()}
    for group in ("permutation", "rotation"):
        places[group] = plant(places["continued"], folder / group, group=group, seed=4)
    return {**places, "data": folder / "data"}


def chosen(models: dict[str, Path], target: str, inputs: Inputs | None = None) -> Any:
    opened = open_models(models["source"], models[target], models["tuned"], need_layout=False)
    return choose(opened, PortRequest.of(inputs=inputs))


@pytest.mark.parametrize(
    ("target", "method"),
    [("continued", "naive"), ("permutation", "tied"), ("rotation", "orthogonal"), ("stranger", "functional")],
)
def test_goes_by_what_the_weights_say(models: dict[str, Path], target: str, method: str) -> None:
    found = chosen(models, target)
    assert found.method == method
    assert found.because.count(". ") >= 1 and found.because.endswith(".")
    assert found.inputs.given == (method == "functional")
    assert (found.maps is not None) == (method in ("tied", "orthogonal"))


@pytest.mark.parametrize("target", ["continued", "permutation", "stranger"])
def test_inputs_come_first(models: dict[str, Path], target: str) -> None:
    found = chosen(models, target, DRAWN)
    assert (found.method, found.inputs) == ("functional", DRAWN)


def test_says_that_drawn_inputs_stand_in(models: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    chosen(models, "stranger")
    assert "Drawn inputs stand in for real ones" in caplog.text


def test_models_that_cannot_be_run_are_added_to_as_they_are(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise InputError("pydantic cannot be imported")

    monkeypatch.setattr("transfuse.running.instances.probe_of_model", refuse)
    found = chosen(models, "stranger")
    assert found.method == "naive" and "cannot be run" in found.because
    assert "pydantic cannot be imported" in caplog.text


def test_port_is_that_of_the_method_it_takes(models: dict[str, Path]) -> None:
    places = models["source"], models["tuned"], models["permutation"]
    auto, tied = port(*places, verify=False), port(*places, method="tied", verify=False)
    assert auto.report["method"] == auto.report["choice"]["method"] == "tied"
    for name, tensor in auto.state_dict().items():
        assert torch.equal(tensor, tied.tensor(name))
    assert auto.report["choice"]["null_tests"] == {"tied": {"model": "related-coordinates"}}


def test_unknown_family_is_added_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    states = [{"a.weight": torch.randn(4, 4, generator=generator)} for _ in range(3)]
    result = port(states[0], {"a.weight": states[0]["a.weight"] + 0.1}, states[2])
    assert result.report["method"] == "naive"


def labelled(models: dict[str, Path], per_class: int = 4) -> Labelled:
    return Labelled(digits.task(models["data"]), per_class)


def test_labels_take_the_smallest_loss(models: dict[str, Path]) -> None:
    inputs = Inputs(digits.task(models["data"]), count=64)
    places = models["source"], models["tuned"], models["stranger"]
    found = port(*places, inputs=inputs, labelled=labelled(models), verify=False)
    choice = found.report["choice"]
    losses = {(m, a): loss for m, one in choice["losses"].items() for a, loss in one.items()}
    assert set(choice["losses"]) == {"functional", "naive"}
    assert {float(a) for _, a in losses} == set(ALPHAS)
    best = min(losses.values())
    assert losses[choice["method"], f"{found.report['alpha']:g}"] == best
    live = load_live(models["stranger"], state=found.state_dict())
    rows = prepare(digits.task(models["data"]), "train", live, shots=4)
    assert score_dict(evaluate(live, digits.task(models["data"]), rows))["loss"] == pytest.approx(best, rel=1e-4)


def test_a_harmful_task_vector_is_left_out(models: dict[str, Path], tmp_path: Path) -> None:
    wrong = digits.trained(tiny.fine_tuned(digits.vit(), size=0.0), 1)
    tiny.add_noise(wrong, 3.0, 5)
    tuned = digits.save(wrong, tmp_path / "wrong")
    found = port(models["source"], tuned, models["continued"], labelled=labelled(models), verify=False)
    assert found.report["alpha"] == 0.0
    assert "alpha 0 " in found.report["choice"]["because"]


def test_labels_need_auto(models: dict[str, Path]) -> None:
    places = models["source"], models["tuned"], models["continued"]
    with pytest.raises(InputError, match="method auto alone"):
        port(*places, method="tied", labelled=labelled(models))


def test_command_says_why(models: dict[str, Path], tmp_path: Path) -> None:
    task = tmp_path / "task.json"
    task.write_text(digits.task(models["data"]).model_dump_json(), encoding="utf-8")
    places = [str(models[name]) for name in ("source", "tuned", "stranger")]
    asked = ["--inputs", str(task), "--inputs-count", "32", "--labelled", str(task), "--per-class", "2"]
    result = CliRunner().invoke(app, ["port", *places, "-o", str(tmp_path / "out"), *asked])
    assert result.exit_code == 0, result.output
    assert "why        Unlabelled inputs are given" in result.output
    report = json.loads((tmp_path / "out" / "result.json").read_text())
    assert report["choice"]["method"] == report["method"]
    assert set(report["choice"]["losses"]) == {"functional", "naive"}


def test_dry_run_chooses_nothing(models: dict[str, Path]) -> None:
    places = models["source"], models["tuned"], models["stranger"]
    assert port(*places, dry_run=True).report["method"] == "auto"


def test_what_the_weights_say_is_the_verdict(models: dict[str, Path]) -> None:
    """Also where the port goes another way: on drawn inputs, or on given ones, whose maps say nothing of weights."""
    strangers = port(models["source"], models["tuned"], models["stranger"], verify=False).report
    assert strangers["method"] == "functional"
    tried = [one["model"] for one in strangers["choice"]["null_tests"].values()]
    assert strangers["relation"]["verdict"] in tried and strangers["relation"]["null"]["model"]["excess"] < 0.25
    near = port(models["source"], models["tuned"], models["continued"], inputs=DRAWN, verify=False).report
    assert near["method"] == "functional" and near["relation"]["verdict"] == "same-lineage"
