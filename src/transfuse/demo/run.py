"""The demo: real training of tiny models, then the same fine-tune ported to three kinds of "new release".

The data are the handwritten digits that scikit-learn ships, so nothing is downloaded. A small vision transformer
(`source`) learns upright digits and is then fine-tuned to read digits lying on their side (`tuned`). Three targets
stand in for the next release of the base model:

- `release-continued`: the source trained further on other data;
- `release-permuted`: the same model with its units in another order, which computes the same function but shares no
  coordinates with the source;
- `independent`: trained from another initialisation, related to the source by nothing but the data.
"""

from __future__ import annotations

import importlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from ..errors import InputError
from ..files.configs import quiet_transformers
from ..methods.table import DEFAULT_METHOD
from ..porting.planted import plant
from ..porting.port import port

Say = Callable[[str], None]

logger = logging.getLogger(__name__)

TARGETS = ("release-continued", "release-permuted", "independent")
# Label -> what is asked of `port`. The paper gives q, k and v of a head one order of units; a release may have two (one
# for q and k, one for v and the output), and then the paper's form cannot represent it: both are shown.
METHODS: dict[str, dict[str, Any]] = {
    "naive": {"method": "naive"},
    "random": {"method": "random"},
    "transfusion": {"method": "transfusion"},
    "transfusion --split-qkv": {"method": "transfusion", "tie_qkv": False},
    "tied": {"method": "tied"},
}
ZERO_SHOT = "zero-shot"
TUNED_ON_TARGET = "tuned-on-target"

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
        return _join(self.first, self.second)


@dataclass(frozen=True)
class Recipe:
    """How long and how fast one training runs; `noise` is the pixel noise that augments the images."""

    epochs: int
    lr: float
    noise: float


@dataclass(frozen=True)
class Row:
    """Accuracy, in percent, of one model: on the digits on their side (`task`) and on upright ones (`support`)."""

    target: str
    method: str
    task: float
    support: float


_FROM_SCRATCH = Recipe(epochs=22, lr=2e-3, noise=0.2)
_CONTINUED = Recipe(epochs=10, lr=7e-4, noise=0.3)
_FINE_TUNE = Recipe(epochs=8, lr=1e-3, noise=0.2)


def run_demo(out: Path, *, seed: int = 0, progress: Say | None = None) -> dict[str, Any]:
    """Trains the models, ports the fine-tune with every method and writes what came out of it.

    Args:
        out: Folder to write to; made if needed. Gets `models/`, `table.md`, `figure.png` and `demo.json`.
        seed: Seed of every random choice, in training and in the ports.
        progress: Called with one line of text at the start of each step.

    Returns:
        What `demo.json` holds: `rows` (target, method, task, support: accuracies in percent), `models` (the same of
        the source and its fine-tune), `relations` (target: the verdict on how it is related to the source), `seed` and
        `seconds`.

    Raises:
        InputError: scikit-learn or matplotlib is not installed.
    """
    for module in ("sklearn.datasets", "matplotlib.figure"):
        _optional(module)
    say = progress or logger.info
    began = time.monotonic()
    models = out / "models"
    with quiet_transformers(), _one_thread():
        digits = _load_digits(_generator(seed, "split"))
        _train_all(models, digits, seed, say)
        references = [_measure(models / name, name, "-", digits) for name in ("source", "tuned")]
        measured = {target: _measure_target(models, target, digits, seed, say) for target in TARGETS}
    rows = [row for found, _ in measured.values() for row in found]
    relations = {target: relation for target, (_, relation) in measured.items()}
    result = {
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "models": [asdict(row) for row in references],
        "relations": relations,
        "rows": [asdict(row) for row in rows],
    }
    (out / "table.md").write_text(_table(references, rows, relations), encoding="utf-8")
    (out / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    _draw(out / "figure.png", references[1], rows, relations)
    return result


# --- data ---------------------------------------------------------------------------------------------------------


def _load_digits(generator: Generator) -> Digits:
    pixels, labels = _optional("sklearn.datasets").load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    examples = Examples(images, torch.tensor(labels))[torch.randperm(len(labels), generator=generator)]
    test, train = examples[:_TEST_SIZE], examples[_TEST_SIZE:]
    half = len(train) // 2
    return Digits(first=train[:half], second=train[half:], test=test)


def _on_side(examples: Examples) -> Examples:
    """The shifted task: the same digits turned by 90 degrees."""
    return Examples(torch.rot90(examples.images, 1, (2, 3)), examples.labels)


def _join(a: Examples, b: Examples) -> Examples:
    return Examples(torch.cat([a.images, b.images]), torch.cat([a.labels, b.labels]))


# --- training -----------------------------------------------------------------------------------------------------


def _train_all(models: Path, digits: Digits, seed: int, say: Say) -> None:
    say("training: source")
    source = _new_model(_generator(seed, "init-source"))
    _train(source, digits.first, _FROM_SCRATCH, _generator(seed, "source"))
    source.save_pretrained(models / "source")

    say("training: tuned (the source, fine-tuned on digits on their side)")
    _fine_tune(models / "source", models / "tuned", digits, _generator(seed, "tuned"))

    say("training: release-continued, and release-permuted from it")
    release = _load(models / "source")
    _train(release, digits.second, _CONTINUED, _generator(seed, "release"))
    release.save_pretrained(models / "release-continued")
    order = {"tie_qkv": False, "seed": _seed(seed, "reorder"), "force": True}
    plant(models / "release-continued", models / "release-permuted", **order)

    say("training: independent")
    independent = _new_model(_generator(seed, "init-independent"))
    _train(independent, digits.first, _FROM_SCRATCH, _generator(seed, "independent"))
    independent.save_pretrained(models / "independent")


def _fine_tune(base: Path, out: Path, digits: Digits, generator: Generator) -> None:
    """Teaches a base the digits on their side, with some upright ones so that it does not forget them."""
    model = _load(base)
    _train(model, _join(_on_side(digits.train), digits.first[:_REPLAY]), _FINE_TUNE, generator)
    model.save_pretrained(out)


def _train(model: PreTrainedModel, data: Examples, recipe: Recipe, generator: Generator) -> None:
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


def _new_model(generator: Generator) -> PreTrainedModel:
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
    _initialise(model, generator)
    return model


@torch.no_grad()
def _initialise(model: nn.Module, generator: Generator) -> None:
    """Draws the weights anew: the model's own initialisation uses the global generator."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            # Wider than the 0.02 meant for large models: at this size it trains in a third of the epochs.
            parameter.normal_(0.0, 0.05, generator=generator)
        else:
            parameter.fill_(1.0 if "layernorm" in name and name.endswith("weight") else 0.0)


def _load(folder: Path) -> PreTrainedModel:
    return ViTForImageClassification.from_pretrained(folder)


# --- porting and measuring ----------------------------------------------------------------------------------------


def _measure_target(models: Path, target: str, digits: Digits, seed: int, say: Say) -> tuple[list[Row], str]:
    """The rows of one target, and what the port by the default method says about how it is related to the source."""
    rows = [_measure(models / target, target, ZERO_SHOT, digits)]
    relation = ""
    for method, options in METHODS.items():
        say(f"porting: {target}, {method}")
        ported = models / f"{target}+{method.replace(' --', '-')}"
        result = port(
            models / "source",
            models / "tuned",
            models / target,
            out=ported,
            seed=seed,
            force=True,
            null_trials=1,
            **options,
        )
        if method == DEFAULT_METHOD:
            relation = result.report["relation"]["verdict"]
        rows.append(_measure(ported, target, method, digits))
    say(f"training: {TUNED_ON_TARGET}, {target}")
    retrained = models / f"{target}+{TUNED_ON_TARGET}"
    _fine_tune(models / target, retrained, digits, _generator(seed, "target"))
    rows.append(_measure(retrained, target, TUNED_ON_TARGET, digits))
    return rows, relation


def _measure(folder: Path, target: str, method: str, digits: Digits) -> Row:
    model = _load(folder)
    return Row(target, method, _accuracy(model, _on_side(digits.test)), _accuracy(model, digits.test))


@torch.no_grad()
def _accuracy(model: PreTrainedModel, data: Examples) -> float:
    model.eval()
    right = model(pixel_values=data.images).logits.argmax(-1) == data.labels
    return round(100 * right.float().mean().item(), 1)


# --- what is written ----------------------------------------------------------------------------------------------


def _table(references: list[Row], rows: list[Row], relations: dict[str, str]) -> str:
    lines = [
        "Accuracy in percent on 500 handwritten digits that no model was trained on. Task: the digits turned by 90",
        "degrees, which the fine-tune learned. Support: the same digits upright.",
        "",
        "| model | task | support |",
        "| --- | ---: | ---: |",
        *(f"| {row.target} | {row.task:.1f} | {row.support:.1f} |" for row in references),
        "",
        f"What `--method {DEFAULT_METHOD}` says about the two bases, before any accuracy is measured:",
        "",
        *(f"- {target}: {relation}" for target, relation in relations.items()),
        "",
        "| target | method | task | support |",
        "| --- | --- | ---: | ---: |",
        *(f"| {row.target} | {row.method} | {row.task:.1f} | {row.support:.1f} |" for row in rows),
        "",
        "What to expect: release-permuted shares no coordinates with the source as it is, so naive and random cannot",
        "work there; transfusion gives q, k and v of a head one order of units where this release has two, which",
        "--split-qkv allows. On independent, weights alone say nothing, as the verdict says: no such method can help.",
    ]
    return "\n".join(lines) + "\n"


# Told apart by colour-blind readers, too (Okabe and Ito).
_COLOURS = {
    "naive": "#999999",
    "random": "#D55E00",
    "transfusion": "#56B4E9",
    "transfusion --split-qkv": "#CC79A7",
    "tied": "#0072B2",
    TUNED_ON_TARGET: "#009E73",
}


def _draw(file: Path, tuned: Row, rows: list[Row], relations: dict[str, str]) -> None:
    figure = _optional("matplotlib.figure").Figure(figsize=(9, 7.5), layout="constrained", dpi=120)
    panels = figure.subplots(2, 1, sharex=True)
    panels[0].set_title("Task: digits turned by 90 degrees, the gain to carry over")
    panels[1].set_title("Support: upright digits, the ability to keep")
    _draw_bars(panels[0], "task", tuned.task, rows)
    _draw_bars(panels[1], "support", tuned.support, rows)
    panels[1].set_xticks(range(len(TARGETS)), [f"{target}\nfound: {relations[target]}" for target in TARGETS])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file)


def _draw_bars(axes: Any, measure: str, tuned: float, rows: list[Row]) -> None:
    value = {(row.target, row.method): getattr(row, measure) for row in rows}
    width = 0.8 / len(_COLOURS)
    for place, (method, colour) in enumerate(_COLOURS.items()):
        left = [group - 0.4 + (place + 0.5) * width for group in range(len(TARGETS))]
        heights = [value[target, method] for target in TARGETS]
        bars = axes.bar(left, heights, width * 0.92, color=colour, label=method)
        # On white, or the lines would strike the numbers out.
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=2, bbox=box, zorder=5)
    for group, target in enumerate(TARGETS):
        label = "zero-shot (target untouched)" if group == 0 else None
        axes.hlines(value[target, ZERO_SHOT], group - 0.45, group + 0.45, colors="black", linestyles="--", label=label)
    axes.axhline(tuned, color="black", linestyle=":", linewidth=1, label="the fine-tune itself, on the source")
    axes.set_ylim(0, 109)
    axes.set_ylabel("accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)


# --- small helpers ------------------------------------------------------------------------------------------------


def _generator(seed: int, stage: str) -> Generator:
    return Generator().manual_seed(_seed(seed, stage))


def _seed(seed: int, stage: str) -> int:
    return seed * 1000 + _STAGES.index(stage)


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise InputError(f"the demo needs {name}, which cannot be imported: pip install 'transfuse[demo]'") from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch to one thread: two waiting for each other over tensors this small take minutes on a busy machine.

    The results, too, are then the same whatever the number of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
