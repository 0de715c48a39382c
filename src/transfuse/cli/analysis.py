"""The commands around several ports: interpolate, sweep, scale, refine, merge."""

from __future__ import annotations

import math
from typing import Any

import click

from .analysis_text import interpolate_text, merge_text, refine_text, scale_text, sweep_text
from .common import MODELS, RUN_MODELS, Command, app, print_report, set_up
from .options import (
    common,
    double_option,
    inputs_of_task,
    inputs_options,
    maps_option,
    matching,
    null_trials_option,
    output_options,
    split_option,
    task_options,
    verify_option,
)


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
@task_options
@split_option
@click.option("--points", type=click.IntRange(min=2), default=11, show_default=True, help="Points on the line.")
@click.option(
    "--skips",
    type=click.Choice(["identity", "linear", "rounded"]),
    help="Form of permuted skips, for methods that need them; default: linear and rounded, a curve each.",
)
@maps_option
@matching
@inputs_of_task
@common
def interpolate(source: str, target: str, task: str, points: int, **options: Any) -> None:
    from ..data.tasks import load_task
    from ..study.interpolate import interpolate as run

    as_json, rest = set_up(options)
    lambdas = [i / (points - 1) for i in range(points)]
    curves = run(source, target, load_task(task), lambdas=lambdas, **rest)
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
@task_options
@click.option("--support", metavar="TASK", help="Another task: what the task vector does to it.")
@click.option("--alphas", metavar="A,B,...", help="Scales to try; default 0.1 to 1 in tenths.")
@click.option("--choose-on", type=click.Choice(["validation", "test"]), default="validation", show_default=True)
@click.option("--allow-test", is_flag=True, help="Choose on test data all the same; the test score then says nothing.")
@maps_option
@verify_option
@null_trials_option(1)
@matching
@inputs_of_task
@common
def sweep(
    source: str, tuned: str, target: str, task: str, support: str | None, alphas: str | None, **options: Any
) -> None:
    from ..data.tasks import load_task
    from ..study.sweep import ALPHAS
    from ..study.sweep import sweep as run

    as_json, rest = set_up(options)
    found = run(
        source,
        tuned,
        target,
        load_task(task),
        support=None if support is None else load_task(support),
        alphas=ALPHAS if alphas is None else _numbers(alphas),
        **rest,
    )
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
@task_options
@click.option("--shots", type=click.IntRange(min=1), required=True, help="Labelled examples of each class.")
@click.option("--per", type=click.Choice(["layer", "tensor"]), default="layer", show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=100, show_default=True)
@click.option("--lr", default=0.05, show_default=True, help="Learning rate of the alphas.")
@click.option("--init", default=0.0, show_default=True, help="Where the alphas start; 0: at the target.")
@click.option(
    "--baseline-lr", type=float, help="Fine-tune the target on the same examples too, with this learning rate."
)
@output_options(required=False)
@maps_option
@verify_option
@null_trials_option(1)
@matching
@inputs_of_task
@common
def scale(source: str, tuned: str, target: str, task: str, **options: Any) -> None:
    from ..data.tasks import load_task
    from ..study.scale import scale as run

    as_json, rest = set_up(options)
    result = run(source, tuned, target, load_task(task), **rest)
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
@task_options
@click.option(
    "--per-class", type=click.IntRange(min=1), required=True, help="Labelled examples of each class (blocks in all)."
)
@click.option(
    "--select",
    type=click.Choice(["random", "herding", "k-medoid", "coreset"]),
    default="random",
    show_default=True,
    help="Which examples; all but random go by TARGET's features.",
)
@click.option("--pool", type=click.IntRange(min=1), help="At most so many training rows to choose from; default: all.")
@click.option("--vote", type=click.Choice(["majority", "mean"]), default="majority", show_default=True)
@click.option(
    "--ties",
    type=click.Choice(["mean", "drop", "keep"]),
    default="mean",
    show_default=True,
    help="Entries with as many votes for as against: the mean gradient decides, or they are left out, or kept.",
)
@click.option(
    "--mode",
    type=click.Choice(["normal", "force", "soft-share", "soft-sigmoid", "random", "oracle"]),
    default="normal",
    show_default=True,
    help="The mask; random and oracle are controls.",
)
@click.option("--power", default=2.0, show_default=True, help="Of mode soft-share.")
@click.option("--temperature", default=0.25, show_default=True, help="Of mode soft-sigmoid.")
@click.option("--oracle", metavar="MODEL", help="TARGET's own fine-tune, for mode oracle.")
@click.option(
    "--alpha", default="1", show_default=True, metavar="A|cv", help="Scale of the rest, or cv: by cross-validation."
)
@click.option("--alphas", metavar="A,B,...", help="Candidates of --alpha cv, besides 0; default 0.1 to 1 in tenths.")
@click.option("--folds", type=click.IntRange(min=2), default=4, show_default=True, help="Of --alpha cv.")
@click.option("--micro-batch", type=click.IntRange(min=1), help="Gradients held at once; default: up to 1 GB of them.")
@output_options(required=False)
@maps_option
@verify_option
@null_trials_option(1)
@matching
@inputs_of_task
@common
def refine(source: str, tuned: str, target: str, task: str, alpha: str, alphas: str | None, **options: Any) -> None:
    from ..data.tasks import load_task
    from ..study.gradfix import refine as run
    from ..study.sweep import ALPHAS

    as_json, rest = set_up(options)
    rest["alpha"] = "cv" if alpha == "cv" else _number(alpha)
    rest["alphas"] = ALPHAS if alphas is None else _numbers(alphas)
    result = run(source, tuned, target, load_task(task), **rest)
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
@output_options()
@click.option("--how", type=click.Choice(["sum", "mean", "ties", "dare"]), default="sum", show_default=True)
@click.option("--density", type=float, help="Share of entries that ties and dare keep; default 0.2 and 0.1.")
@click.option("--alpha", default=1.0, show_default=True, help="Scale of the merged task vector.")
@double_option
@maps_option
@verify_option
@null_trials_option(1)
@matching
@inputs_options
@common
def merge(source: str, tuned: tuple[str, ...], target: str, **options: Any) -> None:
    from ..porting.merge import merge as run

    as_json, rest = set_up(options)
    result = run(source, target, tuned, **rest)
    print_report({"out": str(result.out), **result.report}, as_json, merge_text)


def _numbers(text: str) -> list[float]:
    try:
        return [float(piece) for piece in text.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--alphas {text!r}: numbers with commas between them are needed") from error


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise click.UsageError(f"--alpha {text!r}: a number, or cv, is needed") from error


def _strict(value: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _strict(one) for key, one in value.items()}
    return [_strict(one) for one in value] if isinstance(value, list | tuple) else value
