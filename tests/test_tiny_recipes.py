"""Full-size recipes, made tiny: the real classes and loaders without network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import bench_recipe
from transfuse.bench.recipes.reading import parse_recipe
from transfuse.bench.recipes.spec import Recipe
from transfuse.bench.run import resolve, run_bench
from transfuse.bench.store import ModelStore
from transfuse.errors import InputError
from transfuse.files.opening import open_checkpoint


@pytest.fixture(scope="module")
def at_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few real images and a few texts with labels."""
    folder = bench_recipe.data_dir(tmp_path_factory.mktemp("data"))
    texts = folder / "texts"
    texts.mkdir()
    words = ("a fine film", "a dull film", "what a joy", "what a bore")
    rows = "".join(f"{words[i % 4]} number {i}\t{i % 2}\n" for i in range(60))
    for split in ("train", "dev"):
        (texts / f"{split}.tsv").write_text("sentence\tlabel\n" + rows)
    return folder


ZERO_SHOT: dict[str, Any] = {
    "kind": "zero-shot-image-classification",
    "data": {"path": "tanganke/nowhere", "local": "nowhere", "test": "test"},
    "templates": ["a satellite photo of {}."],
}
PAIRS: dict[str, Any] = {
    "kind": "text-classification",
    "data": {
        "path": "nyu-mll/nothing",
        "name": "rte",
        "test": "validation",
        "text_pair": ["sentence1", "sentence2"],
        "classes": ["yes", "no"],
    },
}
ANSWERS: dict[str, Any] = {
    "kind": "seq2seq",
    "data": {"path": "org/nowhere", "text_pair": ["premise", "hypothesis"], "classes": ["yes", "maybe", "no"]},
    "targets": ["it follows", "it may", "it does not"],
}


def hub_recipe(task: dict[str, Any], architecture: str | None) -> Recipe:
    """As full-size recipes are: everything comes from the hub."""
    given = {"architecture": architecture} if architecture else {}
    return parse_recipe(
        {
            "name": "full",
            "title": "Full size",
            "tasks": {"task": task},
            "models": {
                "old": {"location": "org/old", **given},
                "new": {"location": "org/new", **given},
                "tuned": {"location": "org/tuned"},
            },
            "transport": {
                "source": "old",
                "targets": {"new": "new"},
                "tasks": {"task": {"tuned": "tuned"}},
                "support": "task" if "image" in task["kind"] else None,
                "methods": ["tied"],
                "null_trials": 0,
            },
        }
    )


@pytest.mark.parametrize(
    ("task", "architecture", "kind"),
    [
        (ZERO_SHOT, "CLIPModel", "CLIPModel"),
        (ZERO_SHOT, None, "CLIPModel"),
        (PAIRS, "BertModel", "BertForSequenceClassification"),
        (ANSWERS, None, "T5ForConditionalGeneration"),
    ],
)
def test_full_size_recipes_run_end_to_end_on_tiny_models(
    tmp_path: Path,
    at_hand: Path,
    task: dict[str, Any],
    architecture: str | None,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if architecture != "CLIPModel":  # figures once: they take most of the time
        for name in ("figures_of", "regime_figures"):
            monkeypatch.setattr(f"transfuse.bench.output.{name}", lambda *_: [])
    recipe = resolve(hub_recipe(task, architecture), tiny_run=True, data_dir=at_hand, limit=12)
    found = run_bench(recipe, tmp_path / "out", cache=tmp_path, data_dir=at_hand, workers=1)
    assert found.failures == ()
    store = ModelStore(recipe, tmp_path, data_dir=at_hand, device="cpu")
    config = open_checkpoint(store.location("tuned", 0)).config
    assert config["architectures"] == [kind]
    ported = [one for one in [cell["record"] for cell in found.result["cells"]] if one["kind"] == "transport"]
    assert [one["method"] for one in ported] == ["naive", "random", "tied"]
    assert ported[0]["at_one"]["examples"] == 12


def test_targets_go_where_other_classes_stand_in(at_hand: Path) -> None:
    recipe = resolve(hub_recipe(ANSWERS, "T5ForConditionalGeneration"), tiny_run=True, data_dir=at_hand)
    task = recipe.tasks["task"]
    assert Path(task.data.path).name == "texts" and task.targets is None
    two = {**ANSWERS, "targets": ["it follows", "it does not"]}
    recipe = resolve(hub_recipe(two, "T5ForConditionalGeneration"), tiny_run=True, data_dir=at_hand)
    assert recipe.tasks["task"].targets == two["targets"]


def test_tiny_runs_need_data_that_fit(at_hand: Path, tmp_path: Path) -> None:
    recipe = hub_recipe(ZERO_SHOT, "CLIPModel")
    with pytest.raises(InputError, match="--data-dir"):
        resolve(recipe, tiny_run=True)
    with pytest.raises(InputError, match=r"stand in for tanganke/nowhere.*images by class"):
        resolve(recipe, tiny_run=True, data_dir=tmp_path)
    with pytest.raises(InputError, match="no tiny form of GPT2Model"):
        resolve(hub_recipe(ZERO_SHOT, "GPT2Model"), tiny_run=True, data_dir=at_hand)
