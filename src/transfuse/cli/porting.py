"""The commands around one port: inspect, match, port, verify, methods, demo."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ..errors import InputError
from ..options.requests import InspectRequest, MatchRequest, PortRequest, VerifyRequest
from .common import MODELS, Command, app, print_report
from .options import json_option, options_of, quiet_option
from .text import equivalence_text, inspect_text, match_text, methods_text, port_text


@app.command(
    cls=Command,
    help="Look at a model, at a fine-tune of it, and at a new base, before porting." + MODELS,
    examples="""
    transfuse inspect bert-base-uncased
    transfuse inspect old-base --tuned my-classifier --target new-base
    transfuse inspect encoder.pt --family torch_encoder --config '{"nhead": 8}'
    """,
)
@click.argument("source")
@click.option("--tuned", help="A fine-tune of SOURCE.")
@click.option("--target", help="The new base.")
@options_of(InspectRequest)
def inspect(source: str, tuned: str | None, target: str | None, request: InspectRequest, as_json: bool) -> None:
    from ..porting.inspection import inspect_models

    report = inspect_models(source, tuned, target, request=request)
    print_report(report, as_json, inspect_text)


@app.command(
    cls=Command,
    help="Find which unit of SOURCE is which unit of TARGET and write the maps, for any number of ports." + MODELS,
    examples="""
    transfuse match old-base new-base -o maps.safetensors
    transfuse match old-base new-base --method transfusion -o maps.safetensors --json
    """,
)
@click.argument("source")
@click.argument("target")
@options_of(MatchRequest, required=("out",))
def match(source: str, target: str, request: MatchRequest, as_json: bool) -> None:
    from ..evidence.null import stored_null
    from ..evidence.relation import relation
    from ..methods.match import match_bases

    models, maps = match_bases(source, target, request)
    related = relation(models, maps, stored_null(maps)).as_dict()
    report = {"out": str(request.output.out), "method": maps.method, **maps.report, "relation": related}
    print_report(report, as_json, match_text)


@app.command(
    cls=Command,
    help="Carry the fine-tune TUNED of SOURCE over to TARGET: align, transport, check, write." + MODELS,
    examples="""
    transfuse port old-base my-classifier new-base -o ported
    transfuse port old-base my-classifier new-base -o ported --inputs task.yaml
    transfuse port old-base my-classifier new-base -o ported --inputs task.yaml --keep generic.safetensors
    transfuse port old-base my-classifier new-base -o ported --method transfusion --alpha 0.8
    transfuse port old-base another-tune new-base -o ported2 --maps maps.safetensors
    transfuse port old-base my-classifier new-base --dry-run
    """,
)
@click.argument("source")
@click.argument("tuned")
@click.argument("target")
@options_of(PortRequest)
def port(source: str, tuned: str, target: str, request: PortRequest, as_json: bool) -> None:
    from ..porting.port import port as run

    out = None if request.output.dry_run else request.output.out
    if out is None and not request.output.dry_run:
        raise click.UsageError("give the folder to write with -o, or --dry-run")
    started = time.monotonic()
    result = run(source, tuned, target, request=request)
    if out is not None and request.run.progress:
        click.echo(f"wrote {out} in {time.monotonic() - started:.1f} s", err=True)
    print_report({"out": None if out is None else str(out), **result.report}, as_json, port_text)


@app.command(
    cls=Command,
    help="Run a model against itself mapped by MAPS, on seeded inputs: the outputs must agree." + MODELS,
    examples="""
    transfuse verify old-base maps.safetensors
    transfuse verify old-base maps.safetensors --double --json
    """,
)
@click.argument("source")
@click.argument("maps")
@options_of(VerifyRequest)
def verify(source: str, maps: str, request: VerifyRequest, as_json: bool) -> None:
    from ..errors import VerificationError
    from ..maps.collection import Maps
    from ..models.opening import open_models
    from ..porting.verify import check_equivalence

    found = Maps.load(maps)
    if any(one.source_size != one.size for one in found.spaces.values()):
        raise InputError(f"{maps} leads to a base of another width, which source cannot be rewritten for")
    family = request.opening.family or found.family or None
    models = open_models(source, source, family=family, config=request.opening.config)
    if found.source != models.source.checkpoint.fingerprint():
        raise InputError(
            f"{maps} was made for another source than {source} (fingerprints differ), or for it as a target with "
            "another vocabulary or image size sees it"
        )
    asked = {"seed": request.run.seed, "double": request.check.double}
    checked = check_equivalence(models.source, models.layout, found, **asked)
    print_report(checked.as_dict(), as_json, equivalence_text)
    if checked.passed is not True:
        raise VerificationError(checked.reason or f"the mapped model differs by {checked.error:.1e}")


@app.command(
    cls=Command,
    help="List the methods: what each needs, what it guarantees, where it is from.",
    examples="""
    transfuse methods
    transfuse methods --json
    """,
)
@json_option
def methods(as_json: bool) -> None:
    from ..methods.table import METHODS

    rows = {name: row.describe() for name, row in METHODS.items()}
    print_report(rows, as_json, lambda _: methods_text(METHODS.values()))


@app.command(
    cls=Command,
    help="Train tiny ViTs on real digits, port a fine-tune to three new bases by every method, and show what worked.",
    examples="""
    transfuse demo -o demo-out
    """,
)
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True)
@click.option("--seed", default=0, show_default=True)
@json_option
@quiet_option
def demo(out: Path, seed: int, as_json: bool, quiet: bool) -> None:
    from ..demo.run import run_demo

    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    report = run_demo(out, seed=seed, progress=say)
    print_report(report, as_json, lambda _: (out / "table.md").read_text(encoding="utf-8"))
