"""Recipes: what they may hold, and what is said when they hold something else."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

import bench_recipe
from transfuse.bench.recipes.reading import dump_recipe, load_recipe, parse_recipe, plain, quick, shipped_recipes
from transfuse.bench.recipes.spec import Recipe
from transfuse.errors import InputError


def changed(path: str, value: Any, content: dict[str, Any] | None = None) -> dict[str, Any]:
    """A recipe with one place changed; `path` may lead through lists."""
    found = copy.deepcopy(content or bench_recipe.everything())
    *before, last = path.split("/")
    place: Any = found
    for key in before:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[int(last) if isinstance(place, list) else last] = value
    return found


def test_what_is_written_down_is_what_was_read(tmp_path: Path) -> None:
    recipe = load_recipe(bench_recipe.write(tmp_path, bench_recipe.everything()))
    file = tmp_path / "again.yaml"
    file.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe
    assert parse_recipe(plain(recipe)) == recipe
    assert dump_recipe(load_recipe(file)) == dump_recipe(recipe)


def test_a_null_that_says_something_is_written_down() -> None:
    content = changed("tasks/upright/data/train", None)
    content["models"]["source"]["train"]["clip_norm"] = None
    recipe = parse_recipe(content)
    assert plain(recipe)["tasks"]["upright"]["data"]["train"] is None
    assert "name" not in plain(recipe)["tasks"]["upright"]["data"]
    assert parse_recipe(plain(recipe)) == recipe


def test_a_conversion_goes_with_what_is_given_or_random() -> None:
    given = {"location": "org/clip", "convert": {"tokenizer": "org/other", "tower": "text"}}
    found = parse_recipe(changed("models/other", given)).models["other"]
    assert found.given is None and found.convert is not None and found.convert.tower == "text"
    assert parse_recipe(changed("models/other", {"location": "org/clip"})).models["other"].given == "org/clip"
    wrong = {"base": "start", "plant": "permutation", "of": "start", "convert": {}}
    with pytest.raises(InputError, match=r"models\.other.*convert goes with location or init"):
        parse_recipe(changed("models/other", wrong))


def test_a_method_is_a_name_or_a_name_with_options() -> None:
    recipe = parse_recipe(bench_recipe.recipe())
    assert recipe.transport is not None
    tied, transfusion = recipe.transport.methods
    assert (tied.method, tied.label, tied.options) == ("tied", "tied", {})
    assert (transfusion.label, transfusion.options) == ("transfusion", {"tie_qkv": False})


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("titel", "x", ["titel: there is no such key", "title", "transport"]),
        ("transport/alpha", [1], ["transport.alpha: there is no such key", "alphas", "null_trials"]),
        ("models/source/train/epoch", 1, ["models.source.train.epoch", "epochs", "steps"]),
        ("models/source/train/task/data/pth", "x", ["models.source.train.task.data.pth", "path", "local"]),
        ("tasks/upright/data/pth", "x", ["tasks.upright.data.pth", "transform"]),
        ("transport/methods", [{"method": "tied", "max_sweeps": 0}], ["methods.0", "tied: max_sweeps is 0; a whole"]),
        ("transport/methods", [{"method": "tied", "options": {"restart": 1}}], ["no option 'restart'; near: restarts"]),
        ("interpolation/points", 4, ["interpolation", "odd"]),
        ("seeds", "x", ["seeds"]),
        ("transport/source", "sauce", ["transport.source: no model 'sauce'", "independent"]),
        ("transport/targets/planted", "no", ["transport.targets.planted: no model 'no'"]),
        ("transport/support", "no", ["transport.support: no task 'no'", "on-side"]),
        ("interpolation/task", "no", ["interpolation.task: no task 'no'"]),
        ("models/tuned/base", "no", ["models.tuned.base: no model 'no'"]),
        ("transport/methods/0", "tyed", ["transport.methods.0", "unknown method 'tyed'", "git-rebasin"]),
        ("transport/methods/1/tie_kv", True, ["transport.methods.1.tie_kv", "tie_qkv", "label"]),
        ("transport/methods/1/seed", 1, ["transport.methods.1.seed", "max_sweeps"]),
        ("transport/methods", ["tied", "tied"], ["transport.methods: 'tied' is there twice", "label"]),
        ("transport/methods/0", {"method": "naive", "label": "oracle"}, ["'oracle' is taken"]),
        ("alpha/methods/0", {"method": "tied", "max_sweeps": 1}, ["alpha.methods", "another section"]),
        ("alpha/targets/planted", "independent", ["the target 'planted'", "another section"]),
        ("worth/alphas", [1.0], ["worth.alphas: there is no such key", "retrained"]),
        ("worth/retrained/again/plantd", {}, ["retrained.again: no target 'plantd'", "planted"]),
        ("worth/retrained/again/planted/upright", "again", ["'upright' is none of on-side"]),
        ("worth/retrained/again/planted/on-side", "no", ["worth.retrained.again.planted: no model 'no'"]),
        ("worth/retrained/tied", {}, ["worth.methods: 'tied' is there twice"]),
        ("worth/retrained/keep the old fine-tune", {}, ["worth: the label 'keep the old fine-tune' is taken"]),
        ("worth/retrained/naive", {}, ["worth: the label 'naive' is taken"]),
        ("worth/methods/0", {"method": "tied", "label": "the new base as it is"}, ["'the new base as it is' is taken"]),
        ("models/again/train/keep/wait", 1, ["models.again.train.keep.wait", "weight"]),
        ("models/start", {}, ["models.start", "location", "base + train", "nothing"]),
        ("models/start/location", "x", ["models.start", "init, location"]),
        ("models/planted/train", None, []),
        ("models/source/base", "tuned", ["made from each other"]),
    ],
)
def test_errors_name_the_file_the_place_and_what_is_possible(
    tmp_path: Path, path: str, value: Any, said: list[str]
) -> None:
    file = bench_recipe.write(tmp_path, changed(path, value))
    if not said:
        load_recipe(file)
        return
    with pytest.raises(InputError) as caught:
        load_recipe(file)
    for one in [str(file), *said]:
        assert one in str(caught.value)


def test_recipes_share_tasks_and_models(tmp_path: Path) -> None:
    content = bench_recipe.everything()
    bench_recipe.write(tmp_path, content)
    about = {"name": "b", "title": "B", "like": "recipe.yaml", "models": {"more": content["models"]["other"]}}
    line = {key: content[key] for key in ("interpolation",)}
    (tmp_path / "b.yaml").write_text(yaml.safe_dump({**about, **line}))
    first, other = load_recipe(tmp_path / "recipe.yaml"), load_recipe(tmp_path / "b.yaml")
    assert (other.tasks, other.seeds, other.limit, other.quick) == (first.tasks, first.seeds, first.limit, first.quick)
    assert other.models == {**first.models, "more": first.models["other"]}
    assert other.transport is None and other.interpolation == first.interpolation
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**about, "like": "c.yaml"}))
    with pytest.raises(InputError, match=r"like: .* in a circle"):
        load_recipe(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**about, "like": "table-nine"}))
    with pytest.raises(InputError, match="no recipe 'table-nine'"):
        load_recipe(tmp_path / "c.yaml")


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    for text, said in (("a: [", "not valid YAML"), ("- a", "mapping"), ("name: a\nname: b", "'name' is there twice")):
        file.write_text(text)
        with pytest.raises(InputError, match=said):
            load_recipe(file)
    with pytest.raises(InputError, match=r"no recipe 'table-nine'.*shipped"):
        load_recipe("table-nine")
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    missing = bench_recipe.recipe()
    del missing["title"]
    with pytest.raises(InputError, match="title: this key is needed"):
        parse_recipe(missing)
    with pytest.raises(InputError, match="nothing to measure"):
        parse_recipe({key: value for key, value in bench_recipe.recipe().items() if key != "transport"})


def test_code_in_yaml_is_not_run(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"name: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']")
    with pytest.raises(InputError, match="not valid YAML"):
        load_recipe(file)
    assert not (tmp_path / "made").exists()


def test_overrides(tmp_path: Path) -> None:
    file = bench_recipe.write(tmp_path, bench_recipe.recipe())
    given = ["transport.null_trials=0", "seeds=[3, 4]", "transport.methods.0=naive", "models.source.train.lr=1e-4"]
    recipe = load_recipe(file, given)
    assert recipe.transport is not None
    assert (recipe.transport.null_trials, recipe.seeds, recipe.transport.methods[0].label) == (0, [3, 4], "naive")
    train = recipe.models["source"].train
    assert train is not None and train.lr == 1e-4
    for wrong, said in (
        ("transport", "key.path=value"),
        ("transport.nul_trials=1", r"transport\.nul_trials: there is no such key"),
        ("transport.methods.9=naive", "there is no '9'"),
        ("seeds.a.b=1", "there is no 'a'"),
    ):
        with pytest.raises(InputError, match=said):
            load_recipe(file, [wrong])


def test_quick_shortens_trainings_and_keeps_the_rest() -> None:
    recipe = parse_recipe(bench_recipe.recipe())
    short = quick(recipe)
    train = short.models["source"].train
    assert train is not None and train.steps == 2  # half of 3, rounded
    assert (short.limit.test, short.limit.train, short.seeds) == (20, 200, [0])
    assert short.models["start"] == recipe.models["start"]
    with pytest.raises(InputError, match="'quick'"):
        quick(recipe.model_copy(update={"quick": None}))


def test_seeds_move_every_draw_of_a_model() -> None:
    recipe = parse_recipe(bench_recipe.recipe())
    spec = {name: one.shifted(2, limit=50) for name, one in recipe.models.items()}
    assert spec["other"].init is not None and spec["other"].init.seed == 2001
    assert spec["source"].train is not None and (spec["source"].train.seed, spec["source"].train.limit) == (2000, 50)
    assert spec["planted"].seed == 2000
    again = recipe.models["source"].shifted(0)
    assert again.train is not None and again.train.seed == 0 and again.train.limit is None


def test_models_come_after_those_they_are_made_from() -> None:
    recipe = parse_recipe(bench_recipe.recipe())
    order = recipe.models_of()
    assert sorted(order) == sorted(recipe.models)
    for name in order:
        assert all(order.index(one) < order.index(name) for one in recipe.models[name].needs)
    assert "tuned" not in recipe.models_of(["interpolation"])


def test_limits_are_capped() -> None:
    recipe = parse_recipe(bench_recipe.recipe(limit={"test": 5}))
    capped = recipe.limit.capped(10)
    assert (capped.train, capped.validation, capped.test) == (10, 10, 5)
    assert recipe.limit.capped(None) == recipe.limit


@pytest.mark.parametrize("name", shipped_recipes() or [None])
def test_shipped_recipes_can_be_read(name: str | None) -> None:
    if name is None:
        pytest.skip("no recipe is shipped")
    recipe = load_recipe(name)
    assert recipe.name == name
    assert isinstance(recipe, Recipe) and yaml.safe_load(dump_recipe(recipe)) == plain(recipe)
