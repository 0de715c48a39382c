"""A whole benchmark on tiny models: what it writes, that it goes on where it was, that it is the same every time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import bench_recipe
from transfuse.bench.cells import CellStore
from transfuse.bench.recipes.reading import parse_recipe
from transfuse.bench.recipes.spec import Recipe
from transfuse.bench.run import Finished, run_bench
from transfuse.bench.store import ModelStore, data_fingerprint
from transfuse.cli.common import app
from transfuse.data.splits import DataSpec
from transfuse.errors import InputError, TransfuseError
from transfuse.files.opening import open_checkpoint
from transfuse.report.records import AS_IT_IS, KEPT, Reference
from transfuse.update.objects import Noise
from transfuse.update.ported import Ported


@dataclass(frozen=True)
class Place:
    """Where one test module keeps data, models and results."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    def cache(self, out: str) -> Path:
        """Cells of its own for every output; models are shared, since making them takes longest."""
        place = self.root / f"{out}-cache"
        (self.root / "models").mkdir(exist_ok=True)
        if not place.exists():
            place.mkdir()
            (place / "models").symlink_to(self.root / "models")
        return place

    def run(self, recipe: Recipe, out: str, *, draw: bool = False, **options: Any) -> Finished:
        """A run; drawing takes most of its time."""
        options = {"workers": 1, "cache": self.cache(out), "data_dir": self.data, **options}
        with pytest.MonkeyPatch.context() as patch:
            if not draw:
                for name in ("figures_of", "regime_figures"):
                    patch.setattr(f"transfuse.bench.output.{name}", lambda *_: [])
            return run_bench(recipe, self.root / out, **options)

    def copy(self, finished: Finished, out: str) -> str:
        """A copy of the cells behind results, to be damaged."""
        shutil.copytree(self.cache(finished.out.name) / "cells", self.cache(out) / "cells")
        return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("bench")
    (root / "data").mkdir()
    bench_recipe.data_dir(root / "data")
    return Place(root)


@pytest.fixture(scope="module")
def whole(place: Place) -> Finished:
    """One run of everything there is."""
    return place.run(parse_recipe(bench_recipe.everything()), "whole", draw=True)


@pytest.fixture(scope="module")
def first(place: Place) -> Finished:
    """One run of one target and one method."""
    return place.run(small(), "first")


def small(**changes: Any) -> Recipe:
    """One target, one method."""
    content = bench_recipe.recipe(**changes)
    content["transport"] |= {"targets": {"planted": "planted"}, "methods": ["tied"], "null_trials": 0}
    return parse_recipe(content)


def tables(finished: Finished) -> str:
    return json.dumps(finished.result["tables"], sort_keys=True)


def cells_of(finished: Finished) -> list[dict[str, Any]]:
    return [one["record"] for one in finished.result["cells"]]


# --- what it finds ------------------------------------------------------------------------------------------------


def test_everything_is_measured_and_written(place: Place, whole: Finished) -> None:
    assert whole.failures == ()
    kinds = {one["kind"] for one in cells_of(whole)}
    assert kinds == {"alignment", "zero-shot", "reference", "transport", "worth", "alpha", "fewshot", "interpolation"}
    written = {one.relative_to(whole.out).as_posix() for one in whole.out.rglob("*") if one.is_file()}
    assert {"result.json", "tables.md", "tables.csv", "report.html", "recipe.yaml"} <= written
    assert {f"figures/{one}" for one in ("transport-gains.png", "transport-gains.svg")} <= written
    assert json.loads((whole.out / "result.json").read_text()) == json.loads(json.dumps(whole.result))
    assert (whole.out / "tables.md").read_text() == whole.tables
    assert not [one for one in written if "partial" in one]


def test_controls_and_the_oracle_are_added(whole: Finished) -> None:
    found = [one for one in cells_of(whole) if one["kind"] == "transport"]
    methods = {regime: [o["method"] for o in found if o["regime"] == regime] for regime in ("planted", "independent")}
    assert methods["planted"] == ["naive", "random", "tied", "transfusion", "oracle"]
    assert methods["independent"] == ["naive", "random", "tied", "transfusion"]


def test_a_planted_permutation_is_found_and_its_port_is_the_oracles(whole: Finished) -> None:
    found = {(o["regime"], o["method"]): o for o in cells_of(whole) if o["kind"] == "transport"}
    oracle, tied = found["planted", "oracle"], found["planted", "tied"]
    for key in ("at_one", "at_chosen", "support_at_one", "validation"):
        assert tied[key] == oracle[key]
    verdicts = {
        o["regime"]: o["verdict"] for o in cells_of(whole) if o["kind"] == "alignment" and o["method"] == "tied"
    }
    assert verdicts == {
        "planted": "related-coordinates",
        "independent": "no-correspondence",
        "line": "no-correspondence",
    }


def test_a_planted_port_is_the_fine_tune_itself(whole: Finished) -> None:
    """The planted target is the source in other coordinates, so carrying over all of the task vector gives tuned."""
    tuned = next(one for one in cells_of(whole) if one["kind"] == "reference")
    oracle = next(o for o in cells_of(whole) if (o["kind"], o.get("method")) == ("transport", "oracle"))
    assert oracle["at_one"]["accuracy"] == tuned["test"]["accuracy"]
    assert oracle["at_one"]["loss"] == pytest.approx(tuned["test"]["loss"], abs=1e-4)
    assert oracle["support_at_one"]["accuracy"] == tuned["support"]["accuracy"], "what whoever keeps the old model has"
    assert oracle["support_at_one"]["loss"] == pytest.approx(tuned["support"]["loss"], abs=1e-4)


def test_what_a_port_is_worth_is_measured_beside_keeping_and_retraining(whole: Finished) -> None:
    found = {o["row"]: o for o in cells_of(whole) if o["kind"] == "worth"}
    assert list(found) == [KEPT, AS_IT_IS, "naive", "random", "tied", "functional", "oracle", "again"]
    by_kind = {(o["kind"], o.get("regime", "")): o for o in cells_of(whole) if o.get("method") in (None, "tied")}
    zero, tied = by_kind["zero-shot", "planted"], by_kind["transport", "planted"]
    reference = by_kind["reference", ""]
    assert found[AS_IT_IS]["test"] == zero["test"] and found[AS_IT_IS]["support"] == zero["support"]
    assert found["tied"]["test"] == tied["at_one"] and found["tied"]["support"] == tied["support_at_one"]
    assert found[KEPT]["test"] == reference["test"] and found[KEPT]["support"] == reference["support"]
    assert all(0 <= o["corrupted"]["accuracy"] <= 1 and o["support"]["examples"] == 60 for o in found.values())
    assert found[KEPT]["corrupted"] != found[KEPT]["test"]
    took = {row: (o["seconds"] is not None, o["memory"] is not None) for row, o in found.items()}
    assert took == {
        **dict.fromkeys(found, (True, True)),
        KEPT: (False, False),
        AS_IT_IS: (False, False),
        "again": (True, False),
    }


def test_alpha_is_chosen_on_validation(whole: Finished) -> None:
    for one in (o for o in cells_of(whole) if o["kind"] == "transport"):
        scores = [each["accuracy"] for each in one["validation"]]
        assert one["chosen"] == one["alphas"][scores.index(max(scores))]
        assert one["at_one"]["examples"] == 60 and one["validation"][0]["examples"] == 40
    assert all(o["scores"][0]["examples"] == 40 for o in cells_of(whole) if o["kind"] == "alpha")


def test_exactness_is_measured(whole: Finished) -> None:
    found = {o["method"]: o for o in cells_of(whole) if o["kind"] == "alignment" and o["regime"] == "planted"}
    assert found["naive"]["equivalence"] is None
    for method in ("tied", "transfusion", "oracle"):
        assert found[method]["equivalence"]["passed"] and found[method]["equivalence"]["error"] < 1e-4
    assert found["tied"]["null"]["model"]["excess"] > 0.25 and found["oracle"]["null"] is None
    layers = [one for part, one in found["tied"]["layers"].items() if part[-2:] in (".0", ".1")]
    assert len(layers) == 2 and all(set(one) == {"identity", "matched", "chance"} for one in layers)
    assert all(0 <= one["moved"] <= 1 for one in found["tied"]["heads"].values())


def test_interpolation_starts_at_the_loss_of_source(whole: Finished) -> None:
    found = [o for o in cells_of(whole) if o["kind"] == "interpolation"]
    assert {(o["method"], o["skips"]) for o in found} == {
        ("naive", "identity"),
        ("tied", "identity"),
        ("transfusion", "linear"),
        ("transfusion", "rounded"),
    }
    for one in found:
        assert one["scores"][0]["loss"] == pytest.approx(one["source"]["loss"], abs=1e-4)


def test_the_page_says_what_produced_it(whole: Finished) -> None:
    page = (whole.out / "report.html").read_text()
    model = next(one for one in whole.result["models"] if one["name"] == "source")
    for said in ("transfuse bench", "torch", model["fingerprint"][:16], "base: source", "no-correspondence"):
        assert said in page
    assert "http://" not in page and "https://" not in page


# --- going on -----------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing_and_writes_the_same_tables(
    place: Place, whole: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was done again")

    for name in ("transfuse.bench.store.train", "transfuse.bench.workbench.evaluate", "transfuse.bench.ports.port"):
        monkeypatch.setattr(name, refuse)
    before = [(whole.out / name).read_bytes() for name in ("tables.md", "tables.csv")]
    again = place.run(parse_recipe(bench_recipe.everything()), "whole", workers=2)
    assert again.fresh == 0 and tables(again) == tables(whole)
    assert [(again.out / name).read_bytes() for name in ("tables.md", "tables.csv")] == before
    assert again.result["cells"] == whole.result["cells"]


def test_what_is_damaged_or_half_written_is_made_again(place: Place, first: Finished) -> None:
    kept = place.cache(place.copy(first, "damaged")) / "cells"
    cells = sorted((kept / "transport").glob("*.json"))
    cells[0].write_text(cells[0].read_text()[:50])
    maps = next((kept / "alignment").glob("*tied*.safetensors"))
    maps.write_bytes(maps.read_bytes()[:20])
    (kept / "transport" / f".{cells[1].name}.1").write_text("{")
    again = place.run(small(), "damaged")
    assert again.fresh == 2 and tables(again) == tables(first)


def test_another_recipe_makes_what_changed_and_nothing_else(place: Place, first: Finished) -> None:
    place.copy(first, "changed")
    content = bench_recipe.recipe()
    content["transport"] |= {"targets": {"planted": "planted"}, "methods": ["tied"], "null_trials": 0, "alphas": [0.5]}
    again = place.run(parse_recipe(content), "changed")
    assert first.fresh > again.fresh == 4  # naive, random, tied and the oracle at other alphas


def test_workers_change_nothing(place: Place, first: Finished) -> None:
    two = place.run(small(), "two", workers=2, cache=place.root / "other-cache")
    assert two.fresh == first.fresh > 0
    assert tables(first) == tables(two)
    assert (first.out / "tables.csv").read_bytes() == (two.out / "tables.csv").read_bytes()


def test_a_model_is_made_whole_or_not_at_all(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = ModelStore(small(), tmp_path, data_dir=place.data, device="cpu")

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    store.make("start", 0)
    with monkeypatch.context() as patch:
        patch.setattr("transfuse.bench.store.train", killed)
        with pytest.raises(KeyboardInterrupt):
            store.make("source", 0)
    assert store.made("source", 0) is None
    left = tmp_path / "models" / f".{Path(store.location('source', 0)).parent.name}.999999999.partial"
    left.mkdir()  # of a process that was killed
    made = store.make("source", 0)
    assert store.made("source", 0) == made and not left.exists()
    assert open_checkpoint(made.location).fingerprint() == made.fingerprint
    assert sorted(one.name[0] for one in (tmp_path / "models").iterdir()) != ["."]


# --- keys ---------------------------------------------------------------------------------------------------------


def test_a_models_key_is_what_it_depends_on(place: Place, tmp_path: Path) -> None:
    def key(name: str, seed: int = 0, data: Path = place.data, **changes: Any) -> str:
        recipe = parse_recipe(bench_recipe.recipe(**changes))
        return ModelStore(recipe, tmp_path, data_dir=data, device="cpu").key(name, seed)

    assert key("source") == key("source", title="Other", seeds=[5])
    assert len({key(name) for name in bench_recipe.recipe()["models"]}) == 6
    assert key("source") != key("source", seed=1) != key("source", limit={"train": 10})
    models = bench_recipe.recipe()["models"]
    models["start"]["init"]["std"] = 0.3
    assert key("source", models=models) != key("source")  # through what it is made from
    bench_recipe.data_dir(tmp_path)
    assert key("source", data=tmp_path) == key("source")
    with (tmp_path / "digits" / "test.parquet").open("ab") as stream:
        stream.write(b"x")
    assert key("source", data=tmp_path) != key("source")
    assert key("start", data=tmp_path) == key("start")


def test_hub_data_have_no_fingerprint(tmp_path: Path) -> None:
    assert data_fingerprint(DataSpec(path="org/name", local="none"), tmp_path) == ""


def test_a_cell_of_something_else_is_not_read(tmp_path: Path) -> None:
    store = CellStore(tmp_path)
    cell = store.cell("reference", ("a b/../c",), {"x": 1})
    assert cell.file.parent == tmp_path / "reference" and store.read(cell) is None
    record = Reference(0, "a", {"accuracy": 0.5})
    assert store.write(cell, record, 1.0).record == record
    kept = store.read(cell)
    assert kept is not None and kept.record == record and not kept.fresh
    cell.file.write_text(cell.file.read_text().replace(cell.key, "0" * 64))
    assert store.read(cell) is None


# --- failures -----------------------------------------------------------------------------------------------------


def test_a_cell_that_fails_is_recorded_and_the_run_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Ported.held

    def failing(ported: Ported) -> Ported:
        if isinstance(ported.update, Noise):
            raise TransfuseError("by design")
        return real(ported)

    monkeypatch.setattr(Ported, "held", failing)
    found = place.run(small(), "failing")
    assert [(one.what, one.error) for one in found.failures] == [
        ("transport seed0 planted on-side random", "by design")
    ]
    assert "by design" in (found.out / "report.html").read_text()
    assert "| tied |" in found.tables
    monkeypatch.setattr(Ported, "held", real)
    again = place.run(small(), "failing")
    assert again.failures == () and again.fresh == 1


def test_a_model_that_fails_takes_along_what_needs_it(place: Place) -> None:
    content = bench_recipe.recipe()
    content["transport"] |= {"methods": ["tied"], "null_trials": 0}
    content["models"]["independent"]["train"] = {**content["models"]["independent"]["train"], "freeze": ["nothing"]}
    found = place.run(parse_recipe(content), "model-fails")
    assert [one.what for one in found.failures] == ["model independent, seed 0", "regime independent, seed 0"]
    assert "model independent, seed 0 failed" in found.failures[1].error
    assert "### planted" in found.tables


def test_outputs_that_would_be_overwritten(place: Place, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    for out in (tmp_path, tmp_path / "letter.txt"):
        with pytest.raises(InputError):
            run_bench(small(), out, cache=place.cache("x"), data_dir=place.data)
    with pytest.raises(InputError, match="no section 'alpha'"):
        run_bench(small(), tmp_path / "x", cache=place.cache("x"), data_dir=place.data, only=["alpha"])
    with pytest.raises(InputError, match="data directory"):
        run_bench(small(), tmp_path / "x", cache=place.cache("x"), data_dir=tmp_path / "none")


# --- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def command(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("figures_of", "regime_figures"):
        monkeypatch.setattr(f"transfuse.bench.output.{name}", lambda *_: [])

    def run(*words: str) -> Result:
        file = bench_recipe.write(tmp_path, bench_recipe.recipe())
        options = ["--data-dir", str(place.data), "--cache", str(place.cache("cli")), "--workers", "1"]
        return CliRunner().invoke(app, ["bench", str(file), *options, *words])

    yield run


def test_the_command_prints_where_the_report_is_and_the_tables(command: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = ["--override", "transport.methods=[tied]", "--override", "transport.targets={planted: planted}"]
    found = command("-o", str(out), *changes, "--seeds", "1", "--limit", "30")
    assert found.exit_code == 0, found.output
    assert found.stdout.startswith(f"{out / 'report.html'}\n\n# Digits")
    assert "alignment seed1 planted tied" in found.stderr
    as_json = command("-o", str(out), *changes, "--seeds", "1", "--limit", "30", "--json", "-q")
    assert json.loads(as_json.stdout)["seeds"] == [1] and as_json.stderr == ""


def test_bad_uses_of_the_command(command: Any, tmp_path: Path) -> None:
    for words, said in (
        ([], "-o"),
        (["-o", str(tmp_path / "x"), "--seeds", "a"], "whole numbers"),
        (["-o", str(tmp_path / "x"), "--override", "titel=1"], "titel: there is no such key"),
        (["-o", str(tmp_path / "x"), "--override", "tasks.upright.data={path: ./none}"], "none"),
    ):
        found = command(*words)
        assert found.exit_code in (1, 2) and said in found.output


def test_missing_data_are_named(command: Any, tmp_path: Path) -> None:
    nowhere = "models.source.train.task.data={path: org/nowhere, local: none}"
    found = command("-o", str(tmp_path / "x"), "--override", nowhere)
    assert found.exit_code == 1
    assert "FAILED model source, seed 0: data set org/nowhere" in found.stderr and "folder 'none'" in found.stderr
