"""How often the models of a run are read: counted by the run itself, and no more often than promised."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import BertForMaskedLM

from tiny import bert, fine_tuned, planted, save
from transfuse import port
from transfuse.cli.common import app
from transfuse.files.opening import open_checkpoint
from transfuse.models.passes import ASCENT, Passes
from transfuse.running.unlabelled import Inputs

Trio = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    folder = tmp_path_factory.mktemp("trio")
    source = bert(BertForMaskedLM)
    target, _ = planted(source, 1, noise=0.2)
    models = {"source": source, "tuned": fine_tuned(source), "target": target}
    source, tuned, target = (save(model, folder / role) for role, model in models.items())
    return source, tuned, target


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(bert(BertForMaskedLM, seed=9), tmp_path_factory.mktemp("stranger") / "model")


def test_phases(trio: Trio) -> None:
    opened = open_checkpoint(trio[0])
    names = list(opened)
    opened.tensor(names[0])
    passes = Passes({"source": opened})
    with passes.phase("outer"):
        for name in names:
            opened.tensor(name)
        with passes.phase("inner"):
            list(opened.blocks(names[0]))
        opened.tensor(names[1])
    opened.fingerprint()
    opened.fingerprint()
    one = 1 / len(names)
    assert passes.by_phase() == {"outer": {"source": 1 + one}, "inner": {"source": one}, "other": {"source": 1.0}}
    assert passes.total() == {"source": pytest.approx(2 + 2 * one)}
    assert passes.total(without=("outer",)) == {"source": pytest.approx(1 + one)}
    assert re.match(r"passes over source: 2\.\d\d \(.*outer 1\.\d\d in \d+\.\d s", passes.text())


def test_a_dry_run_reads_each_model_once(trio: Trio) -> None:
    result = port(*trio, dry_run=True)
    passes = result.tensors.models.passes
    assert passes.by_phase() == {"survey": {"source": 1, "tuned": 1, "target": 1}}


def test_naive_reads_each_model_twice(trio: Trio, tmp_path: Path) -> None:
    result = port(*trio, out=tmp_path / "out", method="naive")
    passes = result.tensors.models.passes
    once = {"source": 1, "tuned": 1, "target": 1}
    assert passes.by_phase() == {"survey": once, "write": once}


def test_tied_with_all_checks(trio: Trio, tmp_path: Path) -> None:
    result = port(*trio, out=tmp_path / "out", method="tied", null_trials=1)
    passes = result.tensors.models.passes
    assert {"survey", "match", "null test", "check", "write", ASCENT} == passes.by_phase().keys()
    beside = passes.total(without=(ASCENT,))
    assert beside["source"] <= 8 and beside["tuned"] <= 2 and beside["target"] <= 6
    assert passes.total()["source"] > beside["source"]


# Passes over source, tuned and target beside those of the ascent; of any phase the last digits are heads,
# and the MLPs, which the null test reads once more.
DRAWN = Inputs("synthetic", count=8)
MOST: dict[str, tuple[dict[str, Any], tuple[float, float, float]]] = {
    "tied": ({"method": "tied"}, (7.1, 2, 3.2)),
    "orthogonal": ({"method": "orthogonal"}, (7.1, 2, 3.2)),
    "theseus": ({"method": "theseus", "inputs": DRAWN}, (3, 2, 3)),
    "functional": ({"method": "functional", "inputs": DRAWN}, (2.3, 2.3, 7.3)),
    "distillation": ({"method": "distillation", "inputs": DRAWN}, (1, 2, 8)),
    "auto with inputs": ({"inputs": DRAWN}, (2.3, 2.3, 7.3)),
    "auto": ({}, (7.1, 2, 3.2)),
    "auto between strangers": ({}, (8.4, 3.3, 9.5)),
}


@pytest.mark.parametrize("name", MOST)
def test_no_more_passes_than(name: str, trio: Trio, stranger: Path, tmp_path: Path) -> None:
    options, most = MOST[name]
    target = stranger if "strangers" in name else trio[2]
    result = port(*trio[:2], target, out=tmp_path / "out", **options)
    found = result.tensors.models.passes.total(without=(ASCENT,))
    assert all(count <= bound for count, bound in zip(found.values(), most, strict=True)), found
    assert "other" not in result.tensors.models.passes.by_phase()
    assert result.report["method"] == options.get("method", "tied" if name == "auto" else "functional")


def test_what_the_command_says(trio: Trio, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    places = [str(place) for place in trio]
    with caplog.at_level("INFO"):
        done = CliRunner().invoke(app, ["port", *places, "-o", str(tmp_path / "out"), "--method", "naive", "-v"])
    assert done.exit_code == 0, done.output
    said = [line for line in caplog.messages if line.startswith("passes over")]
    assert len(said) == 1
    assert re.fullmatch(
        r"passes over source/tuned/target: 2/2/2 \(survey 1/1/1 in \d+\.\d s, write 1/1/1 in \d+\.\d s\)", said[0]
    )


def test_the_same_files_are_counted_for_each_run(trio: Trio) -> None:
    opened = [open_checkpoint(place) for place in trio]
    first, second = (port(*opened, dry_run=True).tensors.models.passes.by_phase() for _ in range(2))
    assert first == second, "the fingerprints are known by then, the sums are not"
    assert torch.tensor(list(second["survey"].values())).eq(1).all()
