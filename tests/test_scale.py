"""Scales learned from a few examples: gradient descent on the alphas, on nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel

import digits
import tiny
from transfuse import InputError, TransfuseError, port
from transfuse.data.tasks import TaskSpec
from transfuse.options.groups import Run
from transfuse.options.studies import Scale
from transfuse.running.inputs import Prepared, prepare
from transfuse.running.live import LiveModel, load_live, with_state
from transfuse.running.scores import evaluate, loss_of, score_dict
from transfuse.spaces.layout import part_of
from transfuse.study.scale import alphas_by_tensor, few_shot_tune, learn_scales, parts_of
from transfuse.update.live import live_of
from transfuse.update.ported import Ported


class Setting:
    """A port of a digit reader to a re-ordered base, and eight examples a class."""

    def __init__(self, folder: Path):
        digits.write_data(folder / "data")
        source = digits.trained(digits.vit(), 25)
        digits.save(source, folder / "source")
        digits.save(digits.trained(source, 120, seed=1), folder / "tuned")
        digits.save(tiny.planted(source, 3, noise=0.05)[0], folder / "target")
        self.result = port(*(folder / name for name in ("source", "tuned", "target")), null_trials=0)
        self.ported: Ported = self.result.tensors.held()
        self.live: LiveModel = live_of(self.ported, self.ported.state())
        self.task: TaskSpec = digits.task(folder / "data")
        self.shots: Prepared = prepare(self.task, "train", self.live, shots=8)
        self.test: Prepared = prepare(self.task, "test", self.live)

    def scores(self, state: dict[str, Tensor], rows: Prepared) -> dict[str, float]:
        """Scores of weights by output name."""
        return score_dict(evaluate(with_state(self.live, state), self.task, rows))


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("scale"))


def learn(setting: Setting, **options: Any) -> Any:
    batch_size, run = options.pop("batch_size", None), Run(seed=options.pop("seed", 0))
    how = Scale(**{"shots": 8, "steps": 5, **options})
    return learn_scales(setting.live, setting.ported, setting.task, setting.shots, how, run, batch_size=batch_size)


@pytest.mark.parametrize("per", ["layer", "tensor"])
def test_learned_scales_beat_none(setting: Setting, per: Any) -> None:
    found = learn(setting, per=per, steps=60)
    target = setting.ported.at(0.0).state()
    assert found.losses[0] == pytest.approx(setting.scores(target, setting.shots)["loss"], abs=1e-5)
    assert min(found.losses) < 0.7 * found.losses[0]
    none = setting.scores(target, setting.test)
    assert setting.scores(found.state, setting.test)["accuracy"] > none["accuracy"] + 0.05


def test_one_step_of_adam_goes_against_the_gradient_by_lr(setting: Setting) -> None:
    found = learn(setting, steps=1, lr=0.01, init=0.3, batch_size=1000)

    def loss(alphas: dict[str, float]) -> float:
        state = setting.ported.at(alphas_by_tensor(setting.ported, alphas, "layer")).state()
        return setting.scores(state, setting.shots)["loss"]

    for part, alpha in found.alphas.items():
        above, below = (loss({**dict.fromkeys(found.alphas, 0.3), part: 0.3 + e}) for e in (0.02, -0.02))
        assert alpha == pytest.approx(0.3 - math.copysign(0.01, above - below), abs=1e-4), part


def test_the_state_is_that_of_the_alphas(setting: Setting) -> None:
    found = learn(setting, steps=4, lr=0.2)
    assert len(set(found.alphas.values())) > 1
    for out, one in found.state.items():
        if (name := setting.ported.added.get(out)) is not None:
            old, update = setting.ported.models.target.tensor(name), setting.ported.change(out)
            alpha = found.alphas.get(part_of(name), 0.0)
            torch.testing.assert_close(one, old + alpha * update, rtol=0, atol=1e-6)
        else:
            assert torch.equal(one, setting.result.tensor(out))


def test_parts(setting: Setting) -> None:
    layers = set(parts_of(setting.ported, "layer").values())
    assert layers == {"embeddings", "encoder.layer.0", "encoder.layer.1", "layernorm", "classifier"}
    tensors = parts_of(setting.ported, "tensor")
    assert len(set(tensors.values())) == len(tensors) == len(setting.ported.added)
    still = setting.ported.with_update(setting.ported.update.scaled(0.0))
    assert parts_of(still, "layer") == {}
    with pytest.raises(InputError, match="nothing to scale"):
        learn_scales(setting.live, still, setting.task, setting.shots, Scale(shots=8))


def test_learning_is_reproducible_and_changes_nothing(setting: Setting) -> None:
    before = {name: x.clone() for name, x in setting.live.model.state_dict().items()}
    target = {name: x.clone() for name, x in setting.ported.at(0.0).state().items()}
    state = torch.random.get_rng_state()
    one, two, other = (learn(setting, batch_size=16, seed=seed) for seed in (1, 1, 2))
    assert one.losses == two.losses and one.alphas == two.alphas and one.losses != other.losses
    assert all(torch.equal(x, two.state[name]) for name, x in one.state.items())
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(x, before[name]) for name, x in setting.live.model.state_dict().items())
    assert all(torch.equal(x, target[name]) for name, x in setting.ported.at(0.0).state().items())
    assert all(not p.grad_fn and p.grad is None for p in setting.live.model.parameters())


def test_batches_see_every_example_once(setting: Setting) -> None:
    seen: list[Tensor] = []

    class Spy(Prepared):
        def batch(self, index: Tensor, generator: torch.Generator | None = None) -> dict[str, Tensor]:
            seen.append(index)
            return super().batch(index, generator)

    rows = Spy(setting.shots.source, setting.shots.rows, setting.shots.classes, 32)
    learn_scales(setting.live, setting.ported, setting.task, rows, Scale(shots=8, steps=6))
    assert sorted(torch.cat(seen[:3]).tolist()) == sorted(torch.cat(seen[3:]).tolist()) == list(range(80))
    assert seen[0].tolist() != seen[3].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "block"}, "per is 'block'; one of layer, tensor is needed"),
        ({"steps": 0}, "steps is 0; a whole number of at least 1 is needed"),
        ({"lr": 0.0}, "lr is 0.0; a finite number above 0 is needed"),
    ],
)
def test_refused_options(setting: Setting, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        learn(setting, **options)


def test_no_examples(setting: Setting) -> None:
    with pytest.raises(InputError, match="no examples"):
        learn_scales(setting.live, setting.ported, setting.task, setting.shots.select(torch.arange(0)), Scale(shots=8))


def test_divergence_is_reported(setting: Setting) -> None:
    huge = setting.ported.with_update(setting.ported.update.scaled(1e30))
    with pytest.raises(TransfuseError, match="lower the learning rate"):
        learn_scales(setting.live, huge, setting.task, setting.shots, Scale(shots=8, init=1.0, steps=3))


def test_few_shot_tuning_starts_where_it_is_told(setting: Setting) -> None:
    start = with_state(setting.live, setting.ported.zero_shot())
    before = {name: x.clone() for name, x in start.model.state_dict().items()}
    one, two = (few_shot_tune(start, setting.task, setting.shots, steps=40, lr=2e-3, seed=3) for _ in range(2))
    assert all(torch.equal(x, before[name]) for name, x in start.model.state_dict().items())
    other = two.model.state_dict()
    assert all(torch.equal(x, other[name]) for name, x in one.model.state_dict().items())
    old, new = (score_dict(evaluate(live, setting.task, setting.shots))["loss"] for live in (start, one))
    assert new < 0.7 * old


# --- zero-shot models -------------------------------------------------------------------------------------------------


class Images:
    """Rows for a CLIP, made up: four images of each of three classes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.arange(12) % 3
        self.pixels = torch.randn(12, 3, 8, 8, generator=generator, dtype=torch.float64)

    def __len__(self) -> int:
        return 12

    def read(self, index: Tensor, generator: torch.Generator | None) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


@pytest.mark.parametrize("text_moves", [True, False])
def test_alphas_of_two_towers(text_moves: bool, tmp_path: Path) -> None:
    source = tiny.clip(CLIPModel)
    tuned = tiny.fine_tuned(source, size=0.3)
    for name, one in tuned.named_parameters():
        if name == "logit_scale":  # one number has no spread to scale noise by
            one.data.copy_(source.logit_scale.data + (0.1 if text_moves else 0.0))
        elif name.startswith("text_") and not text_moves:
            one.data.copy_(source.get_parameter(name))
    for name, model in (("source", source), ("tuned", tuned), ("target", tiny.planted(source, 2)[0])):
        tiny.save(model, tmp_path / name)
    result = port(tmp_path / "source", tmp_path / "tuned", tmp_path / "target", null_trials=0)
    ported = result.tensors.held()
    live = live_of(ported, ported.state(), dtype=torch.float64)
    about = {"kind": "zero-shot-image-classification", "data": {"path": "none", "classes": ["a", "b", "c"]}}
    task = TaskSpec.model_validate(about)
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 10, 2]])
    extra = {"prompt_input_ids": ids, "prompt_attention_mask": torch.ones_like(ids)}
    rows = Prepared(Images(), torch.arange(12), ("a", "b", "c"), 12, extra)
    parts = set(parts_of(ported, "layer").values())
    assert ("text_model.encoder.layers.0" in parts) == text_moves and "vision_model.encoder.layers.0" in parts
    found = learn_scales(live, ported, task, rows, Scale(shots=2, steps=3, init=0.5))
    for alphas, loss in ((dict.fromkeys(parts, 0.5), found.losses[0]), (found.alphas, None)):
        state = ported.at(alphas_by_tensor(ported, alphas, "layer")).state()
        expected = score_dict(evaluate(with_state(live, state), task, rows))["loss"]
        after = loss_of(with_state(live, found.state), task, rows.batch(torch.arange(12))).item()
        assert expected == pytest.approx(after if loss is None else loss, abs=1e-9)
    assert found.losses[-1] < found.losses[0]
    assert all(abs(alpha - 0.5) > 1e-3 for alpha in found.alphas.values()), "every part learns, the text tower too"


def test_the_baseline_leaves_the_text_tower_alone(tmp_path: Path) -> None:
    model = tiny.clip(CLIPModel)
    live = load_live(tiny.save(model, tmp_path / "clip"))
    about = {"kind": "zero-shot-image-classification", "data": {"path": "none", "classes": ["a", "b", "c"]}}
    task = TaskSpec.model_validate(about)
    ids = torch.tensor([[1, 5, 6, 2], [1, 7, 8, 2], [1, 9, 10, 2]])
    extra = {"prompt_input_ids": ids, "prompt_attention_mask": torch.ones_like(ids)}
    rows = Prepared(Images(), torch.arange(12), ("a", "b", "c"), 12, extra)
    tuned = few_shot_tune(live, task, rows, steps=3, lr=1e-2)
    changed = {n for n, x in tuned.model.state_dict().items() if not torch.equal(x, live.model.state_dict()[n])}
    assert changed and all(name.startswith(("vision_model.", "visual_projection.")) for name in changed)


def test_the_loss_is_cross_entropy(setting: Setting) -> None:
    found = learn(setting, steps=1, batch_size=80, init=1.0)
    images = setting.shots.batch(torch.arange(80))
    model = with_state(setting.live, setting.ported.at(1.0).state()).model
    with torch.no_grad():
        logits = model(pixel_values=images["pixel_values"]).logits
    assert found.losses[0] == pytest.approx(functional.cross_entropy(logits, images["labels"]).item(), abs=1e-5)
