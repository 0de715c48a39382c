"""How often the models of a run are read: counted by the run itself, and no more often than promised."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import BertForMaskedLM

from tiny import bert, fine_tuned, planted, save
from transfuse import port
from transfuse.cli.common import app
from transfuse.files.opening import open_checkpoint
from transfuse.models.passes import ASCENT, Passes

Trio = tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    folder = tmp_path_factory.mktemp("trio")
    source = bert(BertForMaskedLM)
    target, _ = planted(source, 1, noise=0.2)
    models = {"source": source, "tuned": fine_tuned(source), "target": target}
    source, tuned, target = (save(model, folder / role) for role, model in models.items())
    return source, tuned, target


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
