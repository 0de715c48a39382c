"""Every row of the methods table: what it keeps, what it finds, what it breaks; OT against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel

import transfuse
from families import CASES, Case
from test_matching import CONFIG, planted_reference, reference
from tiny import Model, add_noise, clip, fine_tuned, state_of, vit
from transfuse import Maps
from transfuse.errors import InputError
from transfuse.files.opening import open_checkpoint
from transfuse.maps.algebra import Coupling, Map, Orthogonal, PerHead, Permutation
from transfuse.maps.random import ones_complement, random_maps
from transfuse.maps.transport import transport
from transfuse.matching.couplings import ACCURACY, REGULARISATION
from transfuse.matching.procrustes import best_rotation
from transfuse.methods.table import METHODS, get_method
from transfuse.models.folding import map_state, norm_folding, rotatable_layout
from transfuse.models.model import Models
from transfuse.models.opening import open_models
from transfuse.models.plan import make_plan
from transfuse.options.groups import Inputs, Match, Run
from transfuse.porting.planted import PLANTED_MAPS, plant
from transfuse.porting.verify import check_equivalence
from transfuse.spaces.axes import parse_axes
from transfuse.spaces.layout import Layout
from transfuse.update.ported import transported

EXACT = 1e-9
ROTATED = [case for case in CASES if case.family in ("vit", "deit", "dinov2", "siglip", "clip", "t5", "reference")]


def tuned_vit() -> Model:
    """A fine-tune of `vit(0)`."""
    model = vit(0)
    add_noise(model, 0.05, 1)
    return model


def rotation_layout(models: Models) -> Layout:
    return rotatable_layout(models.layout.with_ties(), norm_folding(models.layout, [models.source]))


@pytest.mark.parametrize("case", ROTATED, ids=lambda case: case.name)
def test_folded_models_may_be_rotated(case: Case, tmp_path: Path):
    case.source.save(tmp_path / "source", 0)
    models = open_models(tmp_path / "source", tmp_path / "source")
    layout = rotation_layout(models)
    maps = random_maps(layout, torch.Generator().manual_seed(1), group="rotation")
    found = check_equivalence(models.source, models.layout, Maps(maps, norms="folded"), double=True)
    assert found.error is not None and found.error < EXACT, found
    kept = check_equivalence(models.source, models.layout, Maps(maps), double=True)
    rotated = any(space.group == "rotation" for space in layout.spaces.values())
    assert kept.error is not None and (kept.error > 1e-3) == rotated, "without folding a rotated stream is broken"
    facts = models.layout.facts
    # CLIP's vision tower has a norm on the embeddings; T5's decoder and encoder have one table between them.
    foldable = "decoder" not in facts and (case.family != "clip" or "text" in facts)
    assert rotated == (foldable and any(one["norm"] == "pre" for one in facts.values()))


def test_a_norm_on_the_embeddings_rules_rotations_out_unless_its_gains_are_equal():
    model = clip(CLIPModel, 0)
    state = state_of(model)
    config = model.config.to_dict() | {"architectures": ["CLIPModel"]}
    plain = open_models(state, state, config=config)
    assert norm_folding(plain.layout, [plain.source]).rotatable == {"text.stream"}
    state = dict(state)
    state["vision_model.pre_layrnorm.weight"] = torch.full_like(state["vision_model.pre_layrnorm.weight"], 0.7)
    state["vision_model.pre_layrnorm.bias"] = torch.zeros_like(state["vision_model.pre_layrnorm.bias"])
    even = open_models(state, state, config=config)
    folding = norm_folding(even.layout, [even.source])
    assert folding.rotatable == {"text.stream", "vision.stream"}
    maps = random_maps(rotation_layout(even), torch.Generator().manual_seed(1), group="rotation")
    found = check_equivalence(even.source, even.layout, Maps(maps, norms="folded"), double=True)
    assert found.error is not None and found.error < EXACT, found


def test_a_zero_gain_cannot_be_folded():
    state = {**reference(0)}
    state["layers.0.norm1.weight"] = state["layers.0.norm1.weight"].clone()
    state["layers.0.norm1.weight"][3] = 0
    with pytest.raises(InputError, match=r"'layers.0.norm1.weight' of source .* gain of exactly zero"):
        transfuse.match(state, reference(1), method="orthogonal", config=CONFIG.as_dict())


def test_best_rotation_against_random_ones():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(7, 7, dtype=torch.float64, generator=generator)
    for keep_ones in (False, True):
        best = best_rotation(scores, keep_ones=keep_ones)
        torch.testing.assert_close(best @ best.T, torch.eye(7, dtype=torch.float64))
        if keep_ones:
            torch.testing.assert_close(best.sum(1), torch.ones(7, dtype=torch.float64))
        for _ in range(300):
            size = 6 if keep_ones else 7
            other = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
            if keep_ones:
                basis = ones_complement(7)
                other = 1 / 7 + basis @ other @ basis.T
            assert (scores * best).sum() >= (scores * other).sum()


def test_directions_without_evidence_stay():
    scores = torch.zeros(5, 5)
    scores[0, 0] = 1.0
    torch.testing.assert_close(best_rotation(scores), torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("group", ["permutation", "rotation"])
def test_a_planted_truth_is_found_and_the_port_is_the_tuned_model(group: str, tmp_path: Path):
    source = vit(0)
    source.save_pretrained(tmp_path / "source")
    tuned_vit().save_pretrained(tmp_path / "tuned")
    plant(tmp_path / "source", tmp_path / "target", group=group, seed=3)
    truth = Maps.load(tmp_path / "target" / PLANTED_MAPS)
    pixels = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def logits(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            return type(source).from_pretrained(folder, dtype=torch.float64).eval()(pixel_values=pixels).logits

    torch.testing.assert_close(logits(tmp_path / "target"), logits(tmp_path / "source"), rtol=0, atol=1e-9)
    expected = logits(tmp_path / "tuned")
    assert (expected - logits(tmp_path / "source")).abs().max() > 1e-2

    def port(name: str, **options: object) -> torch.Tensor:
        places = (tmp_path / one for one in ("source", "tuned", "target"))
        result = transfuse.port(*places, out=tmp_path / name, double=True, null_trials=0, **options)  # type: ignore[arg-type]
        if name in ("orthogonal", "oracle"):
            assert result.report["equivalence"]["passed"]
        return (logits(tmp_path / name) - expected).abs().max()

    assert port("oracle", maps=tmp_path / "target" / PLANTED_MAPS) < 1e-9
    found = transfuse.match(tmp_path / "source", tmp_path / "target", method="orthogonal", null_trials=0)
    for name, one in found.spaces.items():  # the truth may have one order where the method looks for two
        planted = truth.spaces.get(name) or truth.spaces[name.replace("/qk.", "/head.").replace("/vo.", "/head.")]
        torch.testing.assert_close(one.matrix(), planted.matrix(), rtol=0, atol=1e-6)
    assert port("orthogonal", method="orthogonal") < 1e-9
    assert (port("tied", method="tied") < 1e-9) == (group == "permutation")
    assert (port("transfusion", method="transfusion") < 1e-9) == (group == "permutation")


def test_the_output_keeps_the_norms_of_target(tmp_path: Path):
    for name, seed in (("source", 0), ("target", 1)):
        vit(seed).save_pretrained(tmp_path / name)
    tuned_vit().save_pretrained(tmp_path / "tuned")
    places = [tmp_path / one for one in ("source", "tuned", "target")]
    result = transfuse.port(*places, method="orthogonal", null_trials=0)
    target = open_checkpoint(tmp_path / "target")
    name = next(one for one in target if one.endswith("layer.0.layernorm_before.weight"))
    assert torch.equal(result.tensor(name), target.tensor(name))
    still = transfuse.port(*places, method="orthogonal", null_trials=0, alpha=0.0, maps=result.maps)
    for one, tensor in still.state_dict().items():
        assert torch.equal(tensor, target.tensor(one)), one


@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.finds_maps])
def test_each_row_keeps_the_function_or_is_seen_to_break_it(name: str, tmp_path: Path):
    for one, seed in (("source", 0), ("target", 1)):
        vit(seed).save_pretrained(tmp_path / one)
    tuned_vit().save_pretrained(tmp_path / "tuned")
    places = [tmp_path / one for one in ("source", "tuned", "target")]
    inputs = Inputs("synthetic", count=24) if METHODS[name].needs_inputs else None
    options = {"double": True, "null_trials": 0, "inputs": inputs}
    result = transfuse.port(*places, method=name, out=tmp_path / "out", **options)  # type: ignore[arg-type]
    found = result.report["equivalence"]
    if not METHODS[name].gives_mapped_source:
        assert found is None and not METHODS[name].exact, "there is no mapped source"
    else:
        assert found["checked"] == "ViTForImageClassification"
        assert (found["error"] < EXACT) == METHODS[name].exact == found["passed"], found
    assert result.report["exportable"] == METHODS[name].exportable
    loaded = Maps.load(_saved(result.maps, tmp_path / "maps.safetensors"))
    again = transfuse.port(*places, maps=loaded, **options)  # type: ignore[arg-type]
    for key, tensor in result.state_dict().items():
        assert torch.equal(again.tensor(key), tensor), key


def _saved(maps: Maps, path: Path) -> Path:
    maps.save(path)
    return path


def test_ablations_differ_in_what_their_rows_say():
    source, (target, truth) = reference(0), planted_reference(reference(0), 1, streams="junction", tie_qkv=True)
    found = {}
    for name in ("transfusion", "brute-force", "no-attention-alignment", "no-residual", "git-rebasin"):
        found[name] = transfuse.match(source, target, method=name, config=CONFIG.as_dict(), null_trials=0)
    heads = [space for space, one in truth.items() if isinstance(one, PerHead)]
    for space in heads:
        same = [torch.equal(one.spaces[space].matrix(), truth[space].matrix()) for one in found.values()]
        assert same[:2] == [True, True] and same[3], space
        in_order = found["no-attention-alignment"].spaces[space]
        assert isinstance(in_order, PerHead) and in_order.heads.is_identity
        assert not isinstance(found["git-rebasin"].spaces[space], PerHead), "all units of all heads in one set"
    for space, one in found["no-residual"].spaces.items():
        assert torch.equal(one.matrix(), found["transfusion"].spaces[space].matrix()), "only the skips differ"


def test_couplings_against_a_plain_pass_in_numpy():
    """Imfeld et al. 2024 for the first spaces of the forward pass, written out with matrices."""
    ot = pytest.importorskip("ot")
    source, target = reference(0), reference(1)
    models = open_models(source, target, config=CONFIG.as_dict())
    row = get_method("ot")
    evidence = row.evidence.gather(models, row.form, None, Run())
    found = row.solver.solve(evidence, row.form, Match(), Run()).maps
    a, b = ({k: v.numpy() for k, v in state.items()} for state in (source, target))

    def coupling(rows_b: list[np.ndarray], rows_a: list[np.ndarray]) -> np.ndarray:
        pairs = zip(rows_b, rows_a, strict=True)
        cost = np.sum([((y[:, None, :] - x[None, :, :]) ** 2).sum(-1) for y, x in pairs], axis=0)
        mass = np.full(len(cost), 1 / len(cost))
        return len(cost) * ot.sinkhorn(
            mass, mass, cost / cost.max(), REGULARISATION, method="sinkhorn_log", stopThr=ACCURACY
        )

    def columns(state: dict[str, np.ndarray], *names: str) -> list[np.ndarray]:
        return [state[n].T if state[n].ndim > 1 and not n.startswith("layers") else _rows(state[n]) for n in names]

    def _rows(x: np.ndarray) -> np.ndarray:
        return x[:, None] if x.ndim == 1 else x

    first = ("position", "layers.0.norm1.weight", "layers.0.norm1.bias")
    # The vocabulary is shared, so the embedding table's columns count as well.
    stream = coupling(columns(b, "embed.weight", *first), columns(a, "embed.weight", *first))
    np.testing.assert_allclose(found["stream.0"].matrix().numpy(), stream, atol=1e-9)
    heads = {}
    for space, names in (("qk", "qk"), ("vo", "v")):
        rows_b = [x for n in names for x in (b[f"layers.0.{n}.weight"], _rows(b[f"layers.0.{n}.bias"]))]
        rows_a = [x for n in names for x in (a[f"layers.0.{n}.weight"] @ stream.T, _rows(a[f"layers.0.{n}.bias"]))]
        heads[space] = coupling(rows_b, rows_a)
        np.testing.assert_allclose(found[f"heads.0/{space}.0"].matrix().numpy(), heads[space], atol=1e-9)
    names = ("layers.0.o.bias", "layers.0.norm2.weight", "layers.0.norm2.bias")
    branch = coupling(
        [b["layers.0.o.weight"], *(_rows(b[n]) for n in names)],
        [a["layers.0.o.weight"] @ heads["vo"].T, *(_rows(a[n]) for n in names)],
    )
    np.testing.assert_allclose(found["stream.1"].matrix().numpy(), (branch + stream) / 2, atol=1e-9)
    moved = transport(source["layers.0.o.weight"], models.layout.params["layers.0.o.weight"], found)
    np.testing.assert_allclose(moved.numpy(), (branch + stream) / 2 @ a["layers.0.o.weight"] @ heads["vo"].T, atol=1e-9)


def test_exact_transport_of_equal_models_is_the_identity():
    found = transfuse.match(reference(0), reference(0), method="ot-hard", config=CONFIG.as_dict(), null_trials=0)
    for space, one in found.spaces.items():
        assert isinstance(one, Coupling)
        torch.testing.assert_close(one.matrix(), torch.eye(one.size, dtype=torch.float64), msg=space)


def test_orthogonal_finds_nothing_to_move_in_a_release_that_only_drifted():
    source = reference(0)
    drift = torch.Generator().manual_seed(9)
    target = {n: t + 0.01 * t.std() * torch.randn(t.shape, dtype=t.dtype, generator=drift) for n, t in source.items()}
    found = transfuse.match(source, target, method="orthogonal", config=CONFIG.as_dict(), null_trials=0)
    for one in found.spaces.values():
        assert isinstance(one, Orthogonal | PerHead) or one.is_identity
        torch.testing.assert_close(one.matrix(), torch.eye(one.size, dtype=torch.float64), rtol=0, atol=0.05)


def test_maps_of_every_kind_survive_a_file(tmp_path: Path):
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator))[0]
    soft = torch.full((6, 6), 1 / 6, dtype=torch.float64)
    maps = Maps({"a": Orthogonal(rotation), "b": Coupling(soft)}, norms="folded")
    back = Maps.load(_saved(maps, tmp_path / "m.safetensors"))
    assert back.norms == "folded" and back.spaces["a"].kind == "orthogonal" and back.spaces["b"].kind == "coupling"
    for name, one in maps.spaces.items():
        assert torch.equal(back.spaces[name].matrix(), one.matrix())
    with pytest.raises(InputError, match="not orthogonal"):
        Maps.load(_saved(Maps({"a": Orthogonal(2 * rotation)}), tmp_path / "bad.safetensors"))
    with pytest.raises(InputError, match="do not sum to one"):
        Maps.load(_saved(Maps({"b": Coupling(2 * soft)}), tmp_path / "worse.safetensors"))


@pytest.mark.parametrize("order", ["_ | stream.{last}", "stream.{last} | _"])
def test_a_head_that_reads_more_than_the_stream(order: str):
    """Three further features beside the stream, before or behind it; a norm with two gains of them before its own."""
    own = slice(3, None) if order.startswith("_") else slice(0, -3)
    states = [state_of(one) for one in (vit(0), tuned_vit(), vit(1))]
    generator = torch.Generator().manual_seed(5)
    for state in states:
        state["classifier.weight"] = torch.randn(7, 19, dtype=torch.float64, generator=generator)
        for leaf in ("weight", "bias"):
            others = torch.randn(2, dtype=torch.float64, generator=generator)
            state[f"vit.layernorm.{leaf}"] = torch.cat([others, state[f"vit.layernorm.{leaf}"]])
    states[1]["classifier.weight"] = states[0]["classifier.weight"] + 0.1 * states[1]["classifier.weight"]
    axes = {"classifier.weight": f"_ <- {order}"}
    axes |= {f"layernorm.{leaf}": "_ | stream.{last} as norm" for leaf in ("weight", "bias")}
    config = vit(0).config.to_dict() | {"axes": axes}
    options: dict = {"method": "orthogonal", "config": config, "verify": False, "null_trials": 0}
    result = transfuse.port(*states, **options)
    turn = result.maps["stream"]
    assert isinstance(turn, Orthogonal) and not turn.is_identity

    gains = [torch.ones(19, dtype=torch.float64) for _ in states]
    for gain, state in zip(gains, states, strict=True):
        gain[own] = state["vit.layernorm.weight"][2:]
    moves = torch.eye(19, dtype=torch.float64)
    moves[own, own] = turn.weight.double()
    source, tuned, target = (state["classifier.weight"] * gain for state, gain in zip(states, gains, strict=True))
    wanted = (target + (tuned - source) @ moves.T) / gains[2]
    torch.testing.assert_close(result.tensor("classifier.weight"), wanted)


def test_parts_without_a_map_are_told_apart_or_refused():
    x = torch.arange(7.0)
    maps: dict[str, Map] = {"b": Permutation(torch.tensor([1, 0]))}
    for text, wanted in (("_ | a | b", [0, 1, 2, 3, 4, 6, 5]), ("b | _ | a", [1, 0, 2, 3, 4, 5, 6])):
        assert transport(x, parse_axes(text), maps).tolist() == wanted
    assert transport(torch.arange(8.0), parse_axes("a | b | a"), maps).tolist() == [0, 1, 2, 4, 3, 5, 6, 7]
    with pytest.raises(InputError, match=r"no map says how long the parts \['_', 'a'\] of an axis are"):
        transport(x, parse_axes("_ | b | a"), maps)


UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # rounding once is off by no more than this share


@pytest.mark.parametrize("norms", ["kept", "folded"])
@pytest.mark.parametrize("dtype", UNIT)
def test_a_carried_head_is_rounded_once(dtype: torch.dtype, norms: str):
    three = vit(0), fine_tuned(vit(0), type(vit(0)), num_labels=3), vit(1)
    states = [{name: one.to(dtype) for name, one in state_of(model).items()} for model in three]
    models = open_models(states[0], states[2], states[1], config=vit(0).config.to_dict())
    turn = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    maps = Maps({"stream": Orthogonal(turn)}, norms=norms)
    found = transported(models, make_plan(models), maps).read("classifier.weight")
    _, tuned, target = ({name: one.double() for name, one in state.items()} for state in states)
    gains = [one["vit.layernorm.weight"] if norms == "folded" else 1.0 for one in (tuned, target)]
    wanted = tuned["classifier.weight"] * gains[0] @ turn.T / gains[1]
    assert found.dtype == dtype and ((found.double() - wanted).abs() <= 1.01 * UNIT[dtype] * wanted.abs() + 1e-6).all()


@pytest.mark.parametrize("dtype", UNIT)
def test_a_mapped_tensor_is_rounded_once(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 12, generator=generator).to(dtype)
    turns = [torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator))[0] for _ in range(2)]
    maps: dict[str, Map] = {name: Orthogonal(turn) for name, turn in zip("ab", turns, strict=True)}
    found, wanted = transport(x, parse_axes("a <- b"), maps), turns[0] @ x.double() @ turns[1].T
    assert found.dtype == dtype and ((found.double() - wanted).abs() <= 1.01 * UNIT[dtype] * wanted.abs() + 1e-6).all()
    state = state_of(vit(0))
    models = open_models(state, state, config=vit(0).config.to_dict())
    layout = models.layout.with_ties()
    spaces = random_maps(rotation_layout(models), generator, group="rotation")
    folding = norm_folding(models.layout, [models.source])
    exact, rounded = (map_state(models.source, layout, spaces, one, folding) for one in (torch.float64, dtype))
    for name, one in rounded.items():
        small = 1e-6 if dtype == torch.bfloat16 else 1e-4  # below float16's normal numbers steps are even
        assert one.dtype == dtype
        assert ((one.double() - exact[name]).abs() <= 1.01 * UNIT[dtype] * exact[name].abs() + small).all(), name
