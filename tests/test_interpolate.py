"""Interpolation: the ends are source and target, the barrier is what it says, broken maps show as such."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

import digits
import tiny
from transfuse import METHODS, InputError, match
from transfuse.data.tasks import TaskSpec
from transfuse.options.groups import Inputs
from transfuse.running.inputs import prepare
from transfuse.running.live import load_live, with_state
from transfuse.running.scores import evaluate, score_dict
from transfuse.study.interpolate import Curve, barrier, interpolate

LIMIT = 150


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two independently trained ViTs, and the first with its units re-ordered."""
    place = tmp_path_factory.mktemp("lines")
    digits.write_data(place / "data")
    source = digits.trained(digits.vit(0), 120)
    digits.save(source, place / "source")
    digits.save(digits.trained(digits.vit(7), 120, seed=5), place / "other")
    digits.save(tiny.planted(source, 3)[0], place / "moved")
    return place


@pytest.fixture(scope="module")
def task(folder: Path) -> TaskSpec:
    return digits.task(folder / "data")


def run(folder: Path, task: TaskSpec, target: str = "other", **options: Any) -> list[Curve]:
    return interpolate(folder / "source", folder / target, task, limit=LIMIT, double=True, **options)


def loss_of(folder: Path, task: TaskSpec, name: str) -> float:
    live = load_live(folder / name, dtype=torch.float64)
    return score_dict(evaluate(live, task, prepare(task, "test", live, limit=LIMIT)))["loss"]


@pytest.mark.parametrize("name", ["tied", "transfusion", "orthogonal", "naive", "activation", "activation-permutation"])
def test_the_ends_are_source_and_target(folder: Path, task: TaskSpec, name: str) -> None:
    inputs = Inputs(task, count=60) if METHODS[name].needs_inputs else None
    for curve in run(folder, task, method=name, inputs=inputs, lambdas=(0.5,)):
        assert curve.method == name and curve.lambdas == (0.0, 0.5, 1.0)
        assert curve.source["loss"] == pytest.approx(loss_of(folder, task, "source"), abs=1e-12)
        assert curve.equivalence < 1e-8
        assert curve.ends[0]["loss"] == pytest.approx(curve.source["loss"], abs=1e-8)
        assert curve.ends[1]["loss"] == pytest.approx(loss_of(folder, task, "other"), abs=1e-8)
        assert curve.midpoint_loss == curve.scores[1]["loss"] > 0
        assert curve.barrier_to_source == pytest.approx(curve.barrier, abs=1e-7)


@pytest.mark.parametrize("name", ["git-rebasin", "ot", "no-residual"])
def test_maps_that_do_not_keep_the_function_show_a_broken_end(folder: Path, task: TaskSpec, name: str) -> None:
    (curve,) = run(folder, task, method=name, lambdas=())
    assert curve.skips == "identity" and not METHODS[name].exact
    assert curve.equivalence > 0.01 and curve.ends[0]["loss"] > curve.source["loss"]
    assert curve.barrier_to_source > curve.barrier, "a barrier from a broken end flatters"


def test_naive_is_the_plain_line(folder: Path, task: TaskSpec) -> None:
    (curve,) = run(folder, task, method="naive", lambdas=(0.25,))
    one, other = (load_live(folder / name, dtype=torch.float64) for name in ("source", "other"))
    stored = {memory: name for memory, name in other.stored_names.items()}
    pairs = {name: (one.model.get_parameter(m), other.model.get_parameter(m)) for m, name in stored.items()}
    rows = prepare(task, "test", one, limit=LIMIT)
    for at, scores in zip(curve.lambdas, curve.scores, strict=True):
        mixed = {name: ((1 - at) * a + at * b).detach() for name, (a, b) in pairs.items()}
        expected = score_dict(evaluate(with_state(other, mixed), task, rows))
        assert scores["loss"] == pytest.approx(expected["loss"], abs=1e-12)
    assert curve.barrier > 0


def test_junction_maps_have_two_forms_of_skips(folder: Path, task: TaskSpec) -> None:
    linear, rounded = run(folder, task, method="transfusion", lambdas=(0.25, 0.75))
    assert (linear.skips, rounded.skips) == ("linear", "rounded")
    assert linear.ends == rounded.ends and linear.source == rounded.source
    assert linear.scores[1]["loss"] != rounded.scores[1]["loss"]
    (stock,) = run(folder, task, method="transfusion", skips="identity", lambdas=(0.25, 0.75))
    assert stock.scores[2:] == rounded.scores[2:], "from the middle on, rounded skips are identities"
    assert stock.scores[1]["loss"] != rounded.scores[1]["loss"] and stock.equivalence > 0.1
    (one,) = run(folder, task, method="transfusion", skips="linear", lambdas=(0.25, 0.75))
    assert one == linear


@pytest.mark.parametrize("name", ["tied", "transfusion"])
def test_a_re_ordered_copy_has_no_barrier(folder: Path, task: TaskSpec, name: str) -> None:
    options = {"tie_qkv": False} if name == "transfusion" else {}
    for curve in run(folder, task, "moved", method=name, lambdas=(0.25,), **options):
        if name == "tied":
            assert abs(curve.barrier) < 1e-9
            assert curve.midpoint_loss == pytest.approx(curve.source["loss"], abs=1e-9)
        assert curve.equivalence < 1e-9
    (naive,) = run(folder, task, "moved", method="naive", lambdas=(0.25,))
    assert naive.barrier > 0.1


def test_maps_can_be_given(folder: Path, task: TaskSpec, tmp_path: Path) -> None:
    maps = match(folder / "source", folder / "other", method="transfusion", null_trials=0)
    maps.save(tmp_path / "maps.safetensors")
    expected = run(folder, task, method="transfusion", lambdas=())
    for given in (maps, tmp_path / "maps.safetensors"):
        assert run(folder, task, maps=given, lambdas=()) == expected
    with pytest.raises(InputError, match="another target"):
        run(folder, task, "moved", maps=maps)


def test_the_default_points(folder: Path, task: TaskSpec) -> None:
    (curve,) = interpolate(folder / "source", folder / "other", task, limit=20)
    assert curve.lambdas == tuple(i / 10 for i in range(11)) and len(curve.scores) == 11
    losses = [one["loss"] for one in curve.scores]
    assert curve.barrier == barrier(curve.lambdas, losses) >= 0
    assert curve.equivalence < 1e-4, "in float32"
    assert curve.as_dict()["scores"][3]["loss"] == losses[3]


def test_barrier_by_hand() -> None:
    assert barrier((0, 0.25, 0.5, 1), (1, 2, 4, 3)) == 2.0
    assert barrier((0, 0.5, 1), (1, 1, 3)) == 0.0, "below the line there is no barrier"
    assert barrier((0, 0.5, 1), (1, math.nan, 3)) == math.inf


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lambdas": (0.5, 1.5)}, r"lambdas are \[0.5, 1.5\]; numbers of at least 0 up to 1"),
        ({"skips": "none"}, "skips is 'none'; one of identity, linear, rounded"),
    ],
)
def test_refused_options(folder: Path, task: TaskSpec, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(folder, task, **options)


def test_different_heads_have_no_line(folder: Path, task: TaskSpec, tmp_path: Path) -> None:
    digits.save(tiny.vit(0, **{**digits.SIZES, "num_labels": 4}).float(), tmp_path / "four")
    with pytest.raises(InputError, match=r"classifier.*different heads"):
        interpolate(folder / "source", tmp_path / "four", task, limit=20)
