"""Training by two teachers, and fitting with inputs to keep: plain formulas, and what must stay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertForSequenceClassification, CLIPForImageClassification, CLIPModel

import transfuse
from test_functional import Two, clip_logits, clips, two_layout, two_probe
from tiny import bert, clip, fine_tuned, save, vit
from tiny_data import prepared
from transfuse import InputError
from transfuse.bench.ports import Ports
from transfuse.bench.recipes.parts import MethodSpec
from transfuse.bench.recipes.reading import load_recipe, parse_recipe, plain
from transfuse.maps.collection import Maps
from transfuse.methods.match import open_inputs
from transfuse.methods.table import get_method
from transfuse.models.opening import open_models
from transfuse.models.plan import make_plan
from transfuse.options.groups import Inputs, Keep
from transfuse.running.given import Unlabelled
from transfuse.running.live import load_live
from transfuse.update.functional import FitOptions, Teachers, _beside, fit
from transfuse.update.lessons import PLAIN, TWO_TEACHERS, train_port
from transfuse.update.ported import transported, unchanged
from transfuse.update.regression import Fit
from transfuse.update.teachers import FEATURES, Answer, mixed
from transfuse.update.views import SMALLEST, viewed

DRAWN, KEPT = Inputs("synthetic", count=48), Keep("synthetic", count=64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- views ------------------------------------------------------------------------------------------------------------


def test_images_are_seen_anew() -> None:
    x = torch.rand(12, 3, 8, 8, generator=generator())
    found = viewed({"pixel_values": x, "labels": torch.arange(12)}, generator(1))
    assert found["pixel_values"].shape == x.shape and found["pixel_values"].dtype == x.dtype
    assert torch.equal(found["labels"], torch.arange(12))
    again = viewed({"pixel_values": x}, generator(1))
    assert torch.equal(found["pixel_values"], again["pixel_values"])
    other = viewed({"pixel_values": x}, generator(2))
    assert not torch.equal(found["pixel_values"], other["pixel_values"])
    # Reading between pixels and images gives nothing brighter or darker than there was.
    assert found["pixel_values"].min() >= x.min() - 1e-6 and found["pixel_values"].max() <= x.max() + 1e-6


def test_an_image_is_mixed_with_others_only_where_that_is_asked_for() -> None:
    """Images of one colour each stay what they are however they are cut and mirrored."""
    x = torch.arange(10.0)[:, None, None, None].expand(10, 3, 8, 8)
    alone = viewed({"pixel_values": x}, generator(), mix=False)["pixel_values"]
    torch.testing.assert_close(alone, x)
    blended = viewed({"pixel_values": x}, generator())["pixel_values"][:, 0, 0, 0]
    assert (blended - torch.arange(10.0)).abs().max() > 0.5


def test_a_view_is_a_part_of_its_image() -> None:
    """On a ramp a view is a ramp, too, of a slope between the smallest part and the whole, either way round."""
    ramp = torch.arange(32.0).expand(40, 3, 32, 32)
    found = viewed({"pixel_values": ramp}, generator(), mix=False)["pixel_values"][:, 0, 5]
    slopes = (found[:, 20] - found[:, 12]) / 8
    assert slopes.abs().min() >= SMALLEST - 1e-3 and slopes.abs().max() <= 1 + 1e-3
    assert (slopes < 0).any() and (slopes > 0).any()


def test_texts_go_on_as_another_one() -> None:
    count, longest = 30, 9
    lengths = torch.randint(3, longest + 1, (count,), generator=generator())
    mask = (torch.arange(longest) < lengths[:, None]).long()
    ids = (100 * torch.arange(count)[:, None] + torch.arange(longest)) * mask
    types = torch.arange(count)[:, None].expand(count, longest) * mask
    batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    found = viewed(batch, generator(3))
    spliced = 0
    for row, (seen, seen_mask, kinds) in enumerate(
        zip(found["input_ids"], found["attention_mask"], found["token_type_ids"], strict=True)
    ):
        length = int(seen_mask.sum())
        assert seen_mask[:length].all() and (seen[length:] == 0).all(), "no hole in a text"
        owners = (seen[:length] // 100).tolist()
        cut = next((place for place, one in enumerate(owners) if one != row), length)
        assert cut >= 1 and len(set(owners[cut:])) <= 1
        assert (seen[:length] % 100).tolist() == list(range(length)), "every token keeps its place"
        assert kinds[:length].tolist() == owners
        spliced += cut < length
    assert 5 < spliced < 25
    assert viewed(batch, generator(3), mix=False) is batch


# --- teachers ---------------------------------------------------------------------------------------------------------


def test_distance_is_a_divergence_and_an_error_relative_to_the_spread() -> None:
    s, t = (torch.randn(6, 4, dtype=torch.float64, generator=generator(seed)) for seed in (0, 1))
    f, g = (torch.randn(6, 5, dtype=torch.float64, generator=generator(seed)) for seed in (2, 3))
    p, q = (np.exp(one) / np.exp(one).sum(1, keepdims=True) for one in (t.numpy(), s.numpy()))
    divergence = (p * np.log(p / q)).sum() / 6
    a, b = f.numpy(), g.numpy()
    error = ((a - b) ** 2).sum() / ((b - b.mean(0)) ** 2).sum()
    assert float(Answer(s).distance(Answer(t))) == pytest.approx(divergence)
    assert float(Answer(None, f).distance(Answer(t, g))) == pytest.approx(FEATURES * error)
    assert float(Answer(s, f).distance(Answer(t, g))) == pytest.approx(divergence + FEATURES * error)
    assert float(Answer(s, f).distance(Answer(s, f))) == pytest.approx(0, abs=1e-12)


def three_answers(share: float) -> tuple[list[Any], Any, list[Tensor]]:
    """Source, target and tuned as tables, where tuned is source's scores times `share`, and the rest of its own."""
    s, t, u = (torch.randn(400, 5, dtype=torch.float64, generator=generator(seed)) for seed in (0, 1, 2))
    u = share * s + (1 - share) * u
    inputs = prepared({"pixel_values": torch.arange(400)[:, None]}, batch_size=7)
    asks = [lambda batch, one=one: Answer(one[batch["pixel_values"][:, 0]]) for one in (s, t, u)]
    return asks, inputs, [s, t, u]


@pytest.mark.parametrize("share", [0.3, 0.7, 1.0])
def test_what_tuned_took_over_is_targets_word(share: float) -> None:
    asks, inputs, (s, t, u) = three_answers(share)
    teacher, found = mixed(asks[0], asks[1], asks[2], inputs)
    flat = []
    for one in (s, u):
        centred = one.numpy() - one.numpy().mean(1, keepdims=True)
        flat.append((centred - centred.mean(0)).ravel())
    assert found == pytest.approx((flat[0] @ flat[1]) ** 2 / (flat[0] @ flat[0]) / (flat[1] @ flat[1]))
    index = torch.tensor([3, 8])
    expected = u[index] + found * (t[index] - s[index])
    torch.testing.assert_close(teacher({"pixel_values": index[:, None]}).scores, expected)
    if share == 1.0:
        torch.testing.assert_close(expected, t[index])


def test_tuned_alone_teaches_where_the_bases_do_not_speak() -> None:
    asks, inputs, _ = three_answers(0.0)
    teacher, share = mixed(asks[0], asks[1], asks[2], inputs)
    assert share == 0 and teacher is asks[2], "rows of noise have less in common than SILENT"
    other_head = lambda batch: Answer(torch.zeros(len(batch["pixel_values"]), 3))  # noqa: E731
    asks, inputs, _ = three_answers(1.0)
    for bases in ((other_head, asks[1]), (asks[0], lambda batch: Answer(None))):
        assert mixed(*bases, asks[2], inputs) == (asks[2], 0.0)


# --- inputs to keep in the closed form --------------------------------------------------------------------------------


def test_rows_to_keep_weigh_as_asked() -> None:
    parts = []
    for seed, count in ((0, 12), (1, 30)):
        h, z = (
            torch.randn(count, width, dtype=torch.float64, generator=generator(seed + k))
            for k, width in ((0, 4), (9, 3))
        )
        parts.append((h, z, torch.ones(count, dtype=torch.float64)))
    task, keep = ((fit_of(*[one[::2] for one in part]), fit_of(*[one[1::2] for one in part])) for part in parts)
    left, right = _beside(task, keep, 0.5)
    h, z = (torch.cat([parts[0][k], parts[1][k]]) for k in (0, 1))
    weights = torch.cat([torch.ones(12), torch.full((30,), 0.5 * 12 / 30)]).double()
    prior = torch.zeros(3, 4, dtype=torch.float64)
    found, expected = ((one.solve(prior, 1e-9, bias=True)) for one in (left + right, fit_of(h, z, weights)))
    torch.testing.assert_close(found, expected)


def fit_of(h: Tensor, z: Tensor, weights: Tensor) -> Fit:
    found = Fit()
    found.add(h, z, weights)
    return found


@pytest.mark.parametrize("weight", [1e-6, 1e6])
def test_a_fit_holds_on_to_target_as_much_as_asked(weight: float) -> None:
    """Inputs of two kinds that a linear network cannot serve both: the heavier ones win."""
    source, tuned, target = (Two(seed, False) for seed in (0, 1, 2))
    layout = two_layout(False)
    task, keep = (
        prepared({"pixel_values": torch.randn(60, 8, dtype=torch.float64, generator=generator(seed))}, batch_size=7)
        for seed in (4, 5)
    )
    student = Two(0, False)
    student.load_state_dict(target.state_dict())
    first, second, last = (two_probe(one, layout) for one in (source, target, tuned))
    teachers = Teachers(first, second, last, Maps({}))
    fit(two_probe(student, layout), teachers, layout, Unlabelled(task, keep, weight), FitOptions(ridge=1e-9))
    for inputs, teacher, is_kept in ((task, tuned, weight < 1), (keep, target, weight > 1)):
        x = inputs.batch(torch.arange(60))["pixel_values"]
        near = torch.allclose(student(x), teacher(x), atol=1e-3)
        assert near == is_kept


# --- a port -----------------------------------------------------------------------------------------------------------


def kl(found: Tensor, wanted: Tensor) -> float:
    return float(torch.nn.functional.kl_div(found.log_softmax(-1), wanted.softmax(-1), reduction="batchmean"))


def places_of(folder: Path) -> list[Path]:
    source = vit(0)
    models = {"source": source, "tuned": fine_tuned(source, size=0.3), "target": vit(5)}
    return [save(one, folder / name) for name, one in models.items()]


def trained(places: list[Path], **options: Any) -> Any:
    options = {"method": "two-teachers", "inputs": DRAWN, "null_trials": 0, "train_steps": 60, **options}
    return transfuse.port(*places, **options)


def test_a_clip_keeps_what_it_is_held_to(tmp_path: Path) -> None:
    """Task and kept inputs are far from each other: both can be had, and without the second the first is lost."""
    places = clips(tmp_path, text_seed=0)
    models = open_models(places[0], places[2], places[1])
    pixels = torch.randn(2, 64, 3, 8, 8, generator=generator())
    prompts = {"prompt_input_ids": torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 10, 2], [1, 4, 12, 2]])}
    prompts["prompt_attention_mask"] = torch.ones_like(prompts["prompt_input_ids"])
    shown, other = {"pixel_values": pixels[0]}, {"pixel_values": 4 + pixels[1]}
    task, keep = (prepared(one).with_extra(**prompts) for one in (shown, other))
    start = unchanged(transported(models, make_plan(models), Maps({})))
    options = replace(TWO_TEACHERS, steps=80, lr=0.01)
    errors = {}
    for name, given in (("kept", Unlabelled(task, keep)), ("alone", Unlabelled(task))):
        found = start.fitted(train_port(start, given, options)).state()
        result = transfuse.PortResult({}, Maps({}), None, start.fitted(train_port(start, given, options)))
        assert all(torch.equal(one, result.state_dict()[out]) for out, one in found.items()), "the same bytes again"
        errors[name] = [
            kl(clip_logits(result, x["pixel_values"].double()), clip_logits(place, x["pixel_values"].double()))
            for x, place in ((shown, places[1]), (other, places[2]))
        ]
    before = kl(
        clip_logits(places[2], shown["pixel_values"].double()), clip_logits(places[1], shown["pixel_values"].double())
    )
    assert errors["alone"][0] < 0.5 * before and errors["kept"][0] < 0.6 * before
    assert errors["kept"][1] < 0.2 * errors["alone"][1]


def test_a_classifier_is_held_to_the_body_of_target(tmp_path: Path) -> None:
    """The new base has no such head: what it keeps is what its layers give."""
    places = bert_places(tmp_path)
    head = load_file(places[1] / "model.safetensors")["classifier.weight"]
    live = load_live(places[2])
    texts = Inputs("synthetic", count=40)
    drawn = open_inputs(open_models(places[0], places[2], places[1]), get_method("two-teachers"), texts, keep=KEPT)
    assert drawn.keep is not None
    seen = {n: x for n, x in drawn.keep.batch(torch.arange(len(drawn.keep))).items() if n != "labels"}
    with torch.no_grad():
        wanted = live.model(**seen).last_hidden_state
    errors = []
    for keep in (KEPT, Keep()):
        result = trained(places, inputs=texts, keep=keep, keep_weight=10.0)
        state = {n.removeprefix("bert."): x for n, x in result.state_dict().items() if n.startswith("bert.")}
        live.model.load_state_dict(state, strict=False)
        with torch.no_grad():
            errors.append(float((live.model(**seen).last_hidden_state - wanted).square().mean()))
        assert not torch.equal(result.tensor("classifier.weight"), head), "the head learns, too"
    assert errors[0] < 0.2 * errors[1]


def test_the_report_says_what_was_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    places = places_of(tmp_path)
    out = tmp_path / "out"
    trained(places, keep=KEPT, keep_weight=0.5, out=out, train_steps=3)
    report = json.loads((out / "result.json").read_text())
    assert report["kept"] == {"examples": 64, "weight": 0.5} and report["steps"] == 3 and report["examples"] == 48
    assert "held to its own answers on 64 generic inputs" in (out / "README.md").read_text()
    assert "--keep" not in caplog.text
    trained(places, out=tmp_path / "without", train_steps=3)
    assert "no inputs to keep are given (--keep)" in caplog.text
    without = json.loads((tmp_path / "without" / "result.json").read_text())
    assert without["kept"] is None and any("--keep" in line for line in without["warnings"])
    assert not any("--keep" in line for line in report["warnings"])
    assert "mostly overwritten" in (tmp_path / "without" / "README.md").read_text()
    caplog.clear()
    result = transfuse.port(*places, method="naive", keep=KEPT)
    assert "option keep is given, but not used" in caplog.text and "kept" not in result.report
    assert any("option keep is given" in line for line in result.report["warnings"])
    assert "kept" not in transfuse.port(*places, method="theseus", inputs=DRAWN).report, "maps overwrite nothing"


def test_auto_trains_where_there_is_something_to_keep(tmp_path: Path) -> None:
    result = trained(places_of(tmp_path), method="auto", keep=KEPT, train_steps=2)
    assert result.report["method"] == "two-teachers" and result.report["kept"]["examples"] == 64


def bert_places(folder: Path) -> list[Path]:
    """Bases without a head, and a classifier."""
    base = bert(seed=0)
    tuned = fine_tuned(base, BertForSequenceClassification, size=0.3, num_labels=3)
    models = {"source": base, "tuned": tuned, "target": bert(seed=5)}
    return [save(model, folder / name) for name, model in models.items()]


def test_a_fit_can_be_polished(tmp_path: Path) -> None:
    """Training starts from the fit, and brings it nearer to tuned where it is not there yet."""
    places = bert_places(tmp_path)
    fitted, polished = (
        trained(places, method="functional", ridge=1.0, polish=steps, out=tmp_path / f"out{steps}") for steps in (0, 60)
    )
    models = fitted.tensors.models
    drawn = open_inputs(models, get_method("functional"), DRAWN).task
    assert drawn is not None
    seen = drawn.batch(torch.arange(len(drawn)))
    with torch.no_grad():
        wanted, before, after = (
            load_live(place).model(**seen).logits for place in (places[1], tmp_path / "out0", tmp_path / "out60")
        )
    assert kl(after, wanted) < 0.5 * kl(before, wanted)
    assert polished.report["steps"] == 60
    stored = load_file(places[2] / "model.safetensors")
    assert all(torch.equal(models.target.checkpoint.tensor(n), one) for n, one in stored.items())


def test_plain_distillation_is_held_to_target_too(tmp_path: Path) -> None:
    places = places_of(tmp_path)
    results = [trained(places, method="distillation", keep=keep, keep_weight=100.0) for keep in (KEPT, Keep())]
    target = load_file(places[2] / "model.safetensors")
    moved = [
        sum(float((one.tensor(n) - x).square().sum()) for n, x in target.items() if n.startswith("vit."))
        for one in results
    ]
    assert moved[0] < moved[1]
    assert PLAIN.optimizer == "adam" and not PLAIN.views


# --- drift ------------------------------------------------------------------------------------------------------------


def test_drift_is_a_divergence_and_an_error_over_all_inputs(tmp_path: Path) -> None:
    places = bert_places(tmp_path)
    found = trained(places, method="functional", keep=KEPT, out=tmp_path / "out").report["drift"]
    assert set(found) == {"task", "keep"}
    assert found["task"]["divergence"] is None, "a head that came along answers another question"
    models = trained(places, method="functional", keep=KEPT).tensors.models
    inputs = open_inputs(models, get_method("functional"), DRAWN).task
    assert inputs is not None
    seen = inputs.batch(torch.arange(len(inputs)))
    with torch.no_grad():
        both: Any = (load_live(place).model.base_model for place in (tmp_path / "out", places[2]))
        new, old = (one(**seen).last_hidden_state for one in both)
    a, b = (one.double().flatten(0, 1).numpy() for one in (new, old))
    assert found["task"]["features"] == pytest.approx(((a - b) ** 2).sum() / ((b - b.mean(0)) ** 2).sum(), rel=1e-4)


def test_drift_of_answers_to_one_question(tmp_path: Path) -> None:
    places = places_of(tmp_path)
    result = trained(places, method="functional", out=tmp_path / "out")
    found = result.report["drift"]
    assert set(found) == {"task"}
    inputs = open_inputs(result.tensors.models, get_method("functional"), DRAWN).task
    assert inputs is not None
    seen = inputs.batch(torch.arange(len(inputs)))
    with torch.no_grad():
        new, old = (load_live(place).model(**seen).logits.double() for place in (tmp_path / "out", places[2]))
    assert found["task"]["divergence"] == pytest.approx(kl(new, old), rel=1e-4)
    assert found["task"]["changed"] == (new.argmax(-1) != old.argmax(-1)).double().mean().item() > 0
    still = trained(places, method="functional", alpha=0.0).report["drift"]["task"]
    assert still["divergence"] == pytest.approx(0, abs=1e-9) and still["changed"] == 0


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_says_what_is_kept() -> None:
    content = plain(load_recipe("theseus-table-small"))
    content["transport"]["methods"] = [
        {"method": "two-teachers", "keep": {"task": "cifar10", "count": 100}},
        {"method": "functional", "keep": {"task": "synthetic"}, "polish": 5},
    ]
    first, second = parse_recipe(content).transport.methods[:2]  # type: ignore[union-attr]
    assert first.keep is not None and (first.keep.count, first.keep.weight) == (100, 1.0)
    assert second.keep is not None and second.options == {"polish": 5}
    content["transport"]["methods"][0]["method"] = "tied"
    with pytest.raises(InputError, match="nothing that 'keep' could change"):
        parse_recipe(content)
    content["transport"]["methods"][0]["method"] = "auto"
    content["transport"]["methods"][0]["keep"]["task"] = "cifar11"
    with pytest.raises(InputError, match="cifar11"):
        parse_recipe(content)


# --- heads, towers, and what cannot be kept ---------------------------------------------------------------------------


def labelled_places(folder: Path, labels: int) -> list[Path]:
    """Image classifiers; tuned has a head of its own, for `labels` classes of other names."""
    source, target = vit(0), vit(5)
    tuned = vit(1, num_labels=labels, id2label={n: f"own {n}" for n in range(labels)})
    for name, x in source.named_parameters():
        if name.startswith("vit."):
            tuned.get_parameter(name).data.copy_(x + 0.05 * torch.randn(x.shape, dtype=x.dtype, generator=generator(3)))
    return [save(one, folder / name) for name, one in (("source", source), ("tuned", tuned), ("target", target))]


@pytest.mark.parametrize("labels", [3, 7], ids=["fewer", "as-many"])
@pytest.mark.parametrize("method", ["functional", "distillation", "two-teachers"])
def test_a_foreign_head_is_held_to_nothing(
    method: str, labels: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What target's own head says on generic inputs is no answer to tuned's task, and no part of its teacher's."""
    caplog.set_level("INFO")
    places = labelled_places(tmp_path, labels)
    results = [trained(places, method=method, keep=KEPT, keep_weight=weight, train_steps=5) for weight in (1e-9, 1e4)]
    heads = [one.tensor("classifier.weight") for one in results]
    assert method != "two-teachers" or "the bases speak on the task: 0.00" in caplog.text
    assert heads[0].shape[0] == labels and results[0].report["tensors"]["carry"] >= 1
    own = load_file(places[2] / "model.safetensors")["classifier.weight"]
    if labels == len(own):
        near = [float((one - own).norm()) for one in heads]
        assert near[1] > 0.8 * near[0], "it does not go to target's"


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_a_polish_starts_from_the_whole_fit(alpha: float, tmp_path: Path) -> None:
    """Alpha scales what was found; it does not change where training starts."""
    places = bert_places(tmp_path)
    name = "encoder.layer.1.output.dense.weight"
    found = [
        trained(places, method="functional", polish=1, alpha=one, seed=1).tensors.update.of(name)
        for one in (1.0, alpha)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_body_alone_is_fitted(tmp_path: Path) -> None:
    """Without a head there is nothing that training could go by: auto says so by what it takes."""
    base = bert(seed=0)
    models = {"source": base, "tuned": fine_tuned(base, size=0.3), "target": bert(seed=5)}
    places = [save(model, tmp_path / name) for name, model in models.items()]
    assert trained(places, method="auto", keep=KEPT).report["method"] == "functional"
    with pytest.raises(InputError, match="distillation needs class scores on inputs of the task"):
        trained(places, keep=KEPT)


def test_weight_zero_keeps_nothing(tmp_path: Path) -> None:
    places = places_of(tmp_path)
    nothing, none = (trained(places, train_steps=2, **given) for given in ({"keep": KEPT, "keep_weight": 0.0}, {}))
    assert nothing.report["kept"] is None
    assert all(torch.equal(one, none.tensor(name)) for name, one in nothing.state_dict().items())


def test_an_image_classifier_of_a_clip_is_held_to_its_tower(tmp_path: Path) -> None:
    """Target gives embeddings, the ported model logits: what both have is what their layers give."""
    source, target = clip(CLIPModel, 0), clip(CLIPModel, 3)
    tuned = fine_tuned(source, CLIPForImageClassification, size=0.3, num_labels=3)
    places = [save(one, tmp_path / name) for name, one in (("source", source), ("tuned", tuned), ("target", target))]
    results = [trained(places, keep=keep, keep_weight=30.0, train_steps=30) for keep in (KEPT, Keep())]
    before = load_file(places[2] / "model.safetensors")
    moved = [
        sum(float((one.tensor(n) - x).square().sum()) for n, x in before.items() if n in one.tensors.steps)
        for one in results
    ]
    assert moved[0] < moved[1]


def test_the_key_of_a_cell_has_what_is_kept() -> None:
    bench = cast(Any, SimpleNamespace(_depends_on=lambda task: None))
    about = [
        Ports.method_depends_on(bench, MethodSpec.model_validate({"method": "auto", "keep": keep}))
        for keep in (
            None,
            {"task": "synthetic"},
            {"task": "synthetic", "count": 9},
            {"task": "cifar10"},
            {"task": "cifar10", "moments": True},
        )
    ]
    assert len({json.dumps(one, sort_keys=True) for one in about}) == 5
