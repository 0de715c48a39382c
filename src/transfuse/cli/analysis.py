"""The commands around several ports: interpolate, sweep, scale, refine, merge."""

from __future__ import annotations

import math
from typing import Any

import click

from ..options.requests import InterpolateRequest, MergeRequest, RefineRequest, ScaleRequest, SweepRequest
from .analysis_text import interpolate_text, merge_text, refine_text, scale_text, sweep_text
from .common import MODELS, RUN_MODELS, Command, app, print_report
from .options import options_of, task_option


@app.command(
    cls=Command,
    help="Evaluate the line from SOURCE, carried by maps, to TARGET: loss barrier, and whether the mapped source still "
    "computes what SOURCE does." + RUN_MODELS,
    examples="""
    transfuse interpolate model-a model-b --task digits.yaml
    transfuse interpolate model-a model-b --task digits.yaml --method transfusion --skips rounded --json
    """,
)
@click.argument("source")
@click.argument("target")
@task_option
@options_of(InterpolateRequest)
def interpolate(source: str, target: str, task: str, request: InterpolateRequest, as_json: bool) -> None:
    from ..study.interpolate import interpolate as run

    curves = run(source, target, task, request=request)
    print_report(_strict({"curves": [curve.as_dict() for curve in curves]}), as_json, interpolate_text)


@app.command(
    cls=Command,
    help="Carry TUNED over to TARGET at several alphas, choose the best on validation data, score it on test data."
    + RUN_MODELS,
    examples="""
    transfuse sweep old-base my-classifier new-base --task task.yaml
    transfuse sweep old-base my-classifier new-base --task task.yaml --support other.yaml --alphas 0.25,0.5,1
    """,
)
@click.argument("source")
@click.argument("tuned")
@click.argument("target")
@task_option
@options_of(SweepRequest)
def sweep(source: str, tuned: str, target: str, task: str, request: SweepRequest, as_json: bool) -> None:
    from ..study.sweep import sweep as run

    found = run(source, tuned, target, task, request=request)
    print_report(_strict(found.as_dict()), as_json, sweep_text)


@app.command(
    cls=Command,
    help="Carry TUNED over to TARGET with one alpha for each layer (or tensor), learned from a few labelled examples."
    + RUN_MODELS,
    examples="""
    transfuse scale old-base my-classifier new-base --task task.yaml --shots 16 -o scaled
    transfuse scale old-base my-classifier new-base --task task.yaml --shots 4 --per tensor --baseline-lr 1e-5
    """,
)
@click.argument("source")
@click.argument("tuned")
@click.argument("target")
@task_option
@options_of(ScaleRequest)
def scale(source: str, tuned: str, target: str, task: str, request: ScaleRequest, as_json: bool) -> None:
    from ..study.scale import scale as run

    result = run(source, tuned, target, task, request=request)
    report = {"out": None if result.out is None else str(result.out), **result.report}
    print_report(_strict(report), as_json, scale_text)


@app.command(
    cls=Command,
    help="Carry TUNED over to TARGET and keep what goes with the loss gradients of a few labelled examples at TARGET "
    "(GradFix). No training step." + RUN_MODELS,
    examples="""
    transfuse refine old-base my-classifier new-base --task task.yaml --per-class 5 -o refined
    transfuse refine old-base my-classifier new-base --task task.yaml --per-class 5 --alpha cv --select herding
    transfuse refine old-base my-classifier new-base --task task.yaml --per-class 5 --method random   # control
    """,
)
@click.argument("source")
@click.argument("tuned")
@click.argument("target")
@task_option
@options_of(RefineRequest)
def refine(source: str, tuned: str, target: str, task: str, request: RefineRequest, as_json: bool) -> None:
    from ..study.gradfix import refine as run

    result = run(source, tuned, target, task, request=request)
    report = {"out": None if result.out is None else str(result.out), **result.report}
    print_report(_strict(report), as_json, refine_text)


@app.command(
    cls=Command,
    help="Carry several fine-tunes of SOURCE over to TARGET through one set of maps, and merge them there." + MODELS,
    examples="""
    transfuse merge old-base tune-1 tune-2 tune-3 new-base -o merged
    transfuse merge old-base tune-1 tune-2 new-base -o merged --how ties --density 0.2 --alpha 0.5
    """,
)
@click.argument("source")
@click.argument("tuned", nargs=-1, required=True)
@click.argument("target")
@options_of(MergeRequest, required=("out",))
def merge(source: str, tuned: tuple[str, ...], target: str, request: MergeRequest, as_json: bool) -> None:
    from ..porting.merge import merge as run

    result = run(source, tuned, target, request=request)
    print_report({"out": str(result.out), **result.report}, as_json, merge_text)


def _strict(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _strict(one) for key, one in value.items()}
    return [_strict(one) for one in value] if isinstance(value, list | tuple) else value
