"""Transport by fitting, and distillation beside it: closed forms, plain numpy, and what must not change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertForSequenceClassification, CLIPModel, ViTForImageClassification
from transformers.pytorch_utils import Conv1D

import transfuse
from tiny import bert, clip, fine_tuned, save, vit
from tiny_data import prepared
from transfuse import InputError, PortResult
from transfuse.evidence.activations import collect, scores_of
from transfuse.maps.collection import Maps
from transfuse.maps.transport import transport
from transfuse.matching.by_space import best_maps
from transfuse.methods.match import match_models, open_inputs
from transfuse.methods.table import get_method
from transfuse.models.model import Models
from transfuse.models.opening import open_models
from transfuse.models.plan import make_plan
from transfuse.options.groups import Inputs
from transfuse.porting.merge import merge
from transfuse.porting.planted import PLANTED_MAPS, plant
from transfuse.running.given import Unlabelled
from transfuse.running.inputs import Prepared
from transfuse.running.live import load_live
from transfuse.running.probes import Probe
from transfuse.running.taps import find_sites
from transfuse.spaces.axes import parse_axes
from transfuse.spaces.layout import Layout, Space, is_linear
from transfuse.update.functional import FitOptions, Teachers, fit, fit_port, student_and_tuned
from transfuse.update.lessons import PLAIN, train_port
from transfuse.update.ported import Ported, transported, unchanged
from transfuse.update.regression import RIDGES, Fit, chosen_ridge
from transfuse.update.teachers import answers
from transfuse.update.training import Lesson, TrainOptions, train_on

DRAWN = Inputs("synthetic", count=48)


# --- one regression ---------------------------------------------------------------------------------------------------


def rows(count: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h (rows, 5), z (rows, 3), weights of the rows, and a prior."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (count, 5), (count, 3), (3, 5)
    h, z, prior = (torch.randn(size, dtype=torch.float64, generator=generator) for size in sizes)
    return h + 2, z - 1, torch.rand(count, dtype=torch.float64, generator=generator) + 0.5, prior


def fits(h: Tensor, z: Tensor, weights: Tensor, batch_size: int = 7) -> Fit:
    found = Fit()
    for parts in zip(h.split(batch_size), z.split(batch_size), weights.split(batch_size), strict=True):
        found.add(*parts)
    return found


def plain_ridge(h: Any, z: Any, weights: Any, prior: Any, ridge: float, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """The same problem as one tall system of equations, the pull as further rows."""
    h, z, share, prior = (np.asarray(one) for one in (h, z, weights / weights.sum(), prior))
    centre = share @ h if bias else 0
    pull = np.sqrt(ridge * np.mean(share @ (h - centre) ** 2))
    left = np.vstack([np.sqrt(share)[:, None] * np.c_[h, np.ones(len(h))], pull * np.eye(5, 6)])
    right = np.vstack([np.sqrt(share)[:, None] * z, pull * prior.T])
    found = np.linalg.lstsq(left if bias else left[:, :5], right, rcond=None)[0]
    return found[:5].T, found[5] if bias else np.zeros(3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7, 40])
def test_a_fit_is_a_ridge_regression(batch_size: int, bias: bool) -> None:
    h, z, weights, prior = rows()
    for ridge in (1e-3, 0.3, 5.0):
        weight, offset = fits(h, z, weights, batch_size).solve(prior, ridge, bias=bias)
        expected, expected_offset = plain_ridge(h, z, weights, prior, ridge, bias)
        np.testing.assert_allclose(weight, expected, atol=1e-12)
        assert (offset is None) == (not bias)
        np.testing.assert_allclose(0 if offset is None else offset, expected_offset, atol=1e-12)


def test_the_ends_of_the_ridge() -> None:
    h, z, weights, prior = rows(3)  # fewer rows than directions
    loose, _ = fits(h, z, weights).solve(prior, 0.0, bias=False)
    torch.testing.assert_close(h @ loose.T, z, rtol=0, atol=1e-6)
    free = torch.linalg.svd(h)[2][3:]  # where the inputs say nothing, the prior stays
    torch.testing.assert_close(loose @ free.T, prior @ free.T, rtol=0, atol=1e-5)
    tight, _ = fits(h, z, weights).solve(prior, 1e12, bias=False)
    torch.testing.assert_close(tight, prior, rtol=0, atol=1e-9)


def test_sums_of_two_halves_are_those_of_all() -> None:
    h, z, weights, prior = rows()
    whole = fits(h, z, weights).solve(prior, 0.1, bias=True)
    parts = (fits(h[::2], z[::2], weights[::2]) + fits(h[1::2], z[1::2], weights[1::2])).solve(prior, 0.1, bias=True)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("noise", [0.01, 1.0, 30.0])
def test_the_ridge_is_chosen_by_what_predicts_the_other_half(noise: float) -> None:
    h, z, weights, prior = rows(24, seed=4)
    z = h @ (prior + 0.3).T + noise * z
    halves = [(h[i::2], z[i::2], weights[i::2]) for i in range(2)]

    def error(ridge: float) -> float:
        total = 0.0
        for (h, z, w), (h2, z2, w2) in ((halves[0], halves[1]), (halves[1], halves[0])):
            missed = z2 - h2 @ torch.from_numpy(plain_ridge(h, z, w, prior, ridge, True)[0]).T
            missed = missed - (w2 @ missed) / w2.sum()  # a bias is there to take care of it
            total += float(w2 @ missed.square().sum(1) / w2.sum())
        return total

    found = chosen_ridge([fits(*one) for one in halves], prior, bias=True)
    assert found == min(RIDGES, key=error)


# --- a network whose transport is known -------------------------------------------------------------------------------

HIDDEN = 6


class Two(nn.Module):
    """Two linear layers with nothing between them."""

    def __init__(self, seed: int, transposed: bool):
        super().__init__()
        linear: Any = (lambda into, out: Conv1D(out, into)) if transposed else nn.Linear
        self.first, self.second = linear(8, HIDDEN), linear(HIDDEN, 3)
        generator = torch.Generator().manual_seed(seed)
        self.double()
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.second(self.first(pixel_values))


def two_layout(transposed: bool) -> Layout:
    axes = {"first": ("mlp.0 <- _", "_ -> mlp.0", "mlp.0"), "second": ("_ <- mlp.0", "mlp.0 -> _", "_")}
    params = {f"{name}.weight": parse_axes(texts[transposed]) for name, texts in axes.items()}
    params |= {f"{name}.bias": parse_axes(texts[2]) for name, texts in axes.items()}
    return Layout("", params, {"mlp.0": Space("mlp.0", HIDDEN, None, "permutation")})


def two_probe(module: Two, layout: Layout) -> Probe:
    names = {name: name for name in layout.params}
    return Probe(module, find_sites(module, layout, names), names)


def weights_of(module: Two, transposed: bool) -> tuple[Tensor, Tensor]:
    """W_1 and W_2 as (out, in)."""
    found = [one.weight.detach() for one in (module.first, module.second)]
    return (found[0].T, found[1].T) if transposed else (found[0], found[1])


@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("related", [True, False], ids=["rotated", "independent"])
def test_two_linear_layers(related: bool, transposed: bool) -> None:
    """Where the target is the source rotated inside, the transport is W_1 -> Q W_1, W_2 -> W_2 Q^T."""
    source, tuned, target = (Two(seed, transposed) for seed in (0, 1, 2))
    q = torch.linalg.qr(torch.randn(HIDDEN, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(9)))[0]
    if related:
        turned = (source.first, target.first, q, True), (source.second, target.second, q.T, False)
        for old, new, matrix, left in turned:
            plain = old.weight.data.T if transposed else old.weight.data
            moved = matrix @ plain if left else plain @ matrix
            new.weight.data = (moved.T if transposed else moved).contiguous()
        target.first.bias.data, target.second.bias.data = q @ source.first.bias.data, source.second.bias.data.clone()
    layout = two_layout(transposed)
    inputs = prepared({"pixel_values": torch.randn(50, 8, dtype=torch.float64)}, batch_size=7)
    first, second, last = (two_probe(one, layout) for one in (source, target, tuned))
    maps = Maps(best_maps(scores_of(collect(first, second, layout, inputs)), layout, "rotation"), streams="junction")
    student = Two(0, transposed)
    student.load_state_dict(target.state_dict())
    found = fit(
        two_probe(student, layout),
        Teachers(first, second, last, maps),
        layout,
        Unlabelled(inputs),
        FitOptions(ridge=1e-9),
    )
    assert found.keys() == layout.params.keys()
    assert all(torch.equal(student.get_parameter(name), one) for name, one in found.items())
    new = torch.randn(20, 8, dtype=torch.float64)
    torch.testing.assert_close(student(new), tuned(new), rtol=0, atol=1e-6)
    if related:
        old, moved = weights_of(tuned, transposed), weights_of(student, transposed)
        torch.testing.assert_close(moved[0], q @ old[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(moved[1], old[1] @ q.T, rtol=0, atol=1e-6)


# --- ports ------------------------------------------------------------------------------------------------------------


def class_of(result: PortResult | Path, kind: Any) -> Any:
    """The model in its class, float64."""
    if isinstance(result, Path):
        return kind.from_pretrained(result, dtype=torch.float64).eval()
    config = result.tensors.models.target.checkpoint.config
    built = kind.config_class.from_dict(config)
    return kind.from_pretrained(None, config=built, state_dict=result.state_dict(), dtype=torch.float64).eval()


def logits_of(result: PortResult | Path, inputs: Mapping[str, Tensor], kind: Any = ViTForImageClassification) -> Tensor:
    with torch.no_grad():
        return class_of(result, kind)(**inputs).logits


def opened_inputs(places: list[Path], given: Inputs = DRAWN) -> dict[str, Tensor]:
    """The inputs that a port goes by."""
    models = open_models(places[0], places[2], places[1])
    found = open_inputs(models, get_method("functional"), given).task
    assert found is not None
    return found.batch(torch.arange(len(found)))


def three_vits(folder: Path, target: str) -> list[Path]:
    source = vit(0)
    places = [save(source, folder / "source"), save(fine_tuned(source, size=0.3), folder / "tuned"), folder / "target"]
    if target == "same":
        save(source, places[2])
    elif target == "independent":
        save(vit(7), places[2])
    else:
        plant(places[0], places[2], group=target, seed=3, tie_qkv=False)
    return places


def fitted(places: list[Path], **options: Any) -> PortResult:
    return transfuse.port(*places, **{"method": "functional", "inputs": DRAWN, "null_trials": 0, **options})


def left_over(found: Tensor, tuned: Tensor, old: Tensor) -> float:
    """How much of the way from target to tuned is left."""
    return float((found - tuned).norm() / (old - tuned).norm())


def true_maps(places: list[Path]) -> Maps:
    """The planted truth in the form of the method: a map at every junction."""
    truth = Maps.load(places[2] / PLANTED_MAPS)
    models = open_models(places[0], places[2])
    spaces = models.layout.with_ties(streams="junction").spaces
    found = {name: truth[models.layout.tied_stream(name)] for name in spaces}
    known = {name: one for name, one in found.items() if one is not None}
    return replace(truth, spaces=known, method="functional", streams="junction", norms="kept")


@pytest.mark.parametrize("target", ["same", "permutation", "rotation"])
def test_bases_that_compute_the_same(target: str, tmp_path: Path) -> None:
    """With true maps the function is tuned's: whatever norms tuned has, the modules behind target's make up for them.

    From activations alone it comes near: what MLP units get has fewer directions than units, what they give has not.
    """
    places = three_vits(tmp_path, target)
    seen = opened_inputs(places)
    tuned, old = (logits_of(place, seen) for place in places[1:])
    assert (tuned - old).abs().max() > 0.3
    maps = {} if target == "same" else {"maps": true_maps(places)}
    exact = fitted(places, ridge=1e-9, **maps)
    torch.testing.assert_close(logits_of(exact, seen), tuned, rtol=0, atol=1e-5)
    new = {"pixel_values": torch.randn(9, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(8))}
    torch.testing.assert_close(logits_of(exact, new), logits_of(places[1], new), rtol=0, atol=1e-4)
    assert left_over(logits_of(fitted(places), seen), tuned, old) < 0.01


def test_weights_of_equal_bases_come_near_those_of_tuned(tmp_path: Path) -> None:
    """Norms and biases aside: without other norms the fit has the tuned weights to find."""
    source = vit(0)
    tuned = fine_tuned(source, size=0.3)
    for name, parameter in tuned.named_parameters():
        if "layernorm" in name:
            parameter.data.copy_(source.get_parameter(name))
    places = [save(one, tmp_path / name) for name, one in (("source", source), ("tuned", tuned), ("target", source))]
    result = fitted(places, ridge=1e-9)
    models = result.tensors.models
    assert models.tuned is not None
    for name in (name for name in models.target.disk if is_linear(name, models.layout.params[name])):
        old, new = models.target.tensor(name), models.tuned.tensor(name)
        missed = (old + result.tensors.update.of(name) - new).norm() / (old - new).norm()
        # Norms leave one direction empty, which stays as in target; behind an activation there is none.
        assert missed < (1e-4 if ".output.dense." in name and "attention" not in name else 0.5), name


def kl(found: Tensor, tuned: Tensor) -> float:
    """Of class probabilities, mean over inputs."""
    pairs = found.log_softmax(-1), tuned.log_softmax(-1)
    return float(functional.kl_div(*pairs, reduction="batchmean", log_target=True))


@pytest.fixture(scope="module")
def vits(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two independent bases and a fine-tune of the first."""
    return three_vits(tmp_path_factory.mktemp("vits"), "independent")


def test_independent_bases(vits: list[Path]) -> None:
    seen, new = opened_inputs(vits), opened_inputs(vits, replace(DRAWN, count=300))
    naive = transfuse.port(*vits, method="naive")
    result = fitted(vits, inputs=replace(DRAWN, count=150))
    for inputs in (seen, new):
        tuned = logits_of(vits[1], inputs)
        zero_shot, added, found = (kl(logits_of(one, inputs), tuned) for one in (vits[2], naive, result))
        assert found < 0.1 * min(zero_shot, added), (found, zero_shot, added)


def test_what_is_not_fitted_stays(vits: list[Path]) -> None:
    result = fitted(vits)
    models = result.tensors.models
    assert models.tuned is not None
    for name, step in ((step.name, step) for step in result.tensors.steps.values()):
        old, moved = models.target.tensor(name), result.tensor(step.out)
        if "layernorm" in name:
            assert torch.equal(moved, old), name
        elif name.startswith("embeddings."):
            tau = models.tuned.tensor(name) - models.source.tensor(name)
            axes = result.tensors.heads.passage.layout.params[name]
            torch.testing.assert_close(moved, old + transport(tau, axes, result.maps.spaces), rtol=0, atol=1e-12)
        else:
            assert not torch.equal(moved, old), name
    assert set(result.tensors.heads.passage.layout.params) == {step.name for step in result.tensors.steps.values()}


def test_the_same_inputs_give_the_same_bytes(vits: list[Path], tmp_path: Path) -> None:
    outs = [tmp_path / name for name in ("one", "two", "other")]
    for out, seed in zip(outs, (0, 0, 1), strict=True):
        fitted(vits, out=out, seed=seed)
    files = [(out / "model.safetensors").read_bytes() for out in outs]
    assert files[0] == files[1] != files[2], "the seed draws the inputs"
    assert (outs[0] / "result.json").read_bytes() == (outs[1] / "result.json").read_bytes()


@pytest.mark.parametrize("batch_size", [1, 5])
def test_batches_do_not_matter(vits: list[Path], batch_size: int) -> None:
    models = open_models(vits[0], vits[2], vits[1])
    row, drawn = get_method("functional"), opened_inputs(vits, replace(DRAWN, count=11))
    found = []
    for size in (64, batch_size):
        inputs = prepared(drawn, size)
        maps = match_models(models, row, inputs=inputs)
        start = transported(models, make_plan(models), maps)
        found.append(fit_port(start, Unlabelled(inputs), FitOptions()).tensors)
    for name, one in found[0].items():
        torch.testing.assert_close(found[1][name], one, rtol=0, atol=1e-5, msg=name)


def test_a_strong_pull_keeps_the_weights_of_target(vits: list[Path]) -> None:
    """Biases are not held back."""
    result = fitted(vits, ridge=1e9)
    models = result.tensors.models
    for name in (name for name in models.target.disk if is_linear(name, models.layout.params[name])):
        assert result.tensors.update.of(name).abs().max() < 1e-6, name


def test_alpha_scales_what_fitting_changed(vits: list[Path]) -> None:
    still, half, whole = (fitted(vits, alpha=alpha) for alpha in (0.0, 0.5, 1.0))
    target = still.tensors.models.target
    for name, one in still.state_dict().items():
        assert torch.equal(one, target.checkpoint.tensor(name))
        middle = (one + whole.tensor(name)) / 2
        torch.testing.assert_close(half.tensor(name), middle, rtol=0, atol=1e-12)
    held = whole.tensors.held()
    for name, one in held.at(0.5).state().items():
        torch.testing.assert_close(one, half.tensor(name), rtol=0, atol=1e-12)


def test_maps_can_be_used_again(vits: list[Path], tmp_path: Path) -> None:
    result = fitted(vits)
    result.maps.save(tmp_path / "maps.safetensors")
    given = {"maps": tmp_path / "maps.safetensors"}
    again = fitted(vits, **given)
    assert all(torch.equal(one, again.tensor(name)) for name, one in result.state_dict().items())
    with pytest.raises(InputError, match="method functional goes by activations: give unlabelled inputs"):
        fitted(vits, inputs=None, **given)


# --- heads that come along --------------------------------------------------------------------------------------------


def test_a_head_comes_along(tmp_path: Path) -> None:
    base = bert(seed=0)
    kind = BertForSequenceClassification
    tuned = fine_tuned(base, kind, size=0.3, num_labels=3)
    tuned.classifier.weight.data.mul_(4)
    models = {"source": base, "tuned": tuned, "target": bert(seed=5)}
    places = [save(model, tmp_path / name) for name, model in models.items()]
    out = tmp_path / "out"
    result = fitted(places, inputs=Inputs("synthetic", count=150), out=out)
    report = json.loads((out / "result.json").read_text())
    assert report["loads"] == "BertForSequenceClassification" and report["method"] == "functional"
    assert set(report["carried"]) == {"classifier.weight", "classifier.bias"}
    assert report["match"]["examples"] == 150 and report["match"]["alignment"].keys() == result.maps.spaces.keys()
    assert report["options"]["ridge"] is None and report["equivalence"] is None
    strict = kind(tuned.config).double()
    strict.load_state_dict(load_file(out / "model.safetensors"))
    seen = opened_inputs(places)
    assert (seen["attention_mask"] == 1).all()
    wanted = logits_of(places[1], seen, kind)
    with torch.no_grad():
        found = strict.eval()(**seen).logits
    torch.testing.assert_close(load_live(out, dtype=torch.float64).model(**seen).logits, found)
    carried = transfuse.port(*places, method="naive", null_trials=0, out=tmp_path / "naive")
    assert kl(found, wanted) < 0.1 * kl(logits_of(carried.out or out, seen, kind), wanted)
    assert not torch.equal(result.tensor("classifier.weight"), tuned.classifier.weight), "fitted too"


def test_a_merge_of_one_is_its_port(tmp_path: Path) -> None:
    base = bert(seed=0)
    tuned = fine_tuned(base, BertForSequenceClassification, num_labels=3)
    models = {"source": base, "tuned": tuned, "target": bert(seed=5)}
    places = [save(model, tmp_path / name) for name, model in models.items()]
    expected = fitted(places).state_dict()
    options: dict[str, Any] = {"method": "functional", "inputs": DRAWN, "null_trials": 0}
    found = merge(places[0], [places[1]], places[2], **options).state_dict()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("method", ["functional", "distillation"])
def test_no_model_is_changed(method: str, tmp_path: Path) -> None:
    """What is read from a checkpoint may be shared, and a head that comes along starts as tuned's own."""
    base = bert(seed=0)
    tuned = fine_tuned(base, BertForSequenceClassification, num_labels=3)
    models = {"source": base, "tuned": tuned, "target": bert(seed=5)}
    places = [save(model, tmp_path / name) for name, model in models.items()]
    opened = fitted(places, method=method, train_steps=10).tensors.models
    for model, place in zip(opened.all(), places, strict=True):
        stored = load_file(place / "model.safetensors")
        assert all(torch.equal(model.checkpoint.tensor(name), one) for name, one in stored.items()), model.role


# --- two towers -------------------------------------------------------------------------------------------------------

PROMPTS = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 10, 2], [1, 4, 12, 2]])


def clips(folder: Path, *, text_seed: int, tune_text: bool = False) -> list[Path]:
    """Two bases with other vision towers, the second with the text tower of `text_seed` (0: the same)."""
    source, target, text = (clip(CLIPModel, seed) for seed in (0, 3, text_seed))
    tuned = fine_tuned(source, size=0.3)
    for name, parameter in source.named_parameters():
        if name.startswith("text_"):
            target.get_parameter(name).data.copy_(text.get_parameter(name))
            if not tune_text:
                tuned.get_parameter(name).data.copy_(parameter)
    for model in (source, tuned, target):
        model.logit_scale.data.fill_(3.0)  # one number has no spread that noise could be scaled by
    return [save(model, folder / name) for name, model in (("source", source), ("tuned", tuned), ("target", target))]


def clip_ported(places: list[Path], transport: str, count: int = 100) -> tuple[PortResult, Prepared]:
    """A port on images, with prompts beside them."""
    models = open_models(places[0], places[2], places[1])
    row = get_method({"fit": "functional", "train": "distillation"}[transport])
    images = open_inputs(models, row, replace(DRAWN, count=count)).task
    assert images is not None
    inputs = images.with_extra(prompt_input_ids=PROMPTS, prompt_attention_mask=torch.ones_like(PROMPTS))
    plan = make_plan(models)
    maps = match_models(models, row, inputs=inputs)
    start = transported(models, plan, maps)
    if transport == "fit":
        found = fit_port(start, Unlabelled(inputs), FitOptions())
    else:
        found = train_port(unchanged(start), Unlabelled(inputs), replace(PLAIN, steps=40, lr=5e-3))
    return PortResult({}, maps, None, start.fitted(found)), inputs


def clip_logits(result: PortResult | Path, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        model = class_of(result, CLIPModel)
        return model(input_ids=PROMPTS, pixel_values=pixels, attention_mask=torch.ones_like(PROMPTS)).logits_per_image


@pytest.mark.parametrize("text_seed", [0, 8], ids=["one-text-tower", "other-text-towers"])
@pytest.mark.parametrize("transport", ["fit", "train"])
def test_images_of_a_clip(transport: str, text_seed: int, tmp_path: Path) -> None:
    places = clips(tmp_path, text_seed=text_seed)
    result, inputs = clip_ported(places, transport)
    pixels = inputs.batch(torch.arange(len(inputs)))["pixel_values"].double()
    wanted, old, found = (clip_logits(one, pixels) for one in (places[1], places[2], result))
    assert kl(found, wanted) < 0.2 * kl(old, wanted)
    right = [float((one.argmax(-1) == wanted.argmax(-1)).double().mean()) for one in (old, found)]
    assert right[1] > 0.85 and right[1] > right[0] + 0.1


@pytest.mark.parametrize("transport", ["fit", "train"])
def test_images_do_not_reach_the_text_tower(transport: str, tmp_path: Path) -> None:
    """Not even where tuned has another one: nothing is known of how to carry it."""
    places = clips(tmp_path, text_seed=8, tune_text=True)
    result, _ = clip_ported(places, transport, count=20)
    target = result.tensors.models.target
    for name, one in result.state_dict().items():
        still = name.startswith("text_") or name == "logit_scale"
        assert torch.equal(one, target.checkpoint.tensor(name)) or not still, name
    moved = {n for n, one in result.state_dict().items() if not torch.equal(one, target.checkpoint.tensor(n))}
    assert "visual_projection.weight" in moved and "vision_model.embeddings.patch_embedding.weight" in moved


def test_texts_do_not_reach_the_vision_tower(tmp_path: Path) -> None:
    places = clips(tmp_path, text_seed=8, tune_text=True)
    models = open_models(places[0], places[2], places[1])
    ids = torch.randint(3, 31, (40, 9), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 2
    inputs = prepared({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    maps = match_models(models, get_method("functional"), inputs=inputs)
    found = fit_port(transported(models, make_plan(models), maps), Unlabelled(inputs), FitOptions())
    fitted = found.tensors
    assert {name.split("_")[0] for name in fitted} == {"text"} and "text_projection.weight" in fitted
    assert found.of("text_model.embeddings.token_embedding.weight").any(), "the table of tokens is contracted"
    assert not found.of("vision_model.embeddings.patch_embedding.weight").any()


@pytest.mark.parametrize("method", ["naive", "theseus", "functional", "distillation"])
def test_embeddings_can_be_kept(vits: list[Path], method: str) -> None:
    """Theseus sets the task vector of embeddings to zero; training leaves them as they are."""
    inputs = None if method == "naive" else DRAWN
    names = [f"vit.embeddings.{end}" for end in ("position_embeddings", "patch_embeddings.projection.weight")]
    target = load_file(vits[2] / "model.safetensors")
    for keep in (True, False):
        found = fitted(vits, method=method, inputs=inputs, keep_embeddings=keep)
        for name in names:
            assert torch.equal(found.tensor(name), target[name]) == keep, name
        body = "vit.encoder.layer.0.attention.output.dense.weight"
        assert not torch.equal(found.tensor(body), target[body])


# --- distillation -----------------------------------------------------------------------------------------------------


def test_distillation_follows_tuned(vits: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfuse.update.lessons.PLAIN", replace(PLAIN, lr=3e-3))
    seen, result = opened_inputs(vits), fitted(vits, method="distillation", train_steps=100)
    tuned = logits_of(vits[1], seen)
    assert kl(logits_of(result, seen), tuned) < 0.1 * kl(logits_of(vits[2], seen), tuned)
    assert result.maps.spaces == {} and result.report["equivalence"] is None


def scores_of_model(probe: Probe, inputs: Prepared, batch: Any) -> Tensor:
    found = answers(probe, inputs)(batch).scores
    assert found is not None
    return found


def distilled(student: Probe, tuned: Probe, inputs: Prepared, **options: Any) -> dict[str, Tensor]:
    mine, its = (answers(one, inputs) for one in (student, tuned))
    return train_on(student, [Lesson(inputs, mine, its)], TrainOptions(**options))


def unfitted(models: Models) -> Ported:
    """Target, with the heads that come along."""
    return transported(models, make_plan(models), Maps({}), 0.0)


def test_the_seed_is_that_of_the_order(vits: list[Path]) -> None:
    models = open_models(vits[0], vits[2], vits[1])
    assert models.tuned is not None
    inputs, found = prepared(opened_inputs(vits)), []
    for seed in (0, 0, 1):
        student, tuned = student_and_tuned(unfitted(models), "cpu")
        found.append(distilled(student, tuned, inputs, steps=4, batch_size=10, seed=seed))
    assert all(torch.equal(one, found[1][name]) for name, one in found[0].items())
    assert any(not torch.equal(one, found[2][name]) for name, one in found[0].items())


def test_one_step_of_distillation_goes_against_the_gradient(vits: list[Path]) -> None:
    """Adam's first step is the learning rate, against the sign of the gradient of the divergence."""
    models = open_models(vits[0], vits[2], vits[1])
    assert models.tuned is not None
    student, tuned = student_and_tuned(unfitted(models), "cpu")
    inputs = prepared(opened_inputs(vits))
    batch = inputs.batch(torch.arange(len(inputs)))
    with torch.no_grad():
        wanted = scores_of_model(tuned, inputs, batch)
    loss = functional.kl_div(
        scores_of_model(student, inputs, batch).log_softmax(-1),
        wanted.log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    names = dict(student.names)
    before = {name: student.module.get_parameter(one).detach().clone() for name, one in names.items()}
    grads = dict(
        zip(
            names, torch.autograd.grad(loss, [student.module.get_parameter(one) for one in names.values()]), strict=True
        )
    )
    found = distilled(student, tuned, inputs, steps=1, lr=1e-4)
    assert found.keys() == names.keys()
    for name, one in found.items():
        sure = grads[name].abs() > 1e-6
        torch.testing.assert_close(one[sure], (before[name] - 1e-4 * grads[name].sign())[sure], rtol=0, atol=2e-6)


def test_distillation_needs_class_scores(tmp_path: Path) -> None:
    places = [save(bert(seed=seed), tmp_path / str(seed)) for seed in (0, 1, 2)]
    with pytest.raises(InputError, match="distillation needs class scores"):
        fitted(places, method="distillation")
