"""The full-size recipes: they run end to end on tiny models, with the classes, loaders and data sets that they name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import full_size_data
from transfuse.bench.recipes.reading import load_recipe, parse_recipe, shipped_recipes
from transfuse.bench.recipes.spec import Recipe
from transfuse.bench.run import Finished, resolve, run_bench
from transfuse.bench.store import ModelStore
from transfuse.files.opening import open_checkpoint

FULL = [name for name in shipped_recipes() if not name.endswith("-small")]
SIGNS = 43
# Of a model of each recipe: the class that its fine-tunes, or its models, have.
KINDS = {
    "table1-clip-vitb16": ("tuned-gtsrb", "CLIPModel"),
    "table2-glue-text-encoder": ("tuned-rte", "CLIPTextModelForSequenceClassification"),
    "table3-heads": ("tuned-svhn", "CLIPModel"),
    "table4-fewshot": ("tuned-dtd", "CLIPModel"),
    "fig4-alpha": ("tuned-eurosat", "CLIPModel"),
    "fig5-lmc-vit-cifar10": ("permuted", "ViTForImageClassification"),
    "gradfix-table": ("tuned-eurosat", "CLIPModel"),
    "gradfix-t5": ("tuned-scitail", "T5ForConditionalGeneration"),
    "theseus-table": ("tuned-eurosat", "CLIPModel"),
    "auto": ("permuted", "CLIPModel"),
}
# Of recipes with many rows: the task that is run.
ONE_TASK = {"gradfix-table": "eurosat", "gradfix-t5": "scitail", "theseus-table": "eurosat", "auto": "eurosat"}
NO_TWIN = {"gradfix-t5"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data`, and the cache of models that the recipes share."""
    folder = tmp_path_factory.mktemp("full")
    full_size_data.write(folder / "data")
    return folder


def run(place: Path, name: str) -> tuple[Recipe, Finished]:
    recipe = resolve(load_recipe(name), tiny_run=True, data_dir=place / "data", limit=8)
    if name in ONE_TASK:
        recipe = shortened(recipe, ONE_TASK[name])
    given: dict[str, Any] = {"cache": place / "cache", "data_dir": place / "data", "workers": 1}
    return recipe, run_bench(recipe, place / name, **given)


def shortened(recipe: Recipe, task: str) -> Recipe:
    """Only this task in its sections, and the last two targets."""
    fewer = {}
    for key in ("transport", "fewshot"):
        if (one := getattr(recipe, key)) is not None:
            targets = dict(list(one.targets.items())[-2:])
            fewer[key] = one.model_copy(update={"tasks": {task: one.tasks[task]}, "targets": targets})
    return recipe.model_copy(update=fewer)


def test_they_are_all_here() -> None:
    assert set(FULL) == set(KINDS)
    assert {f"{name}-small" for name in FULL if name not in NO_TWIN} <= set(shipped_recipes())


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_a_full_size_recipe_runs_end_to_end(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ONE_TASK:  # figures of every kind come with the others
        for figures in ("figures_of", "regime_figures"):
            monkeypatch.setattr(f"transfuse.bench.output.{figures}", lambda *_: [])
    recipe, finished = run(place, name)
    assert finished.failures == () and (finished.out / "report.html").is_file()
    store = ModelStore(recipe, place / "cache", data_dir=place / "data", device="cpu")
    model, kind = KINDS[name]
    found = open_checkpoint(store.location(model, 0))
    assert found.config["architectures"] == [kind]
    records = [cell["record"] for cell in finished.result["cells"]]
    measured = {(one["task"], one["method"]) for one in records if {"task", "method"} <= one.keys()}
    for section in filter(None, (recipe.transport, recipe.alpha, recipe.fewshot)):
        assert {(task, one.label) for task in section.tasks for one in section.methods} <= measured
    # A recipe as it was run can be run again.
    assert parse_recipe(finished.result["recipe"]) == recipe


def test_own_data_are_used_with_their_own_class_names(place: Path) -> None:
    recipe = resolve(load_recipe("table1-clip-vitb16"), tiny_run=True, data_dir=place / "data")
    gtsrb, renditions = recipe.tasks["gtsrb"].data, recipe.tasks["imagenet-r"].data
    assert (gtsrb.local, len(gtsrb.classes or [])) == ("gtsrb", SIGNS)
    assert (renditions.train, renditions.validation_from, renditions.label[0]) == (None, "test", "class_name")
    assert recipe.models["commonpool"].convert is not None and recipe.models["commonpool"].location is None
    assert recipe.models["commonpool"].init != recipe.models["datacomp"].init
    tuned = recipe.models["tuned-svhn"].train
    assert tuned is not None and tuned.steps == 2 and tuned.task.data.local == "svhn"


def test_pairs_of_sentences_keep_their_columns_and_classes(place: Path) -> None:
    full = load_recipe("gradfix-t5")
    recipe = resolve(full, tiny_run=True, data_dir=place / "data")
    assert recipe.fewshot is not None and recipe.fewshot.tune_steps == 2
    for name, task in recipe.tasks.items():
        data, own = task.data, full.tasks[name].data
        assert (data.local, data.text_pair, data.classes) == (name, own.text_pair, own.classes)
        assert (data.train, data.validation, data.test) == (own.train, own.validation, own.test)
        assert task.targets == full.tasks[name].targets
    init = recipe.models["t5"].init
    assert init is not None and init.config["d_model"] == 32 and recipe.models["flan-t5"].init != init
    counts = {one.inputs.count for one in recipe.fewshot.methods if one.inputs is not None}
    assert counts == {24}


def test_models_of_base_size_are_made_small(place: Path) -> None:
    recipe = resolve(load_recipe("fig5-lmc-vit-cifar10"), tiny_run=True, data_dir=place / "data")
    full = load_recipe("fig5-lmc-vit-cifar10").models["other-start"].init
    init = recipe.models["other-start"].init
    assert full is not None and init is not None and full.config["hidden_size"] == 768
    assert (init.config["hidden_size"], init.config["num_hidden_layers"], init.config["num_labels"]) == (32, 2, 10)
    assert init.seed == full.seed


def test_what_they_name(place: Path) -> None:
    """Hub models, hub data and class counts, as far as can be told without network."""
    table = load_recipe("table1-clip-vitb16")
    assert {one.location for one in table.models.values() if one.location} == {
        "laion/CLIP-ViT-B-16-CommonPool.L-s1B-b8K",
        "laion/CLIP-ViT-B-16-DataComp.L-s1B-b8K",
    }
    counts = {name: len(task.data.classes or []) for name, task in table.tasks.items()}
    assert counts == {"eurosat": 10, "dtd": 47, "gtsrb": SIGNS, "svhn": 10, "imagenet-r": 0}
    for task in table.tasks.values():
        assert len(set(task.data.classes or [])) == len(task.data.classes or [])
    for name in ("table3-heads", "table4-fewshot", "fig4-alpha", "gradfix-table", "theseus-table"):
        assert load_recipe(name).models == table.models and load_recipe(name).limit == table.limit
    assert load_recipe("auto").models.items() >= table.models.items()
    glue = load_recipe("table2-glue-text-encoder")
    assert {one.data.name for one in glue.tasks.values()} == {"qqp", "sst2", "rte", "cola"}
    assert all(one.data.test == "validation" and one.data.validation is None for one in glue.tasks.values())
    text = load_recipe("gradfix-t5")
    located = [one.location for one in text.models.values() if one.location]
    assert located == ["google/t5-v1_1-base", "google/flan-t5-base"]
    assert {(one.data.path, one.data.name) for one in text.tasks.values()} == {
        ("stanfordnlp/snli", None),
        ("nyu-mll/glue", "mnli"),
        ("nyu-mll/glue", "rte"),
        ("nyu-mll/glue", "qnli"),
        ("allenai/scitail", "tsv_format"),
    }
