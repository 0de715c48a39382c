"""The command `moments`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ..options.requests import MomentsRequest
from .common import RUN_MODELS, Command, app, print_report
from .options import options_of


@app.command(
    cls=Command,
    help="""Take the moments of generic inputs of MODEL, a new base: a file that `port --keep` draws inputs to keep
from, where the data themselves are not at hand."""
    + RUN_MODELS,
    examples="""
    transfuse moments new-base --inputs cifar10.yaml -o generic.safetensors
    transfuse moments new-bert --inputs wikitext.yaml --inputs-count 8192 -o generic.safetensors
    """,
)
@click.argument("model")
@options_of(MomentsRequest, required=("out",))
def moments(model: str, request: MomentsRequest, as_json: bool) -> None:
    from ..porting.moments import moments as run

    found = run(model, request=request)
    print_report({"out": str(request.output.out), "examples": found.examples, "form": found.form}, as_json, _text)


def _text(report: Mapping[str, Any]) -> str:
    return f"{report['out']}: moments of {report['examples']} inputs ({', '.join(report['form'])})"
