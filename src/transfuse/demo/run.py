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

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..files.configs import quiet_transformers
from ..methods.table import DEFAULT_METHOD
from ..porting.port import port
from .training import Digits, Examples, Say, fine_tune, generator, load, load_digits, on_side, optional, train_all

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


@dataclass(frozen=True)
class Row:
    """Accuracy, in percent, of one model: on the digits on their side (`task`) and on upright ones (`support`)."""

    target: str
    method: str
    task: float
    support: float


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
        optional(module)
    say = progress or logger.info
    began = time.monotonic()
    models = out / "models"
    with quiet_transformers(), _one_thread():
        digits = load_digits(generator(seed, "split"))
        train_all(models, digits, seed, say)
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


# --- training -----------------------------------------------------------------------------------------------------


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
    fine_tune(models / target, retrained, digits, generator(seed, "target"))
    rows.append(_measure(retrained, target, TUNED_ON_TARGET, digits))
    return rows, relation


def _measure(folder: Path, target: str, method: str, digits: Digits) -> Row:
    model = load(folder)
    return Row(target, method, _accuracy(model, on_side(digits.test)), _accuracy(model, digits.test))


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
    figure = optional("matplotlib.figure").Figure(figsize=(9, 7.5), layout="constrained", dpi=120)
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
