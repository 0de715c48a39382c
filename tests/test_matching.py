"""Matching: the paper's algorithm against a plain loop, what every climb promises, what noise leaves of a map."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertForMaskedLM

from plain_transfusion import plain_transfusion
from tiny import State, add_noise, bert, planted, state_of, vit
from transfuse import Maps, match, port
from transfuse.errors import InputError
from transfuse.evidence.null import stored_null
from transfuse.evidence.relation import relation
from transfuse.evidence.weights import WeightEvidence, weight_evidence
from transfuse.maps.algebra import Map, PerHead, Permutation
from transfuse.maps.random import random_maps
from transfuse.maps.transport import transport
from transfuse.matching.ascent import Climb, CoordinateAscent
from transfuse.matching.heads import identity_heads, joint_heads, spectral_heads
from transfuse.methods.match import match_models
from transfuse.methods.table import get_method
from transfuse.models.opening import open_models
from transfuse.options.groups import Check
from transfuse.porting.verify import reference_error
from transfuse.running.reference import ReferenceConfig, forward, random_state
from transfuse.running.skips import skips_of

CONFIG = ReferenceConfig()
SMALL = ReferenceConfig(width=16, hidden=20, layers=2)


def reference(seed: int, config: ReferenceConfig = CONFIG) -> State:
    return random_state(config, torch.Generator().manual_seed(seed))


def planted_reference(
    state: State, seed: int, noise: float = 0.0, config: ReferenceConfig = CONFIG, **ties: Any
) -> tuple[State, dict[str, Map]]:
    """The state with its units in a random order, and the maps; `noise` in units of each tensor's deviation."""
    generator = torch.Generator().manual_seed(seed)
    layout = open_models(state, state, config=config.as_dict()).layout.with_ties(**ties)
    maps = random_maps(layout, generator)
    moved = {name: transport(tensor, layout.params[name], maps) for name, tensor in state.items()}
    for name, tensor in moved.items():
        drawn = torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator)
        moved[name] = tensor + noise * tensor.std() * drawn
    return moved, maps


def index(one: Map) -> list[int]:
    """A map as one list of indices."""
    flat = one.flat() if isinstance(one, PerHead) else one
    assert isinstance(flat, Permutation)
    return flat.index.tolist()


def recovered(found: Maps | dict[str, Map], truth: dict[str, Map]) -> float:
    """Share of the units of all spaces that are where they were planted."""
    pairs = [pair for space in truth for pair in zip(index(found_in(found, space)), index(truth[space]), strict=True)]
    return sum(one == other for one, other in pairs) / len(pairs)


def found_in(found: Maps | dict[str, Map], space: str) -> Map:
    one = found[space]
    assert one is not None
    return one


def evidence_of(source: State, target: State, config: dict[str, Any], **ties: Any) -> WeightEvidence:
    models = open_models(source, target, config=config)
    return weight_evidence(models, models.layout.with_ties(**ties), "cpu")


# --- the paper's algorithm --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "width"), [(2, 16), (3, 24)])
@pytest.mark.parametrize("noise", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("paper_form", [False, True])
def test_transfusion_is_the_plain_loop(layers: int, width: int, noise: float | None, paper_form: bool) -> None:
    source = vit(seed=3, num_hidden_layers=layers, hidden_size=width)
    # None: an independent model, whose best permutations are all nearly as good as others, but never tied.
    target = vit(seed=4, num_hidden_layers=layers, hidden_size=width) if noise is None else planted(source, 5, noise)[0]
    one, other = state_of(source), state_of(target)
    found = match(one, other, method="transfusion", paper_form=paper_form, config=source.config.to_dict())
    expected = plain_transfusion(arrays(one), arrays(other), layers=layers, heads=4, paper_form=paper_form)
    assert {space.split("/")[0] for space in found.spaces} == expected.index.keys()
    for space, map_ in found.spaces.items():
        assert index(map_) == expected.index[space.split("/")[0]], space
    assert [order["order"] for order in found.report["heads"].values()] == expected.heads
    assert found.report["objective"] == pytest.approx(expected.objective, rel=1e-12)


def arrays(state: State) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in state.items()}


def test_one_inner_map_of_the_paper_or_two() -> None:
    source, target = reference(0, SMALL), reference(1, SMALL)
    tied, split = (match(source, target, tie_qkv=tie, config=SMALL.as_dict()) for tie in (True, False))
    assert {s for s in tied.spaces if "/" in s} == {"heads.0/head.0", "heads.1/head.1"} and tied.tie_qkv
    assert {s for s in split.spaces if "/" in s} == {"heads.0/qk.0", "heads.0/vo.0", "heads.1/qk.1", "heads.1/vo.1"}
    for layer in "01":  # q and k may differ from v and o inside a head, but never in which head is which
        pair = [found_in(split, f"heads.{layer}/{space}.{layer}") for space in ("qk", "vo")]
        assert isinstance(pair[0], PerHead) and isinstance(pair[1], PerHead)
        assert pair[0].heads.index.tolist() == pair[1].heads.index.tolist() and index(pair[0]) != index(pair[1])
    assert match(source, target, config=SMALL.as_dict()).tie_qkv is False
    assert match(source, target, method="transfusion", config=SMALL.as_dict()).tie_qkv is True


# --- heads ------------------------------------------------------------------------------------------------------------


def test_spectra_do_not_see_permutations() -> None:
    state = reference(0)
    target, maps = planted_reference(state, 1, streams="junction", tie_qkv=True)
    ties = {"streams": "junction", "tie_qkv": True}
    one, other = (
        evidence_of(state, state, CONFIG.as_dict(), **ties),
        evidence_of(state, target, CONFIG.as_dict(), **ties),
    )
    for output in (False, True):
        before, after = (evidence.spectra("heads.1/head.1", output=output)[0] for evidence in (one, other))
        assert len(before) == (4 if output else 3)
        planted_map = maps["heads.1/head.1"]
        assert isinstance(planted_map, PerHead)
        for plain, moved in zip(before, after, strict=True):
            assert plain.shape == (CONFIG.num_heads, CONFIG.width // CONFIG.num_heads)
            torch.testing.assert_close(moved, plain[planted_map.heads.index], rtol=1e-10, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 6), width=st.integers(1, 4))
def test_spectral_heads_find_planted_heads(seed: int, count: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    spectra = [torch.rand(count, width, dtype=torch.float64, generator=generator) for _ in range(3)]
    order = torch.randperm(count, generator=generator)
    assert spectral_heads([one[order] for one in spectra], spectra).tolist() == order.tolist()


def test_spectra_of_the_output_projection_change_the_start_only() -> None:
    """Heads differ in their output projection alone, so only spectra with it can tell them apart at the start."""
    state = reference(0, SMALL)
    for name in "qkv":  # every head's block is the first one: the paper's spectra are all the same
        weight = state[f"layers.0.{name}.weight"]
        state[f"layers.0.{name}.weight"] = weight[: len(weight) // SMALL.num_heads].repeat(SMALL.num_heads, 1)
    target, truth = planted_reference(state, 2, config=SMALL, tie_qkv=True)
    evidence = evidence_of(state, target, SMALL.as_dict(), tie_qkv=True)
    heads = truth["heads.0/head.0"]
    assert isinstance(heads, PerHead)
    start = {}
    for output in (True, False):
        climb = Climb(evidence, CoordinateAscent(start="identity", paper_form=not output))
        climb.set_start(climb.groups())
        start[output] = climb.spectral["heads.0"].tolist()
    assert start[True] == heads.heads.index.tolist() != start[False]
    found = {output: match(state, target, paper_form=not output, config=SMALL.as_dict()) for output in (True, False)}
    assert found[True].report["heads"]["heads.0"]["spectral"] == start[True]
    assert found[False].report["heads"]["heads.0"]["spectral"] == start[False]
    for one in found.values():  # the exact step finds the heads from either start
        assert one.report["heads"]["heads.0"]["order"] == start[True]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), spaces=st.integers(1, 2))
def test_joint_heads_are_the_best_of_all(seed: int, spaces: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {f"s{i}": torch.randn(9, 9, dtype=torch.float64, generator=generator) for i in range(spaces)}
    found = joint_heads(scores, 3)
    value = sum(float(score[range(9), index(found[space])].sum()) for space, score in scores.items())
    assert value == pytest.approx(max(exhaustive(scores)), rel=1e-12)
    assert len({tuple(one.heads.index.tolist()) for one in found.values()}) == 1


def exhaustive(scores: dict[str, Tensor]) -> list[float]:
    """The value of every head permutation, each with the best of all inner permutations, 3 heads of 3 units."""
    inner = list(itertools.permutations(range(3)))

    def best_inside(block: Tensor) -> float:
        return max(float(block[range(3), list(order)].sum()) for order in inner)

    return [
        sum(best_inside(s[3 * i : 3 * i + 3, 3 * j : 3 * j + 3]) for s in scores.values() for i, j in enumerate(order))
        for order in itertools.permutations(range(3))
    ]


def test_identity_heads() -> None:
    assert identity_heads(3, 2).is_identity
    assert index(identity_heads(3, 2, torch.tensor([2, 0, 1]))) == [4, 5, 0, 1, 2, 3]


# --- what every climb promises ----------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    seeds=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    norm_first=st.booleans(),
    noise=st.sampled_from([None, 2.0]),
)
@pytest.mark.parametrize("method", ["tied", "transfusion"])
def test_the_objective_never_falls(method: str, seeds: tuple[int, int], norm_first: bool, noise: float | None) -> None:
    config = replace(SMALL, norm_first=norm_first)
    source = reference(seeds[0], config)
    target = reference(seeds[1], config) if noise is None else planted_reference(source, seeds[1], noise, config)[0]
    found = match(source, target, method=method, config=config.as_dict())
    assert_climbs(found)


def assert_climbs(found: Maps) -> None:
    objective = found.report["objective"]
    assert found.report["converged"] and len(objective) == found.report["sweeps"] + 1
    assert all(after >= before - 1e-9 * abs(before) for before, after in itertools.pairwise(objective))
    assert objective[-1] == pytest.approx(objective[-2], rel=1e-9)  # the last sweep found nothing to improve


@pytest.mark.parametrize("method", ["tied", "transfusion"])
def test_the_objective_never_falls_where_a_tensor_holds_the_stream_twice(method: str) -> None:
    """The dense layer of BERT's language-model head maps the stream to the embeddings, which are the stream."""
    for seed in range(8):
        source, target = (bert(BertForMaskedLM, seed=s) for s in (seed, seed + 50))
        for model in (source, target):  # heavy enough to decide, so that a step by its linear part alone would go down
            with torch.no_grad():
                model.cls.predictions.transform.dense.weight.mul_(8)
        evidence = evidence_of(state_of(source), state_of(target), source.config.to_dict())
        assert evidence.holds_twice("cls.predictions.transform.dense.weight", "stream")
        found = match(state_of(source), state_of(target), method=method, config=source.config.to_dict())
        assert_climbs(found)
        # What is reported is the objective of the maps that are given out.
        ties = {"streams": found.streams, "tie_qkv": found.tie_qkv}
        evidence = evidence_of(state_of(source), state_of(target), source.config.to_dict(), **ties)
        assert evidence.value(found.spaces) == pytest.approx(found.report["objective"][-1], rel=1e-12)


def test_a_tensor_that_holds_the_stream_twice_is_recovered() -> None:
    source = bert(BertForMaskedLM)
    target, truth = planted(source, 1, noise=0.5)
    found = match(state_of(source), state_of(target), config=source.config.to_dict())
    assert recovered(found, truth) == 1


@pytest.mark.parametrize("method", ["tied", "transfusion"])
def test_same_inputs_give_the_same_bytes(tmp_path: Path, method: str) -> None:
    source, target = reference(0, SMALL), reference(1, SMALL)
    paths = [tmp_path / "one", tmp_path / "other"]
    for number, path in enumerate(paths):
        torch.manual_seed(number)  # the global generator must not matter
        before = torch.get_rng_state()
        match(source, target, method=method, config=SMALL.as_dict(), restarts=2, seed=7).save(path)
        assert torch.equal(torch.get_rng_state(), before)  # nor be touched
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_restart_sweeps_in_another_order_every_time() -> None:
    evidence = evidence_of(reference(0), reference(1), CONFIG.as_dict())
    first = Climb(evidence, CoordinateAscent())
    groups = first.groups()
    expected = ["stream", "heads.0", "mlp.0", "heads.1", "mlp.1", "heads.2", "mlp.2"]
    assert [group[0].split("/")[0] for group in groups] == expected  # the order of the forward pass
    assert first.shuffled(groups) == groups
    orders = []
    for seed in (1, 1, 2):
        climb = Climb(evidence, CoordinateAscent(), torch.Generator().manual_seed(seed))
        orders.append([climb.shuffled(groups) for _ in range(3)])
    assert orders[0] == orders[1] != orders[2]
    for order in orders[0]:
        assert sorted(order) == sorted(groups) and order != groups and orders[0].count(order) == 1


def test_a_restart_keeps_part_of_the_best_maps() -> None:
    evidence = evidence_of(reference(0), reference(1), CONFIG.as_dict())
    best = Climb(evidence, CoordinateAscent()).run()
    shares = []
    for seed in range(20):
        climb = Climb(evidence, CoordinateAscent(heads="in-order"), torch.Generator().manual_seed(seed), best)
        assert climb.generator is not None
        climb.set_restart(climb.groups(), climb.generator)
        assert climb.maps.keys() == best.keys()
        for name, one in climb.maps.items():  # where heads are never matched, they are not shuffled either
            if isinstance(one, PerHead) and isinstance(old := best[name], PerHead):
                assert one.heads.index.tolist() == old.heads.index.tolist()
        shares.append(sum(climb.maps[name] is best[name] for name in best) / len(best))
    assert 0.5 < sum(shares) / len(shares) < 0.85 and min(shares) < 0.5


@pytest.mark.parametrize(("method", "noise"), [("transfusion", 1.0), ("orthogonal", 2.0), ("tied", None)])
def test_restarts_find_more_where_the_first_climb_gets_stuck(method: str, noise: float | None) -> None:
    """On planted targets near the noise at which a method loses its way (None: an independent target)."""
    gains = []
    for seed in range(6):
        source = reference(seed, SMALL)
        planted_one = planted_reference(source, seed + 1, noise or 0.0, SMALL)[0]
        target = planted_one if noise else reference(seed + 50, SMALL)
        before, after = (
            match(source, target, method=method, config=SMALL.as_dict(), null_trials=0, restarts=n).report["objective"]
            for n in (0, 4)
        )
        gains.append(after[-1] / before[-1] - 1)
    assert min(gains) >= 0 and sum(gain > 1e-3 for gain in gains) >= 3 and max(gains) > 0.01, gains


@pytest.mark.parametrize("method", ["tied", "transfusion"])
def test_restarts_never_give_less(method: str) -> None:
    for seed in range(3):
        source, target = reference(seed, SMALL), reference(seed + 10, SMALL)
        values = [
            match(source, target, method=method, config=SMALL.as_dict(), restarts=n).report["objective"][-1]
            for n in (0, 1, 4)
        ]
        assert values == sorted(values)


def test_max_sweeps() -> None:
    found = match(reference(0), reference(1), config=CONFIG.as_dict(), method="transfusion", max_sweeps=1)
    assert found.report["sweeps"] == 1 and not found.report["converged"]


def test_methods_without_maps() -> None:
    for method in ("naive", "random"):
        assert match(reference(0), reference(1), method=method, config=CONFIG.as_dict()).spaces == {}
    with pytest.raises(InputError, match=r"unknown method 'nave'; near: naive$"):
        match(reference(0), reference(1), method="nave", config=CONFIG.as_dict())
    with pytest.raises(InputError, match=r"unknown method 'x'; known: naive, random, git-rebasin, .*, auto$"):
        match(reference(0), reference(1), method="x", config=CONFIG.as_dict())


# --- recovery ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_tied_recovers_everything_from_noise(seed: int, noise: float) -> None:
    source = reference(seed)
    target, truth = planted_reference(source, seed + 10, noise)
    found = match(source, target, config=CONFIG.as_dict())
    assert recovered(found, truth) == 1 and found.spaces.keys() == truth.keys()
    assert not found.report["identity_is_as_good"]
    assert found.report["similarity_matched"] > found.report["similarity_identity"]


@pytest.mark.parametrize("seed", range(3))
def test_transfusion_recovers_a_map_at_every_junction(seed: int) -> None:
    source = reference(seed)
    target, truth = planted_reference(source, seed + 10, streams="junction", tie_qkv=True)
    found = match(source, target, method="transfusion", config=CONFIG.as_dict())
    assert found.spaces.keys() == truth.keys() == {
        *(f"stream.{j}" for j in range(7)), *(f"heads.{n}/head.{n}" for n in range(3)), *(f"mlp.{n}" for n in range(3))
    }  # fmt: skip
    assert recovered(found, truth) == 1
    assert found.report["similarity_matched"] == pytest.approx(1)


@pytest.mark.parametrize("seed", range(2))
def test_the_anchored_start_is_what_finds_it(seed: int) -> None:
    source = reference(seed)
    target, truth = planted_reference(source, seed + 10, noise=1.5)
    evidence = evidence_of(source, target, CONFIG.as_dict())
    climbs = {start: Climb(evidence, CoordinateAscent(start=start)) for start in ("identity", "anchored")}
    shares = {start: recovered(climb.run(), truth) for start, climb in climbs.items()}
    assert shares["anchored"] == 1 and shares["identity"] < 0.5
    assert climbs["anchored"].objective[-1] > 1.5 * climbs["identity"].objective[-1]


def test_recovery_in_a_real_class() -> None:
    source = vit(seed=0)
    target, truth = planted(source, 1, noise=0.5)
    assert recovered(match(state_of(source), state_of(target), config=source.config.to_dict()), truth) == 1


# --- the form with a map at every junction ----------------------------------------------------------------------------


@pytest.mark.parametrize("norm_first", [True, False])
def test_maps_at_every_junction_need_permuted_skips(norm_first: bool) -> None:
    config = replace(CONFIG, norm_first=norm_first)
    state = reference(0, config)
    moved, truth = planted_reference(state, 1, config=config, streams="junction", tie_qkv=True)
    ids = torch.randint(0, config.vocab, (4, config.tokens), generator=torch.Generator().manual_seed(2))
    expected = forward(config, state, ids)
    exact = forward(config, moved, ids, skips_of(truth))
    broken = forward(config, moved, ids)
    scale = expected.abs().max()
    assert (expected - exact).abs().max() / scale < 1e-12
    assert (expected - broken).abs().max() / scale > 1e-3
    maps = Maps(truth, family="reference", streams="junction", tie_qkv=True)
    assert reference_error(config, maps) < 1e-12


def test_one_stream_needs_none() -> None:
    state = reference(0)
    moved, truth = planted_reference(state, 1)
    ids = torch.arange(CONFIG.tokens)[None]
    torch.testing.assert_close(forward(CONFIG, moved, ids), forward(CONFIG, state, ids), rtol=1e-12, atol=1e-12)
    assert reference_error(CONFIG, Maps(truth, family="reference")) < 1e-12


# --- is there anything to match ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tied", "transfusion"])
@pytest.mark.parametrize(
    ("pair", "verdict"),
    [("planted", "related-coordinates"), ("independent", "no-correspondence"), ("continued", "same-lineage")],
)
def test_null_test(method: str, pair: str, verdict: str) -> None:
    source = vit(seed=0, hidden_size=32, intermediate_size=32)
    if pair == "independent":
        target = vit(seed=1, hidden_size=32, intermediate_size=32)
    else:
        target = (
            planted(source, 1, noise=0.3)[0] if pair == "planted" else vit(seed=0, hidden_size=32, intermediate_size=32)
        )
        add_noise(target, 0.1 if pair == "continued" else 0.0, 2)
    row, check = get_method(method), Check(null_trials=2)
    models = open_models(state_of(source), state_of(target), config=source.config.to_dict())
    maps = match_models(models, row, check=check)
    null = stored_null(maps)
    assert null is not None
    found = relation(models, maps, null)
    assert found.verdict == verdict
    assert null.keys() == found.towers.keys() == {"model"} and found.towers["model"] == verdict
    one = null["model"]
    assert len(one.entries) == len(one.orders) == 2
    assert (one.verdict == "no-correspondence") == (pair == "independent")
    assert found.cosines["model"] == one.identity and (one.identity > 0.9) == (pair == "continued")
    assert null == stored_null(match_models(models, row, check=check))  # its shuffles are seeded


def test_null_test_of_one_trial_has_a_spread() -> None:
    """One shuffled target has no spread of its own, and NaN is not JSON."""
    models = open_models(reference(0, SMALL), reference(1, SMALL), config=SMALL.as_dict())
    found = stored_null(match_models(models, get_method("tied"), check=Check(null_trials=1)))
    assert found is not None
    null = found["model"]
    assert null.z == pytest.approx((null.matched - max(null.entries[0], null.orders[0])) / 0.005)


def wide_queries(seed: int, order: torch.Tensor | None = None) -> State:
    """A BERT whose queries and keys are wider (24) than its values (16); with an order, in that order inside heads."""
    state = {**state_of(bert(seed=seed))}
    generator = torch.Generator().manual_seed(seed)
    for layer, leaf in ((layer, leaf) for layer in range(2) for leaf in ("query", "key")):
        name = f"encoder.layer.{layer}.attention.self.{leaf}"
        state[f"{name}.weight"] = torch.randn(24, 16, dtype=torch.float64, generator=generator)
        state[f"{name}.bias"] = torch.randn(24, dtype=torch.float64, generator=generator)
        if order is not None:
            state |= {one: state[one][order] for one in (f"{name}.weight", f"{name}.bias")}
    return state


@pytest.mark.parametrize("method", ["transfusion", "brute-force", "git-rebasin"])
def test_q_and_k_of_another_width_than_v(method: str, caplog: pytest.LogCaptureFixture):
    """They cannot share the map of v: both are found, each of its own size, and that is said."""
    order = torch.cat([torch.tensor([2, 0, 1, 5, 4, 3]) + 6 * head for head in range(4)])
    source, target, config = wide_queries(0), wide_queries(0, order), bert().config.to_dict()
    maps = match(source, target, method=method, config=config, null_trials=0)
    assert maps.tie_qkv and maps.report["split_heads"] == ["heads.0/head.0", "heads.1/head.1"]
    assert "heads.0 (24 and 16), heads.1 (24 and 16)" in caplog.text
    for layer in range(2):
        qk, vo = (maps[f"heads.{layer}/{part}.{layer}"] for part in ("qk", "vo"))
        assert qk is not None and vo is not None and (qk.size, vo.size) == (24, 16)
        assert torch.equal(qk.matrix(), torch.eye(24, dtype=torch.float64)[order]) and vo.is_identity
    tuned = {name: 1.01 * one for name, one in source.items()}
    result = port(source, tuned, target, maps=maps, config=config, verify=False, null_trials=0)
    for name, one in result.state_dict().items():
        torch.testing.assert_close(one, 1.01 * target[name])
