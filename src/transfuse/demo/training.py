"""The models of the demo: tiny ViTs trained on the digits that scikit-learn ships, each from a generator of its own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from ..errors import InputError
from ..porting.planted import plant

Say = Callable[[str], None]


_TEST_SIZE = 500


_REPLAY = 300


_BATCH = 64


# Every random choice has a generator of its own: adding a step then changes no other step's draws.
_STAGES = ("split", "init-source", "source", "release", "tuned", "reorder", "init-independent", "independent", "target")


@dataclass(frozen=True)
class Examples:
    """Images of shape (n, 1, 8, 8) with values from -1 to 1, and their labels."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, index: Tensor | slice) -> Examples:
        return Examples(self.images[index], self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Digits:
    """The splits: `first` and `second` are disjoint halves of what may be trained on, `test` is never trained on."""

    first: Examples
    second: Examples
    test: Examples

    @property
    def train(self) -> Examples:
        """Both halves."""
        return join(self.first, self.second)


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one training runs; `noise` is the pixel noise that augments the images."""

    epochs: int
    lr: float
    noise: float


_FROM_SCRATCH = Recipe(epochs=22, lr=2e-3, noise=0.2)


_CONTINUED = Recipe(epochs=10, lr=7e-4, noise=0.3)


_FINE_TUNE = Recipe(epochs=8, lr=1e-3, noise=0.2)


def load_digits(generator: Generator) -> Digits:
    pixels, labels = optional("sklearn.datasets").load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    examples = Examples(images, torch.tensor(labels))[torch.randperm(len(labels), generator=generator)]
    test, train = examples[:_TEST_SIZE], examples[_TEST_SIZE:]
    half = len(train) // 2
    return Digits(first=train[:half], second=train[half:], test=test)


def on_side(examples: Examples) -> Examples:
    """The shifted task: the same digits turned by 90 degrees."""
    return Examples(torch.rot90(examples.images, 1, (2, 3)), examples.labels)


def join(a: Examples, b: Examples) -> Examples:
    return Examples(torch.cat([a.images, b.images]), torch.cat([a.labels, b.labels]))


def train_all(models: Path, digits: Digits, seed: int, say: Say) -> None:
    say("training: source")
    source = new_model(generator(seed, "init-source"))
    train(source, digits.first, _FROM_SCRATCH, generator(seed, "source"))
    source.save_pretrained(models / "source")

    say("training: tuned (the source, fine-tuned on digits on their side)")
    fine_tune(models / "source", models / "tuned", digits, generator(seed, "tuned"))

    say("training: release-continued, and release-permuted from it")
    release = load(models / "source")
    train(release, digits.second, _CONTINUED, generator(seed, "release"))
    release.save_pretrained(models / "release-continued")
    order = {"tie_qkv": False, "seed": stage_seed(seed, "reorder"), "force": True}
    plant(models / "release-continued", models / "release-permuted", **order)

    say("training: independent")
    independent = new_model(generator(seed, "init-independent"))
    train(independent, digits.first, _FROM_SCRATCH, generator(seed, "independent"))
    independent.save_pretrained(models / "independent")


def fine_tune(base: Path, out: Path, digits: Digits, generator: Generator) -> None:
    """Teaches a base the digits on their side, with some upright ones so that it does not forget them."""
    model = load(base)
    train(model, join(on_side(digits.train), digits.first[:_REPLAY]), _FINE_TUNE, generator)
    model.save_pretrained(out)


def train(model: PreTrainedModel, data: Examples, recipe: Recipe, generator: Generator) -> None:
    steps = recipe.epochs * -(-len(data) // _BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(recipe.epochs):
        for index in torch.randperm(len(data), generator=generator).split(_BATCH):
            batch = data[index]
            noise = torch.randn(batch.images.shape, generator=generator)
            logits = model(pixel_values=batch.images + recipe.noise * noise).logits
            loss = nn.functional.cross_entropy(logits, batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def new_model(generator: Generator) -> PreTrainedModel:
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=8,
        patch_size=2,
        num_channels=1,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
        # Dropout would draw from the global generator.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        model = ViTForImageClassification(config)
    initialise(model, generator)
    return model


@torch.no_grad()
def initialise(model: nn.Module, generator: Generator) -> None:
    """Draws the weights anew: the model's own initialisation uses the global generator."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            # Wider than the 0.02 meant for large models: at this size it trains in a third of the epochs.
            parameter.normal_(0.0, 0.05, generator=generator)
        else:
            parameter.fill_(1.0 if "layernorm" in name and name.endswith("weight") else 0.0)


def load(folder: Path) -> PreTrainedModel:
    return ViTForImageClassification.from_pretrained(folder)


def generator(seed: int, stage: str) -> Generator:
    return Generator().manual_seed(stage_seed(seed, stage))


def stage_seed(seed: int, stage: str) -> int:
    return seed * 1000 + _STAGES.index(stage)


def optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise InputError(f"the demo needs {name}, which cannot be imported: pip install 'transfuse[demo]'") from error
