"""The demo's story, checked on a real run, and the parts of it that must not disturb the caller."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from transfuse.demo import run as demo
from transfuse.demo import training
from transfuse.errors import InputError
from transfuse.porting.planted import plant


def _accuracies(result: dict[str, Any], measure: str) -> dict[tuple[str, str], float]:
    return {(row["target"], row["method"]): row[measure] for row in result["rows"]}


def _check_complete(out: Path, result: dict[str, Any]) -> None:
    methods = (demo.ZERO_SHOT, *demo.METHODS, demo.TUNED_ON_TARGET)
    expected = [(target, method) for target in demo.TARGETS for method in methods]
    assert [(row["target"], row["method"]) for row in result["rows"]] == expected
    assert all(0 <= row[measure] <= 100 for row in result["rows"] for measure in ("task", "support"))
    assert json.loads((out / "demo.json").read_text()) == result
    table = (out / "table.md").read_text()
    assert all(f"| {target} | {method} |" in table for target, method in expected)
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def _check_relations(result: dict[str, Any]) -> None:
    assert result["relations"] == {
        "release-continued": "same-lineage",
        "release-permuted": "related-coordinates",
        "independent": "no-correspondence",
    }


def _check_story(result: dict[str, Any]) -> None:
    task, support = _accuracies(result, "task"), _accuracies(result, "support")
    zero = {target: task[target, demo.ZERO_SHOT] for target in demo.TARGETS}
    assert max(zero.values()) < 60
    assert zero["release-permuted"] == pytest.approx(zero["release-continued"], abs=0.5), (
        "re-ordering kept the function"
    )
    for target in demo.TARGETS:
        assert task[target, demo.TUNED_ON_TARGET] > 85
    for method in ("naive", "transfusion", "tied"):
        assert task["release-continued", method] > zero["release-continued"] + 15
    for method in ("transfusion --split-qkv", "tied"):
        assert task["release-permuted", method] > zero["release-permuted"] + 15
    assert support["release-permuted", "tied"] > 70
    for method in ("naive", "random"):
        assert task["release-permuted", method] < zero["release-permuted"] + 8
    for method in demo.METHODS:
        assert task["independent", method] < zero["independent"] + 15, "nothing helps a model that is no relative"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo_tells_its_story(tmp_path: Path) -> None:
    # One test, not one per claim: parallel workers would each train everything again.
    steps: list[str] = []
    global_state = torch.random.get_rng_state()
    result = demo.run_demo(tmp_path / "out", progress=steps.append)
    assert torch.equal(torch.random.get_rng_state(), global_state), "the demo must leave the global generator alone"
    assert len(steps) >= 4 + len(demo.TARGETS) * len(demo.METHODS)
    _check_complete(tmp_path / "out", result)
    _check_story(result)
    _check_relations(result)


def test_reordered_release_computes_the_same_function(tmp_path: Path) -> None:
    model = training.new_model(torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / "model")
    plant(tmp_path / "model", tmp_path / "reordered", tie_qkv=False, seed=2)
    images = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    reordered = training.load(tmp_path / "reordered")
    with torch.no_grad():
        torch.testing.assert_close(
            reordered(pixel_values=images).logits, model(pixel_values=images).logits, atol=1e-5, rtol=1e-4
        )
    parameters = dict(model.named_parameters())
    assert not any(torch.equal(p, parameters[name]) for name, p in reordered.named_parameters() if p.ndim > 1)


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_missing_extra_is_named_before_any_training(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def import_module(name: str, package: str | None = None) -> Any:
        if name.partition(".")[0] == missing:
            raise ImportError(name)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(InputError, match=rf"{missing}.*pip install 'transfuse\[demo\]'"):
        demo.run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()
