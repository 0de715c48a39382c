"""Merging task vectors: every rule against a plain loop, and whole merges against what they are made of."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertForSequenceClassification, BertModel

import tiny
from transfuse import InputError, port
from transfuse.porting.merge import merge
from transfuse.update.merging import merge_deltas

Deltas = list[dict[str, Tensor]]


@pytest.fixture(scope="module")
def deltas() -> Deltas:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (7, 5), "a.bias": (7,), "b": (3, 2, 4)}
    return [
        {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
        for _ in range(4)
    ]


def ties_of(vectors: list[np.ndarray], density: float) -> np.ndarray:
    """TIES on flat vectors, entry by entry."""
    trimmed = []
    for vector in vectors:
        count = max(1, math.ceil(density * len(vector)))
        kept = sorted(range(len(vector)), key=lambda i: -abs(vector[i]))[:count]
        trimmed.append([vector[i] if i in kept else 0.0 for i in range(len(vector))])
    merged = []
    for i in range(len(vectors[0])):
        up = sum(t[i] for t in trimmed if t[i] > 0)
        down = -sum(t[i] for t in trimmed if t[i] < 0)
        agreeing = [t[i] for t in trimmed if (t[i] > 0 and up > down) or (t[i] < 0 and down > up)]
        merged.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return np.array(merged)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_ties_is_the_plain_loop(deltas: Deltas, density: float) -> None:
    found = merge_deltas(deltas, how="ties", density=density)
    for name, merged in found.items():
        expected = ties_of([delta[name].numpy().ravel() for delta in deltas], density)
        np.testing.assert_allclose(merged.numpy().ravel(), expected, atol=1e-12)


def test_ties_by_hand() -> None:
    one, two, three = (torch.tensor(x) for x in ([3.0, 1.0, -2.0, 0.1], [2.0, -4.0, 2.0, 0.2], [-1.0, 2.0, 0.3, 5.0]))
    found = merge_deltas([{"x": one}, {"x": two}, {"x": three}], how="ties", density=0.5)["x"]
    # kept: one [3, ., -2, .], two [., -4, ., .] and the two that are equal, three [., 2, ., 5]
    assert found.tolist() == [2.5, -4.0, 0.0, 5.0]


def test_sum_and_mean(deltas: Deltas) -> None:
    for name in deltas[0]:
        total = np.zeros(deltas[0][name].shape)
        for delta in deltas:
            total = total + delta[name].numpy()
        np.testing.assert_allclose(merge_deltas(deltas)[name], total, atol=1e-12)
        np.testing.assert_allclose(merge_deltas(deltas, how="mean")[name], total / 4, atol=1e-12)


def test_dare_keeps_a_share_and_rescales() -> None:
    one = {"x": torch.full((200, 100), 2.0)}
    found = merge_deltas([one], how="dare", density=0.25, seed=3)["x"]
    assert set(found.unique().tolist()) == {0.0, 8.0}
    assert abs(float((found != 0).double().mean()) - 0.25) < 0.02
    assert abs(float(found.mean()) - 2.0) < 0.15, "the expectation is kept"


def test_dare_sums_masks_of_their_own(deltas: Deltas) -> None:
    found = merge_deltas(deltas, how="dare", density=0.5, seed=1)
    for name, merged in found.items():
        flat, columns = merged.flatten(), [delta[name].flatten() for delta in deltas]
        for i in range(len(flat)):
            sums = {
                round(sum(float(column[i]) / 0.5 for k, column in enumerate(columns) if chosen >> k & 1), 9)
                for chosen in range(16)
            }
            assert round(float(flat[i]), 9) in sums
    assert not torch.equal(found["a.weight"], merge_deltas(deltas, how="dare", density=0.5, seed=2)["a.weight"])
    assert torch.equal(found["a.weight"], merge_deltas(deltas, how="dare", density=0.5, seed=1)["a.weight"])


def test_dare_masks_do_not_depend_on_the_other_tensors(deltas: Deltas) -> None:
    alone = merge_deltas([{"b": delta["b"]} for delta in deltas], how="dare", density=0.5)["b"]
    assert torch.equal(alone, merge_deltas(deltas, how="dare", density=0.5)["b"])


def test_full_density_drops_nothing(deltas: Deltas) -> None:
    total = merge_deltas(deltas)
    for name, merged in merge_deltas(deltas, how="dare", density=1.0).items():
        torch.testing.assert_close(merged, total[name])


@pytest.mark.parametrize("how", ["mean", "ties"])
def test_one_and_the_same_task_vector_stays(deltas: Deltas, how: str) -> None:
    density = 1.0 if how == "ties" else None
    found = merge_deltas([deltas[0]] * 3, how=how, density=density)
    for name, one in deltas[0].items():
        torch.testing.assert_close(found[name], one)


def test_a_missing_tensor_has_no_say(deltas: Deltas) -> None:
    some = [deltas[0], {"b": deltas[1]["b"]}]
    found = merge_deltas(some, how="mean")
    torch.testing.assert_close(found["a.bias"], deltas[0]["a.bias"])
    torch.testing.assert_close(found["b"], (deltas[0]["b"] + deltas[1]["b"]) / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"how": "average"}, "average"),
        ({"how": "ties", "density": 0.0}, "density is 0"),
        ({"how": "dare", "density": 1.5}, "density is 1.5"),
        ({"how": "sum", "density": 0.5}, "keeps every entry"),
    ],
)
def test_refused_rules(deltas: Deltas, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        merge_deltas(deltas, **arguments)


def test_nothing_to_merge() -> None:
    with pytest.raises(InputError, match="nothing to merge"):
        merge_deltas([])


# --- whole merges -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source, a target with its units re-ordered, three fine-tunes and two with a head."""
    folder = tmp_path_factory.mktemp("bases")
    source = tiny.bert()
    moved, _ = tiny.planted(source, 5)
    tiny.save(source, folder / "source")
    tiny.save(moved, folder / "target")
    for seed in (1, 2, 3):
        tiny.save(tiny.fine_tuned(source, seed=10 * seed), folder / f"tuned{seed}")
    for seed, labels in ((4, 3), (5, 3), (6, 2)):
        head = tiny.fine_tuned(source, BertForSequenceClassification, seed=10 * seed, num_labels=labels)
        tiny.save(head, folder / f"head{seed}")
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def run(bases: Path, names: list[str], **options: object) -> dict[str, Tensor]:
    tuned = [bases / name for name in names]
    return merge(bases / "source", tuned, bases / "target", null_trials=0, **options).state_dict()  # pyright: ignore


@pytest.mark.parametrize(("how", "density"), [("sum", None), ("mean", None), ("ties", 0.4), ("dare", 0.4)])
def test_a_merge_is_target_plus_the_merged_ports(bases: Path, how: str, density: float | None) -> None:
    names = ["tuned1", "tuned2", "tuned3"]
    target = read(bases / "target")
    updates = []
    for name in names:
        ported = port(bases / "source", bases / name, bases / "target", null_trials=0, verify=False)
        updates.append({key: one - target[key] for key, one in ported.state_dict().items()})
    expected = merge_deltas(updates, how=how, density=density, seed=7)
    found = run(bases, names, how=how, density=density, alpha=0.5, seed=7)
    assert found.keys() == target.keys()
    for name, one in target.items():
        torch.testing.assert_close(found[name], one + 0.5 * expected[name], rtol=0, atol=1e-12)


def test_a_merge_of_one_is_a_port(bases: Path) -> None:
    expected = port(bases / "source", bases / "tuned1", bases / "target", null_trials=0).state_dict()
    for name, one in run(bases, ["tuned1"]).items():
        assert torch.equal(one, expected[name]), name


def test_a_merge_is_written_like_a_port(bases: Path, tmp_path: Path) -> None:
    tuned = [bases / name for name in ("tuned1", "tuned2")]
    result = merge(bases / "source", tuned, bases / "target", out=tmp_path / "out", how="ties", density=0.3)
    written = read(tmp_path / "out")
    assert all(torch.equal(written[name], one) for name, one in result.state_dict().items())
    BertModel.from_pretrained(tmp_path / "out")
    report = json.loads((tmp_path / "out" / "result.json").read_text())
    assert report["merge"]["how"] == "ties" and report["merge"]["density"] == 0.3
    assert [one["location"] for one in report["merge"]["tuned"]] == [str(path) for path in tuned]
    assert set(report["models"]) == {"source", "target"} and report["relation"]["null"]
    assert report["loads"] == "BertModel" and report["equivalence"]["passed"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 fine-tunes" in card and "ties, density 0.3" in card and str(tuned[1]) in card


def test_the_same_seed_gives_the_same_bytes(bases: Path, tmp_path: Path) -> None:
    for out in ("one", "two"):
        tuned = [bases / "tuned1", bases / "tuned2"]
        merge(bases / "source", tuned, bases / "target", out=tmp_path / out, how="dare", null_trials=0, seed=4)
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


def test_maps_can_be_given(bases: Path) -> None:
    maps = port(bases / "source", bases / "tuned1", bases / "target", null_trials=0).maps
    given, found = (run(bases, ["tuned1", "tuned2"], maps=one) for one in (maps, None))
    assert all(torch.equal(given[name], one) for name, one in found.items())


def test_one_head_comes_along(bases: Path) -> None:
    found = run(bases, ["tuned1", "head4"])
    alone = port(bases / "source", bases / "head4", bases / "target", null_trials=0).state_dict()
    assert torch.equal(found["classifier.weight"], alone["classifier.weight"])
    both = run(bases, ["head4", "tuned1"])
    assert all(torch.allclose(both[name], one, rtol=0, atol=1e-12) for name, one in found.items())
    body = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(found[body], alone[body])


def test_equal_heads_agree(bases: Path, tmp_path: Path) -> None:
    other = read(bases / "head4")
    for name, one in other.items():
        if not name.startswith("classifier"):
            other[name] = one + 0.01
    model = BertForSequenceClassification.from_pretrained(bases / "head4", state_dict=None, dtype=torch.float64)
    model.load_state_dict(other, strict=False)
    tiny.save(model, tmp_path / "twin")
    found = merge(bases / "source", [bases / "head4", tmp_path / "twin"], bases / "target", null_trials=0)
    alone = port(bases / "source", bases / "head4", bases / "target", null_trials=0)
    assert torch.equal(found.tensor("classifier.weight"), alone.tensor("classifier.weight"))


@pytest.mark.parametrize("names", [["head4", "head5"], ["head4", "head6"], ["tuned1", "head6", "head4"]])
def test_different_heads_are_refused(bases: Path, names: list[str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"different heads .'classifier"):
        run(bases, names, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tuned", ["tuned1", Path("tuned1"), iter(["tuned1"])], ids=["text", "path", "iterator"])
def test_one_fine_tune_is_no_list(bases: Path, tuned: object) -> None:
    with pytest.raises(InputError, match="a list of fine-tunes is needed"):
        merge(bases / "source", tuned, bases / "target")  # pyright: ignore[reportArgumentType]
