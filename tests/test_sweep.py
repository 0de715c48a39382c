"""Alpha sweeps: a port that is held is a port at every alpha, and the test split is used once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, ViTModel

import digits
import tiny
from transfuse import InputError, port
from transfuse.data.tasks import TaskSpec
from transfuse.porting import merge
from transfuse.running.inputs import prepare
from transfuse.running.live import load_live
from transfuse.running.scores import evaluate, score_dict
from transfuse.study.sweep import check_alphas, choose_alpha, sweep
from transfuse.update.live import live_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, a fine-tune that reads digits, a target with its units re-ordered; the bodies of both bases alone."""
    place = tmp_path_factory.mktemp("sweep")
    digits.write_data(place / "data")
    source = digits.trained(digits.vit(), 25)
    digits.save(source, place / "source")
    digits.save(digits.trained(source, 120, seed=1), place / "tuned")
    moved, _ = tiny.planted(source, 3, noise=0.05)
    digits.save(moved, place / "target")
    for name, model in (("source", source), ("target", moved)):
        body = ViTModel(model.config, add_pooling_layer=False)
        body.load_state_dict(model.vit.state_dict())
        digits.save(body, place / f"{name}-body")
    return place


@pytest.fixture(scope="module")
def task(folder: Path) -> TaskSpec:
    return digits.task(folder / "data")


def paths(folder: Path, suffix: str = "") -> tuple[Path, Path, Path]:
    return folder / f"source{suffix}", folder / "tuned", folder / f"target{suffix}"


# --- held ports -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", "-body"])
@pytest.mark.parametrize("method", ["tied", "transfusion", "naive", "random"])
def test_a_held_port_is_a_port_at_every_alpha(folder: Path, method: str, suffix: str) -> None:
    options: dict[str, Any] = {"method": method, "null_trials": 0, "verify": False}
    result = port(*paths(folder, suffix), alpha=1.0, **options)
    held = result.tensors.held()
    for alpha in (0.0, 0.3, 1.0):
        expected = port(*paths(folder, suffix), alpha=alpha, maps=result.maps, **options).state_dict()
        found = held.at(alpha).state()
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], one) for name, one in expected.items())


def test_a_narrow_target_is_rounded_once(folder: Path, tmp_path: Path) -> None:
    target = tiny.vit(0, **digits.SIZES).from_pretrained(folder / "target", dtype=torch.bfloat16)
    digits.save(target, tmp_path / "narrow")
    result = port(folder / "source", folder / "tuned", tmp_path / "narrow", null_trials=0, verify=False)
    assert all(torch.equal(one, result.tensor(name)) for name, one in result.tensors.held().state().items())
    assert {one.dtype for one in result.tensors.held().at(0.5).state().values()} == {torch.bfloat16}


def test_a_carried_head_is_not_scaled(folder: Path) -> None:
    result = port(*paths(folder, "-body"), null_trials=0)
    held = result.tensors.held()
    assert set(held.carried) == set(result.report["carried"]) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(held.at(0.0).state()["classifier.weight"], held.at(1.0).state()["classifier.weight"])
    tuned, target = (load_live(folder / name) for name in ("tuned", "target"))
    zero_shot = live_of(held, held.zero_shot()).model.state_dict()
    for name, one in zero_shot.items():
        wanted = tuned if name.startswith("classifier") else target
        assert torch.equal(one, wanted.model.state_dict()[name]), name


def test_alphas_by_tensor(folder: Path) -> None:
    held = port(*paths(folder), null_trials=0, verify=False).tensors.held()
    scales = {name: 0.5 if "layer.0" in name else 0.0 for name in held.update.names}
    found, half, none = (held.at(alpha).state() for alpha in (scales, 0.5, 0.0))
    for name, one in found.items():
        assert torch.equal(one, half[name] if "layer.0" in name else none[name])


def test_a_held_merge(folder: Path) -> None:
    result = merge.merge(folder / "source", [folder / "tuned"] * 2, folder / "target", null_trials=0, how="mean")
    assert all(torch.equal(one, result.tensor(name)) for name, one in result.tensors.held().state().items())


def test_a_ported_model_is_live_as_if_it_were_written(folder: Path, tmp_path: Path) -> None:
    result = port(*paths(folder, "-body"), out=tmp_path / "out", null_trials=0)
    written, live = load_live(tmp_path / "out"), live_of(result.tensors, result.state_dict())
    assert type(live.model) is type(written.model)
    expected = written.model.state_dict()
    assert all(torch.equal(one, expected[name]) for name, one in live.model.state_dict().items())


def test_text_models_with_a_head_of_their_own(tmp_path: Path) -> None:
    source = tiny.bert()
    moved, _ = tiny.planted(source, 4)
    head = tiny.fine_tuned(source, BertForSequenceClassification, num_labels=3)
    for name, model in (("source", source), ("target", moved), ("tuned", head)):
        tiny.save(model, tmp_path / name)
    result = port(tmp_path / "source", tmp_path / "tuned", tmp_path / "target", null_trials=0)
    live = live_of(result.tensors, result.tensors.state(), dtype=torch.float64)
    ids = torch.arange(10).view(2, 5)
    torch.testing.assert_close(live.model(input_ids=ids).logits, head(input_ids=ids).logits)


# --- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(folder: Path, task: TaskSpec) -> Any:
    inverted = digits.task(folder / "data")
    changed = inverted.model_copy(update={"data": inverted.data.model_copy(update={"transform": "invert"})})
    return sweep(*paths(folder), task, support=changed, alphas=(1.0, 0.0, 0.5, 1.0), null_trials=0)


def test_a_sweep_scores_every_alpha_on_validation(folder: Path, task: TaskSpec, found: Any) -> None:
    assert found.alphas == (0.0, 0.5, 1.0) and found.chosen_on == "validation" and found.metric == "accuracy"
    assert len(found.validation) == len(found.support) == 3
    rows = prepare(task, "validation", load_live(folder / "tuned"))
    for alpha, scores in zip(found.alphas, found.validation, strict=True):
        result = port(*paths(folder), alpha=alpha, null_trials=0)
        assert scores == score_dict(evaluate(live_of(result.tensors, result.state_dict()), task, rows))
    assert found.validation[2]["accuracy"] > found.validation[0]["accuracy"] + 0.05


def test_the_chosen_alpha_is_scored_on_test(folder: Path, task: TaskSpec, found: Any) -> None:
    assert found.chosen == choose_alpha(found.alphas, found.validation, task)
    rows = prepare(task, "test", load_live(folder / "tuned"))
    result = port(*paths(folder), alpha=found.chosen, null_trials=0)
    assert found.test == score_dict(evaluate(live_of(result.tensors, result.state_dict()), task, rows))
    assert found.zero_shot == score_dict(evaluate(load_live(folder / "target"), task, rows))
    assert found.test["examples"] == 597 and found.test_support != found.test
    assert found.test_support["accuracy"] < 0.5 and found.zero_shot_support is not None


def test_a_sweep_is_reproducible(folder: Path, task: TaskSpec) -> None:
    runs = [sweep(*paths(folder), task, alphas=(0.5, 1.0), limit=50, seed=2) for _ in range(2)]
    assert runs[0].as_dict() == runs[1].as_dict()
    assert runs[0].relation == "related-coordinates" and runs[0].support is None and runs[0].test_support is None
    assert runs[0].test["examples"] == 50


def test_choosing_on_test_is_refused(folder: Path, task: TaskSpec) -> None:
    with pytest.raises(InputError, match="best of many"):
        sweep(*paths(folder), task, choose_on="test")
    with pytest.raises(InputError, match="choose_on is 'train'; one of validation, test"):
        sweep(*paths(folder), task, choose_on="train")
    found = sweep(*paths(folder), task, choose_on="test", allow_test=True, alphas=(1.0,), null_trials=0, limit=40)
    assert found.chosen_on == "test" and found.validation == (found.test,)


def test_the_best_alpha(task: TaskSpec) -> None:
    scores = [{"accuracy": a, "loss": b} for a, b in ((0.5, 3.0), (0.7, 2.0), (0.7, 1.0), (math.nan, math.nan))]
    assert choose_alpha((0.1, 0.2, 0.3, 0.4), scores, task) == 0.2
    by_loss = task.model_copy(update={"metric": "loss"})
    assert choose_alpha((0.1, 0.2, 0.3, 0.4), scores, by_loss) == 0.3


@pytest.mark.parametrize("alphas", [(), (0.5, math.nan), (math.inf,)])
def test_alphas_that_cannot_be_tried(alphas: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="alphas are"):
        check_alphas(alphas)


def test_the_order_is_that_of_the_output() -> None:
    zeros, ones, whole = torch.zeros(2), torch.ones(2), torch.arange(2)  # integers are copied
    found = port({"a": whole, "b": zeros}, {"a": whole, "b": ones}, {"a": whole, "b": zeros}, method="naive")
    held = found.tensors.held().at(0.5)
    assert set(held.added) == {"b"} and list(held.state()) == ["a", "b"] and held.state()["b"].tolist() == [0.5, 0.5]
