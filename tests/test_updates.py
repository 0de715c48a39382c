"""The algebra of updates: every kind against plain tensors, low rank against the dense contraction with every map."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertForSequenceClassification

import tiny
from transfuse import InputError, Maps, port
from transfuse.maps.algebra import Coupling, Identity, Map, Orthogonal, PerHead, Permutation, Rectangular
from transfuse.maps.algebra import Dense as AnyMatrix
from transfuse.maps.transport import transport
from transfuse.models.opening import open_models
from transfuse.models.plan import make_plan
from transfuse.porting.output import write_port
from transfuse.porting.run import PortResult
from transfuse.spaces.axes import parse_axes
from transfuse.update.low_rank import Factors, LowRank
from transfuse.update.merging import Mean, Ties, merge_deltas, merged
from transfuse.update.objects import Dense, Masked, Noise, Scaled, Sum, Update, dense
from transfuse.update.ported import Ported, transported, without_embeddings
from transfuse.update.transported import Fitted, Without

SHAPES = {"a.weight": (6, 4), "b.weight": (3, 8), "kernel": (5, 3, 2, 2)}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tensors(seed: int) -> dict[str, Tensor]:
    return {name: draw(*shape, seed=seed + i) for i, (name, shape) in enumerate(SHAPES.items())}


def low_rank(seed: int, rank: int = 2, scale: float = 0.5) -> LowRank:
    return LowRank(
        {
            name: Factors(draw(shape[0], rank, seed=seed), draw(rank, *shape[1:], seed=seed + 1), scale)
            for name, shape in SHAPES.items()
        }
    )


def same(found: Update, expected: Mapping[str, Tensor]) -> None:
    assert list(found.names) == list(expected)
    for name, one in expected.items():
        torch.testing.assert_close(found.of(name), one, rtol=0, atol=1e-12, msg=name)


# --- the algebra ------------------------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[int], Update]] = {
    "dense": lambda seed: Dense(tensors(seed)),
    "low rank": low_rank,
    "scaled": lambda seed: Scaled(Dense(tensors(seed)), 0.3),
    "masked": lambda seed: Masked(Dense(tensors(seed)), {"a.weight": draw(6, 4) > 0, "kernel": draw(5, 3, 2, 2)}),
    "sum": lambda seed: Dense(tensors(seed)) + low_rank(seed),
    "noise": lambda seed: Noise(Dense(tensors(seed)), seed),
    "mean": lambda seed: merged([Dense(tensors(seed)), low_rank(seed)], how="mean"),
    "ties": lambda seed: merged([Dense(tensors(seed)), low_rank(seed)], how="ties", density=0.4),
    "dare": lambda seed: merged([Dense(tensors(seed)), low_rank(seed)], how="dare", density=0.4, seed=seed),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
def test_every_kind_can_be_scaled(kind: str) -> None:
    update = KINDS[kind](1)
    same(update.scaled(-0.7), {name: -0.7 * update.of(name) for name in update.names})
    by = {"a.weight": 2.0, "b.weight": 0.0, "kernel": -1.0}
    same(update.scaled(by), {name: by[name] * update.of(name) for name in update.names})


@every_kind
@pytest.mark.parametrize("other", KINDS)
def test_any_two_can_be_added(kind: str, other: str) -> None:
    one, two = KINDS[kind](1), KINDS[other](11)
    same(one + two, {name: one.of(name) + two.of(name) for name in one.names})


@every_kind
@pytest.mark.parametrize("how", ["sum", "mean", "ties", "dare"])
def test_any_kind_can_be_merged(kind: str, how: str) -> None:
    updates = [KINDS[kind](seed) for seed in (1, 11, 21)]
    expected = merge_deltas([dense(one).tensors for one in updates], how=how, seed=3)
    same(merged(updates, how=how, seed=3), expected)


@every_kind
def test_every_kind_survives_pickling(kind: str) -> None:
    update = KINDS[kind](1)
    same(pickle.loads(pickle.dumps(update)), dense(update).tensors)


def test_masks() -> None:
    x = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    update = Masked(
        Dense({"kept": x, "weighed": x, "whole": x}),
        {"kept": torch.tensor([[True, False], [False, True]]), "weighed": torch.tensor([[0.5, 1.0], [0.0, -1.0]])},
    )
    assert update.of("kept").tolist() == [[1, 0], [0, -4]]
    assert update.of("weighed").tolist() == [[0.5, -2], [0, 4]]
    assert torch.equal(update.of("whole"), x)


def test_noise_has_the_norms_and_a_seed() -> None:
    like = Dense(tensors(1))
    one, again, other = Noise(like, 1), Noise(like, 1), Noise(like, 2)
    for name in like.names:
        assert torch.equal(one.of(name), again.of(name)) and not torch.equal(one.of(name), other.of(name))
        assert float(one.of(name).norm()) == pytest.approx(float(like.of(name).norm()), rel=1e-12)
        assert one.of(name).dtype == like.of(name).dtype


def test_who_lacks_a_tensor_has_no_say_in_it() -> None:
    one, two = Dense({"x": torch.ones(2)}), Dense({"x": torch.ones(2) * 3, "y": torch.ones(2)})
    assert list((one + two).names) == ["x", "y"]
    assert (one + two).of("y").tolist() == [1, 1]
    assert Mean((one, two)).of("x").tolist() == [2, 2] and Mean((one, two)).of("y").tolist() == [1, 1]
    assert Ties((one, two), 1.0).of("y").tolist() == [1, 1]


class Asked(Update):
    """Says which tensors were asked for."""

    def __init__(self, update: Update):
        self.update, self.seen = update, list[str]()

    @property
    def names(self) -> list[str]:
        return list(self.update.names)

    def of(self, name: str) -> Tensor:
        self.seen.append(name)
        return self.update.of(name)


def test_nothing_is_made_before_it_is_asked_for() -> None:
    asked = Asked(Dense(tensors(0)))
    whole = merged([Noise(Masked(asked.scaled(0.5), {}), 0) + asked, asked], how="ties")
    assert list(whole.names) == list(SHAPES) and not asked.seen
    whole.of("b.weight")
    assert asked.seen == ["b.weight"] * 3
    assert list(dense(asked).tensors) == list(SHAPES) and asked.seen[3:] == list(SHAPES)


# --- low rank ---------------------------------------------------------------------------------------------------------


def test_low_rank_stays_low_rank() -> None:
    one, two = low_rank(1), low_rank(11, rank=3, scale=-2.0)
    scaled, both = one.scaled(0.1), one + two
    assert isinstance(scaled, LowRank) and isinstance(both, LowRank) and isinstance(one + Dense(tensors(0)), Sum)
    assert {f.rank for f in scaled.factors.values()} == {2} and {f.rank for f in both.factors.values()} == {5}
    assert all(f.left is one.factors[name].left for name, f in scaled.factors.items()), "no product was made"


def test_a_sum_of_low_ranks_of_other_tensors() -> None:
    one, two = LowRank({"x": low_rank(1).factors["a.weight"]}), LowRank({"y": low_rank(1).factors["b.weight"]})
    same(one + two, {"x": one.of("x"), "y": two.of("y")})


def test_narrow_factors_make_a_wide_tensor() -> None:
    left, right = (draw(4, 2).to(torch.bfloat16), draw(2, 3).to(torch.bfloat16))
    found = LowRank({"x": Factors(left, right)}).of("x")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, left.float() @ right.float())


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(size, size, seed=seed))[0]


def per_head(inner: Callable[[int, int], Map], heads: int, width: int) -> PerHead:
    order = Permutation(torch.randperm(heads, generator=torch.Generator().manual_seed(3)))
    return PerHead(order, tuple(inner(width, seed) for seed in range(heads)))


def shuffled(size: int, seed: int = 5) -> Permutation:
    return Permutation(torch.randperm(size, generator=torch.Generator().manual_seed(seed)))


def matrix(size: int, seed: int = 6) -> AnyMatrix:
    return AnyMatrix(torch.eye(size, dtype=torch.float64) * 2 + 0.3 * draw(size, size, seed=seed))


MAPS: dict[str, Callable[[int], Map]] = {
    "identity": Identity,
    "permutation": shuffled,
    "dense": matrix,
    "orthogonal": lambda size: Orthogonal(orthogonal(size, 7)),
    "coupling": lambda size: Coupling(0.9 * shuffled(size).matrix() + 0.1 / size),
    "wider": lambda size: Rectangular(draw(size + 3, size, seed=8)),
    "narrower": lambda size: Rectangular(draw(size - 2, size, seed=8)),
    "heads in order": lambda size: per_head(lambda width, _: Identity(width), 2, size // 2),
    "heads of permutations": lambda size: per_head(shuffled, 2, size // 2),
    "heads of matrices": lambda size: per_head(matrix, 2, size // 2),
    "heads of rotations": lambda size: per_head(lambda width, seed: Orthogonal(orthogonal(width, seed)), 2, size // 2),
}

# A tensor's axes and its shape; spaces have six units, or eight.
AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "linear": ("six <- eight", (6, 8)),
    "stored (in, out)": ("eight -> six", (8, 6)),
    "one space at both ends": ("eight <- eight", (8, 8)),
    "fused q, k, v": ("six | six* | eight <- eight", (20, 8)),
    "a part that nobody moves": ("_ | six <- eight", (11, 8)),
    "fused inputs": ("eight <- six | _", (8, 10)),
    "classifier": ("_ <- eight", (3, 8)),
    "table of tokens": ("_, eight", (30, 8)),
    "table of positions": ("_, _, eight", (1, 7, 8)),
    "patches": ("eight, _, _, _", (8, 3, 2, 2)),
    "convolution": ("six <- eight, _, _", (6, 8, 3, 3)),
    "unknown": ("-", (6, 8)),
}


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("kind", MAPS)
def test_factors_are_carried_like_their_product(kind: str, axes: str) -> None:
    expression, shape = AXES[axes]
    known, maps = {"x": parse_axes(expression)}, {"six": MAPS[kind](6), "eight": MAPS[kind](8)}
    update = LowRank({"x": Factors(draw(shape[0], 2, seed=1), draw(2, *shape[1:], seed=2), 0.7)})
    for given in (maps, {"six": maps["six"]}, {"eight": maps["eight"]}, {}):
        found = update.mapped(given, known)
        assert found.factors["x"].rank == 2
        expected = transport(update.of("x"), known["x"], given)
        torch.testing.assert_close(found.of("x"), expected, rtol=0, atol=1e-11)
    both = (update + update.scaled(-3.0)).scaled(0.2)
    expected = transport(both.of("x"), known["x"], maps)
    torch.testing.assert_close(both.mapped(maps, known).of("x"), expected, rtol=0, atol=1e-11)  # type: ignore[attr-defined]


def test_a_map_moves_the_product() -> None:
    """The oracle beside `transport`: T_out B A T_in^-1, written out."""
    out, into = matrix(6), matrix(8)
    left, right = draw(6, 2, seed=1), draw(2, 8, seed=2)
    found = LowRank({"x": Factors(left, right)}).mapped({"six": out, "eight": into}, {"x": parse_axes("six <- eight")})
    torch.testing.assert_close(found.of("x"), out.weight @ left @ right @ torch.linalg.inv(into.weight))


@pytest.mark.parametrize(
    ("left", "right", "message"),
    [
        ((6, 2), (3, 4), r"factors of 'x' are \(6, 2\) and \(3, 4\).*transposed"),
        ((2,), (2, 4), r"\(2,\) and \(2, 4\).*a vector"),
        ((6, 2), (2,), r"\(6, 2\) and \(2,\).*a vector"),
    ],
)
def test_factors_that_do_not_fit(left: tuple[int, ...], right: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LowRank({"x": Factors(torch.zeros(left), torch.zeros(right))})


def test_factors_of_another_tensor() -> None:
    flat = LowRank({"x": Factors(torch.zeros(8, 2), torch.zeros(2, 12))})
    with pytest.raises(InputError, match=r"'x' make a tensor of 2 dimensions, the model's has 4.*flattened kernel"):
        flat.mapped({}, {"x": parse_axes("eight, _, _, _")})
    with pytest.raises(InputError, match="no tensor 'x'"):
        flat.mapped({}, {})


# --- on models --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A source, a classifier made of it, and a target."""
    folder, source = tmp_path_factory.mktemp("updates"), tiny.bert()
    tuned = tiny.fine_tuned(source, BertForSequenceClassification, num_labels=3)
    models = {"source": source, "tuned": tuned, "target": tiny.planted(source, 2, noise=0.05)[0]}
    return [tiny.save(model, folder / name) for name, model in models.items()]


@pytest.fixture
def ported(places: list[Path]) -> Ported:
    models = open_models(places[0], places[2], places[1])
    return transported(models, make_plan(models), Maps({}))


HELD: dict[str, Callable[[Ported], Update]] = {
    "transported": lambda ported: ported.update,
    "scaled": lambda ported: ported.update.scaled(0.3),
    "dense": lambda ported: dense(ported.update),
    "low rank": lambda ported: (
        LowRank(
            {
                name: Factors(draw(len(one), 2, seed=1), draw(2, *one.shape[1:], seed=2))
                for name, one in dense(ported.update).tensors.items()
                if one.ndim > 1
            }
        )
        + ported.update
    ),
    "masked": lambda ported: Masked(ported.update, {n: ported.update.of(n) > 0 for n in ported.update.names}),
    "merged": lambda ported: merged([ported.update, Noise(ported.update, 1)], how="ties", density=0.5),
    "fitted": lambda ported: Fitted(
        ported.models.target, {"encoder.layer.0.output.dense.weight": draw(16, 24)}, ported.update
    ),
    "without": lambda ported: without_embeddings(ported).update,
}


@pytest.mark.parametrize("kind", HELD)
def test_any_update_makes_an_output(kind: str, ported: Ported) -> None:
    update, target = HELD[kind](ported), ported.models.target
    whole = ported.with_update(update).at(0.5)
    held, state = whole.held(), whole.state()
    assert list(state) == list(whole.steps) and set(whole.carried.values()) == {"classifier.weight", "classifier.bias"}
    for out, one in state.items():
        assert torch.equal(one, whole.read(out)) and torch.equal(one, held.read(out)), out
        if out in whole.added:
            expected = target.tensor(whole.added[out]) + 0.5 * update.of(whole.added[out])
            torch.testing.assert_close(one, expected.to(one.dtype), rtol=0, atol=1e-12)
    assert whole.alpha == 0.5 and ported.alpha == 1.0 and not ported.lost, "values are new ones"


def test_an_alpha_for_each_tensor(ported: Ported) -> None:
    scales = {name: 0.1 * i for i, name in enumerate(ported.update.names)}
    for out, one in ported.at(0.3).at(scales).state().items():
        if out in ported.added:
            assert torch.equal(one, ported.at(scales[ported.added[out]]).read(out))
        else:
            assert torch.equal(one, ported.read(out))


@pytest.mark.parametrize("kind", ["low rank", "masked", "merged"])
def test_any_update_can_be_written(kind: str, places: list[Path], tmp_path: Path) -> None:
    result = port(*places, method="naive", null_trials=0, verify=False)
    tensors = result.tensors.with_update(HELD[kind](result.tensors))
    changed = PortResult(result.report, result.maps, None, tensors)
    write_port(changed, tmp_path / "out", verify=True, force=False, progress=False)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[out], one) for out, one in tensors.state().items())
    assert json.loads((tmp_path / "out" / "result.json").read_text())["loads"] == "BertForSequenceClassification"


def test_fitted_and_left_out(ported: Ported) -> None:
    name, other = "encoder.layer.0.output.dense.weight", "encoder.layer.1.output.dense.weight"
    target, wanted = ported.models.target, draw(16, 24)
    fitted = Fitted(target, {name: wanted, "classifier.bias": torch.ones(3)}, ported.update)
    whole = ported.fitted(fitted)
    out = {step.name: out for out, step in whole.steps.items()}
    torch.testing.assert_close(whole.read(out[name]), wanted.to(whole.read(out[name])))
    assert torch.equal(whole.read(out[other]), ported.read(out[other]))
    assert whole.read(out["classifier.bias"]).tolist() == [1, 1, 1], "a head that was fitted comes along"
    still = whole.with_update(Without(fitted, frozenset({name, other}), target))
    assert torch.equal(still.read(out[name]), target.tensor(name))
    assert torch.equal(still.read(out[other]), target.tensor(other))


def test_a_port_in_memory_is_read_no_more(ported: Ported) -> None:
    asked = Asked(ported.update)
    held = ported.with_update(asked).held()
    assert asked.seen == list(ported.update.names)
    states = [held.at(alpha).state() for alpha in (0.0, 0.5, 1.0)]
    assert asked.seen == list(ported.update.names) and len(states) == 3


def test_narrow_factors_are_added_without_rounding() -> None:
    one = Factors(draw(4, 2, seed=1).bfloat16(), draw(2, 5, seed=2).bfloat16(), 0.3)
    both = LowRank({"a": one}) + LowRank({"a": one})
    torch.testing.assert_close(both.of("a"), 2 * one.dense(), rtol=0, atol=1e-6)


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match=r"the mask of tensor 'a' is \(2,\), the tensor \(2, 2\)"):
        Masked(Dense({"a": torch.ones(2, 2)}), {"a": torch.ones(2, dtype=torch.bool)}).of("a")


def test_a_tensor_without_a_scale_of_its_own_is_not_scaled() -> None:
    found = Dense({"a": torch.ones(2), "b": torch.ones(2)}).scaled({"a": 0.5})
    assert found.of("a").tolist() == [0.5, 0.5] and found.of("b").tolist() == [1, 1]
