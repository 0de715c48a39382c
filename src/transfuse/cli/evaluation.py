"""The commands that run models on data: eval, finetune."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ..options.requests import EvaluateRequest, FinetuneRequest
from .common import Command, app, print_report
from .options import options_of, task_option

_TASK = """

TASK is a YAML or JSON file, or JSON text: kind, data (path, and what else DataSpec takes), templates, max_length,
batch_size, metric. Data come from the hub or from local parquet, csv, tsv, jsonl or txt files, or folders of images;
a data set with a key `local` is taken from that folder under --data-dir where it is there.
"""


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
@task_option
@options_of(EvaluateRequest)
def evaluate(model: str, task: str, request: EvaluateRequest, as_json: bool) -> None:
    from ..data.tasks import load_task
    from ..study.evaluation import evaluate as run

    spec = load_task(task)
    scores = run(model, spec, request=request)
    report = {"model": model, "task": spec.model_dump(mode="json"), "split": request.data.split}
    print_report({**report, "primary": spec.primary, "scores": scores}, as_json, _scores_text)


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
@task_option
@options_of(FinetuneRequest)
def finetune(base: str, task: str, request: FinetuneRequest, as_json: bool) -> None:
    from ..study.evaluation import finetune as run

    print_report(run(base, task, request=request), as_json, _training_text)


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
