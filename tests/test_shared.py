"""Whether units are shared at all: p-values against enumeration, and on pairs whose relation is known."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import CLIPModel

from tiny import State, clip, planted, save, state_of, vit
from transfuse import Maps, inspect_models
from transfuse.cli.common import app
from transfuse.evidence.null import stored_null
from transfuse.evidence.shared import SMALLEST, SharedUnits, by_chance, shared_units
from transfuse.evidence.weights import WeightEvidence, weight_evidence
from transfuse.maps.algebra import Map
from transfuse.matching.ascent import CoordinateAscent
from transfuse.methods.match import match_models
from transfuse.methods.table import get_method
from transfuse.models.opening import open_models
from transfuse.options.groups import Check
from transfuse.running.reference import ReferenceConfig, random_state
from transfuse.spaces.layout import Layout

SMALL = ReferenceConfig(vocab=9, tokens=3, width=8, num_heads=2, hidden=12, layers=2)


def drawn(seed: int, config: ReferenceConfig = SMALL) -> State:
    return random_state(config, torch.Generator().manual_seed(seed))


@cache
def layout_of(config: ReferenceConfig) -> Layout:
    state = drawn(0, config)
    return open_models(state, state, config=config.as_dict()).layout.with_ties()


def evidence_of(source: State, target: State, config: ReferenceConfig = SMALL) -> WeightEvidence:
    layout = layout_of(config)
    names = [name for name in source if layout.params[name].spaces]
    return WeightEvidence(layout, source.__getitem__, target.__getitem__, names)


def no_maps(evidence: WeightEvidence) -> Mapping[str, Map]:
    return {}


def tied(evidence: WeightEvidence) -> Mapping[str, Map]:
    return CoordinateAscent().solve(evidence).maps


def shared(source: State, target: State, config: ReferenceConfig = SMALL, solve=tied) -> SharedUnits:
    return shared_units(evidence_of(source, target, config), solve)["model"]


def relabelled(state: State, orders: list[torch.Tensor], parts: tuple[str, ...] = ("fc1", "fc2")) -> State:
    """The state with the hidden units of every layer's MLP in another order: the same function, if both parts are."""
    state = dict(state)
    for layer, order in enumerate(orders):
        at = f"layers.{layer}."
        if "fc1" in parts:
            state |= {name: state[name][order] for name in (f"{at}fc1.weight", f"{at}fc1.bias")}
        if "fc2" in parts:
            state[f"{at}fc2.weight"] = state[f"{at}fc2.weight"][:, order]
    return state


def orders(seed: int, config: ReferenceConfig = SMALL) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(config.hidden, generator=generator) for _ in range(config.layers)]


def noisy(state: State, noise: float, seed: int) -> State:
    generator = torch.Generator().manual_seed(seed)
    drawn = {n: torch.randn(t.shape, dtype=t.dtype, generator=generator) for n, t in state.items()}
    return {name: t + noise * t.std() * drawn[name] for name, t in state.items()}


# --- the distribution -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1,), (2,), (5,), (3, 4), (2, 3, 3)])
def test_chance_is_enumeration(sizes: tuple[int, ...]) -> None:
    kept = [[sum(i == j for i, j in enumerate(p)) for p in itertools.permutations(range(n))] for n in sizes]
    sums = [sum(one) for one in itertools.product(*kept)]
    for count in range(sum(sizes) + 2):
        share = sum(one >= count for one in sums) / len(sums)
        assert by_chance(sizes, count) == pytest.approx(max(share, SMALLEST), rel=1e-12)


def test_chance_far_out() -> None:
    assert by_chance([100], 100) == pytest.approx(1 / math.factorial(100))
    assert by_chance([128] * 4, 512) == by_chance([3072] * 12, 3072) == SMALLEST
    # Many units a layer: Poisson with one a layer.
    poisson = 1 - sum(math.exp(-12) * 12**k / math.factorial(k) for k in range(20))
    assert by_chance([3072] * 12, 20) == pytest.approx(poisson, rel=1e-9)


def test_numbers_are_exact_over_all_numberings() -> None:
    """The condition of the first p-value: any numbering of target's units as likely. Of two layers of 3 all 36."""
    config = ReferenceConfig(vocab=5, tokens=2, width=4, num_heads=1, hidden=3, layers=2)
    source, target = drawn(0, config), drawn(1, config)
    each = [torch.tensor(p) for p in itertools.permutations(range(3))]
    found = [shared(source, relabelled(target, list(pair)), config, no_maps) for pair in itertools.product(each, each)]
    for one in found:
        share = sum(other.numbered >= one.numbered for other in found) / len(found)
        assert one.p_numbered == pytest.approx(share, rel=1e-12)
    assert len({one.paired for one in found}) == 1, "numbers do not matter to it"


def test_nothing_in_common() -> None:
    """200 pairs of random bases: both counts are as by chance, and p-values below 0.1 as rare as they have to be."""
    found = [shared(drawn(2 * i), drawn(2 * i + 1), solve=tied if i % 10 == 0 else no_maps) for i in range(200)]
    sizes = [SMALL.hidden] * SMALL.layers
    expected = max(by_chance(sizes, k) for k in range(10) if by_chance(sizes, k) <= 0.1)
    for what in ("numbered", "paired"):
        counts = [getattr(one, what) for one in found]
        # 2 a pair, each layer with a variance of 1: five standard deviations.
        assert abs(sum(counts) / 200 - 2) < 5 * math.sqrt(2 / 200)
        rare = sum(getattr(one, f"p_{what}") <= 0.1 for one in found)
        spread = 4 * math.sqrt(200 * expected * (1 - expected))
        assert abs(rare - 200 * expected) < spread, (rare, 200 * expected)
        assert all(getattr(one, f"p_{what}") == by_chance(sizes, getattr(one, what)) for one in found)


# --- pairs whose relation is known ------------------------------------------------------------------------------------


def test_trained_on() -> None:
    found = shared(drawn(0), noisy(drawn(0), 0.3, 1))
    assert found.units == 24 and found.layers == 2
    assert found.p_numbered < 1e-9 and found.p_paired < 1e-9


def test_re_ordered() -> None:
    """Units with other numbers: the numbers say nothing, reading and writing do, in any order of all spaces."""
    source = vit(seed=0, hidden_size=32, intermediate_size=32)
    target, _ = planted(source, 1, noise=0.3)
    models = open_models(state_of(source), state_of(target), config=source.config.to_dict())
    found = shared_units(weight_evidence(models, models.layout.with_ties(), "cpu"), tied)["model"]
    assert found.p_numbered > 0.01 and found.paired > 50 and found.p_paired < 1e-50


def test_numbers_of_both() -> None:
    """Hidden units of both bases in one new order, and of each in an order of its own."""
    source, target = drawn(0), noisy(drawn(0), 2.0, 1)
    found = shared(source, target)
    assert 2 < found.paired < found.numbered < 24
    assert found == shared(relabelled(source, orders(5)), relabelled(target, orders(5)))
    apart = shared(relabelled(source, orders(5)), relabelled(target, orders(6)))
    assert apart.paired == found.paired and apart.p_numbered > 0.01 > found.p_numbered


def test_pairs_are_of_one_unit() -> None:
    """What target's units write goes to other units: they are matched by either end, but not alike."""
    source = drawn(0)
    broken = relabelled(noisy(source, 0.1, 1), orders(3), parts=("fc2",))
    assert shared(source, broken).p_paired > 0.01 > shared(source, relabelled(source, orders(3))).p_paired


def test_stream_is_mapped_without_the_mlps() -> None:
    seen: list[set[str]] = []

    def solve(evidence: WeightEvidence) -> Mapping[str, Map]:
        seen.append(set(evidence.names))
        return {}

    evidence = evidence_of(drawn(0), drawn(1))
    shared_units(evidence, solve)
    mlps = {f"layers.{layer}.{name}" for layer in range(2) for name in ("fc1.weight", "fc1.bias", "fc2.weight")}
    assert seen == [set(evidence.names) - mlps] and mlps < set(evidence.names)


def test_units_that_are_zero_are_not_shared() -> None:
    """Equal matches are decided by lot: an assignment alone would take them in the order of their numbers."""
    config = ReferenceConfig(width=8, num_heads=2, hidden=40, layers=1)
    empty = {name: torch.zeros_like(x) if "fc" in name else x for name, x in drawn(0, config).items()}
    found = shared(empty, empty, config)
    assert found.p_numbered > 0.001 and found.p_paired > 0.001


def test_size_is_no_match() -> None:
    """Units that are large at both ends in both bases: random directions, so nothing is shared."""

    def stretched(state: State) -> State:
        sizes = torch.logspace(-2, 2, config.hidden, dtype=torch.float64)
        return {
            n: x * (sizes if "fc2.weight" in n else sizes[:, None]) if n.endswith(ends) else x for n, x in state.items()
        }

    config, ends = ReferenceConfig(hidden=60, layers=3), ("fc1.weight", "fc2.weight")
    source, target = stretched(drawn(0, config)), stretched(drawn(1, config))
    for name in [name for name in source if name.endswith("fc1.bias")]:
        source[name], target[name] = torch.zeros(60).double(), torch.zeros(60).double()
    found = shared(source, target, config)
    assert found.p_numbered > 0.01 and found.p_paired > 0.01


def test_by_tower() -> None:
    """Two towers, one of them shared."""
    source = state_of(clip(CLIPModel, seed=0))
    target = {n: t for n, t in state_of(clip(CLIPModel, seed=1)).items()}
    target |= {name: t for name, t in source.items() if name.startswith("text_model.")}
    models = open_models(source, target, config=clip(CLIPModel).config.to_dict())
    null = stored_null(match_models(models, get_method("tied"), check=Check(null_trials=1)))
    assert null is not None and null["text"].shared is not None and null["vision"].shared is not None
    text, vision = null["text"].shared, null["vision"].shared
    assert text.numbered == text.paired == text.units == 48 and text.p_numbered < 1e-40
    assert vision.p_numbered > 0.01 and vision.p_paired > 0.01


def test_no_mlps() -> None:
    evidence = evidence_of(drawn(0), drawn(1))
    assert shared_units(evidence.only(n for n in evidence.names if "fc" not in n), no_maps) == {}
    assert shared_units(evidence.only(n for n in evidence.names if "fc2" not in n), no_maps) == {}


# --- where it is kept and shown ---------------------------------------------------------------------------------------


def test_kept_with_maps(tmp_path: Path) -> None:
    models = open_models(drawn(0), drawn(1), config=SMALL.as_dict())
    maps = match_models(models, get_method("tied"), check=Check(null_trials=1))
    maps.save(tmp_path / "maps.safetensors")
    loaded = stored_null(Maps.load(tmp_path / "maps.safetensors"))
    assert loaded is not None and isinstance(loaded["model"].shared, SharedUnits)
    assert loaded == stored_null(maps)
    del maps.report["null"]["model"]["shared"]  # as in files that were made before
    old = stored_null(maps)
    assert old is not None and old["model"].shared is None and old["model"].excess == loaded["model"].excess


def test_shown(tmp_path: Path) -> None:
    source = vit(seed=0)
    places = [save(source, tmp_path / "source"), save(planted(source, 1, noise=0.1)[0], tmp_path / "target")]
    relation = inspect_models(places[0], target=places[1])["relation"]
    found = SharedUnits(**relation["null"]["model"]["shared"])
    assert Counter(asdict(found)) == Counter(relation["null"]["model"]["shared"])
    text = CliRunner().invoke(app, ["inspect", str(places[0]), "--target", str(places[1])]).stdout
    said = f"{found.paired} alike by what they read and by what they write (p {found.p_paired:.2g}); by chance 2"
    assert said in text and f"of 48 units of MLPs {found.numbered} are matched to the one of their number" in text
