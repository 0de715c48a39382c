"""The command `convert`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ..options.requests import ConvertRequest
from .common import Command, app, print_report
from .options import options_of


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
@options_of(ConvertRequest)
def convert(model: str, request: ConvertRequest, as_json: bool) -> None:
    from ..porting.convert import convert as run

    print_report(run(model, **request.flat()), as_json, _text)


def _text(report: Mapping[str, Any]) -> str:
    words = f"the tokenizer of {report['tokenizer']}" if report["tokenizer"] else "no tokenizer: give one (--tokenizer)"
    return f"{report['out']}: {report['class']}, {report['tensors']} tensors, {words}"
