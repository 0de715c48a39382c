"""The commands that run models on data: eval, finetune."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .common import Command, app, print_report, set_up
from .options import options_of, output_options, reporting, split_option, task_options

_TASK = """

TASK is a YAML or JSON file, or JSON text: kind, data (path, and what else DataSpec takes), templates, max_length,
batch_size, metric. Data come from the hub or from local parquet, csv, tsv, jsonl or txt files, or folders of images;
a data set with a key `local` is taken from that folder under --data-dir where it is there.
"""

_running = options_of(
    task_options,
    click.option("--seed", type=click.IntRange(0, 2**62), default=0, show_default=True, help="Of every random choice."),
    click.option("--device", default="cpu", show_default=True, help="Where the model runs."),
    reporting,
)


@app.command(
    "eval",
    cls=Command,
    help="Score MODEL (a Hugging Face directory or hub id) on a task." + _TASK,
    examples="""
    transfuse eval my-classifier --task eurosat.yaml
    transfuse eval my-clip --task '{"kind": "zero-shot-image-classification", "data": {"path": "uoft-cs/cifar10"}}'
    transfuse eval ported --task sst2.yaml --split validation --limit 500 --json
    """,
)
@click.argument("model")
@split_option
@_running
def evaluate(model: str, task: str, split: Any, data_dir: Path | None, **options: Any) -> None:
    from ..data.tasks import load_task
    from ..running.inputs import prepare
    from ..running.live import load_live
    from ..running.scores import evaluate as run
    from ..running.scores import score_dict

    as_json, rest = set_up(options)
    spec = load_task(task)
    live = load_live(model, device=rest["device"])
    rows = prepare(
        spec, split, live, data_dir=data_dir, limit=rest["limit"], seed=rest["seed"], progress=rest["progress"]
    )
    scores = score_dict(run(live, spec, rows, progress=rest["progress"]))
    report = {"model": model, "task": spec.model_dump(mode="json"), "split": split, "primary": spec.primary}
    print_report({**report, "scores": scores}, as_json, _scores_text)


@app.command(
    cls=Command,
    help="Train BASE (a Hugging Face directory or hub id) on a task and write the result: AdamW, warm-up, cosine."
    + _TASK,
    examples="""
    transfuse finetune old-base --task eurosat.yaml --epochs 5 --augment flip-crop -o tuned
    transfuse finetune my-bert --task sst2.yaml --epochs 2 --lr 1e-4 --batch-size 32 -o tuned
    transfuse finetune my-clip --task cifar10.yaml --steps 500 --freeze 'vision_model.embeddings' -o tuned
    """,
)
@click.argument("base")
@output_options()
@click.option("--epochs", type=float, help="How long; or --steps.  [default: 3 epochs]")
@click.option("--steps", type=int)
@click.option("--batch-size", type=int, default=128, show_default=True)
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Highest learning rate.")
@click.option("--weight-decay", type=float, default=0.05, show_default=True, help="Of matrices.")
@click.option("--warmup", type=float, default=0.1, show_default=True, help="Share of the steps.")
@click.option("--schedule", type=click.Choice(["cosine", "constant"]), default="cosine", show_default=True)
@click.option("--augment", type=click.Choice(["none", "flip-crop", "shift"]), default="none", show_default=True)
@click.option("--freeze", multiple=True, metavar="REGEX", help="Parameters that stay as they are; may be repeated.")
@click.option("--train-text", is_flag=True, help="Zero-shot tasks: train the text tower, too.")
@click.option("--shots", type=int, help="Rows of each class to train on.  [default: all]")
@_running
def finetune(base: str, out: Path, task: str, data_dir: Path | None, force: bool, **options: Any) -> None:
    from ..data.tasks import load_task
    from ..study.train import train, train_spec

    as_json, rest = set_up(options)
    progress, device = rest.pop("progress"), rest.pop("device")
    if rest["epochs"] is None and rest["steps"] is None:
        rest["epochs"] = 3.0
    spec = train_spec(task=load_task(task), **{**rest, "freeze": list(rest["freeze"])})
    report = train(base, spec, out, data_dir=data_dir, device=device, progress=progress, force=force)
    print_report({"out": str(out), **report}, as_json, _training_text)


def _scores_text(report: Mapping[str, Any]) -> str:
    lines = [f"model      {report['model']}", f"split      {report['split']}"]
    return "\n".join([*lines, *_score_lines(report["scores"], report["primary"])])


def _score_lines(scores: Mapping[str, float], primary: str = "") -> list[str]:
    return [
        f"{name:<10} {value:.0f}" if name == "examples" else f"{name:<10} {value:.4f}" + " *" * (name == primary)
        for name, value in scores.items()
    ]


def _training_text(report: Mapping[str, Any]) -> str:
    lines = [
        f"wrote      {report['out']}",
        f"steps      {report['steps']} on {report['examples']} rows, {report['seconds']} s",
        f"loss       {report['loss']:.4f} (training, last steps)",
    ]
    if report["validation"]:
        lines += ["validation", *_score_lines(report["validation"])]
    return "\n".join(lines)
