"""The command `convert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .common import Command, app, print_report
from .options import json_option, output_options


@app.command(
    cls=Command,
    help="""Write MODEL, a CLIP of open_clip (folder or hub id), as a model of transformers, which eval, finetune and
    bench run. With --tower text its text tower alone; MODEL may then be a CLIPModel, too.""",
    examples="""
    transfuse convert laion/CLIP-ViT-B-16-DataComp.L-s1B-b8K -o datacomp
    transfuse convert my-open-clip -o my-clip --tokenizer openai/clip-vit-base-patch16
    transfuse convert my-open-clip -o my-encoder --tower text
    """,
)
@click.argument("model")
@output_options()
@click.option("--tokenizer", metavar="MODEL", help="Whose tokenizer to take where MODEL has none.")
@click.option("--tower", type=click.Choice(["text"]), help="This tower with its projection alone.")
@json_option
def convert(model: str, out: Path, as_json: bool, **options: Any) -> None:
    from ..porting.convert import convert as run

    print_report(run(model, out, **options), as_json, _text)


def _text(report: Mapping[str, Any]) -> str:
    words = f"the tokenizer of {report['tokenizer']}" if report["tokenizer"] else "no tokenizer: give one (--tokenizer)"
    return f"{report['out']}: {report['class']}, {report['tensors']} tensors, {words}"
