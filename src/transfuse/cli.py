"""The command `transfuse`. Data goes to stdout, words and progress to stderr.

Exit codes: 0 ok, 1 failure, 2 usage or bad input, 3 a verification failed.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from . import __version__
from .errors import InputError, TransfuseError

_MODELS = """

Models are directories (Hugging Face, open_clip, timm), single .safetensors/.pt files with --family and --config, or hub
ids (org/name, org/name@revision).
"""


class _Command(click.Command):
    """A command whose examples are printed as they stand."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for line in self.examples.strip().splitlines():
                formatter.write(f"  {line.strip()}\n")


class _Group(click.Group):
    """Turns the project's errors into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TransfuseError as error:
            click.echo(f"transfuse: {error}", err=True)
            ctx.exit(error.exit_code)


def _options(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_common = _options(
    click.option("--family", metavar="NAME", help="Layout family, if the config does not say it."),
    click.option(
        "--config", metavar="JSON|FILE", help="Added to the models' configs (head counts, axes of extra tensors)."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="No progress and no notes on stderr."),
    click.option("-v", "--verbose", is_flag=True, help="Say more on stderr."),
)


def _null_trials(default: int) -> Callable[[Any], Any]:
    said = "Shuffled targets of each kind in the null test; 0: none."
    return click.option("--null-trials", type=click.IntRange(min=0), default=default, show_default=True, help=said)


_matching = _options(
    click.option("--method", default="tied", show_default=True, help="See `transfuse methods`."),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**62),
        default=0,
        show_default=True,
        help="Of restarts, the null test and the random control.",
    ),
    click.option(
        "--restarts",
        type=click.IntRange(min=0),
        default=0,
        show_default=True,
        help="Further climbs in random order; the best is taken.",
    ),
    click.option("--max-sweeps", type=click.IntRange(min=1), default=100, show_default=True),
    click.option(
        "--tie-qkv/--split-qkv", default=None, help="One inner map for q, k, v of a head; default: the method's."
    ),
    click.option("--spectra-output", is_flag=True, help="Head spectra include the output projection (authors' code)."),
    click.option("--device", default="cpu", show_default=True, help="Where products are computed."),
)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version")
def app() -> None:
    """Carry a fine-tune over to a new release of its base model, without retraining."""


@app.command(
    cls=_Command,
    help="Look at a model, at a fine-tune of it, and at a new base, before porting." + _MODELS,
    examples="""
    transfuse inspect bert-base-uncased
    transfuse inspect old-base --tuned my-classifier --target new-base
    transfuse inspect encoder.pt --family torch_encoder --config '{"nhead": 8}'
    """,
)
@click.argument("source")
@click.option("--tuned", help="A fine-tune of SOURCE.")
@click.option("--target", help="The new base.")
@_null_trials(3)
@_matching
@_common
def inspect(source: str, tuned: str | None, target: str | None, **options: Any) -> None:
    from .inspection import inspect_models

    as_json, rest = _set_up(options)
    report = inspect_models(source, tuned, target, **rest)
    _print(report, as_json, _inspect_text)


@app.command(
    cls=_Command,
    help="Find which unit of SOURCE is which unit of TARGET and write the maps, for any number of ports." + _MODELS,
    examples="""
    transfuse match old-base new-base -o maps.safetensors
    transfuse match old-base new-base --method transfusion -o maps.safetensors --json
    """,
)
@click.argument("source")
@click.argument("target")
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The maps file to write.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@_null_trials(1)
@_matching
@_common
def match(source: str, target: str, out: Path, force: bool, null_trials: int, **options: Any) -> None:
    from .maps import check_maps_output
    from .match import MatchOptions, match_models, stored_null
    from .methods import get_method
    from .models import open_models
    from .relation import relation

    as_json, rest = _set_up(options)
    check_maps_output(out, force=force)
    progress, row = rest.pop("progress"), get_method(rest.pop("method"))
    models = open_models(
        source, target, family=rest.pop("family"), config=rest.pop("config"), need_layout=row.group != "identity"
    )
    maps = match_models(models, row, MatchOptions(**rest), null_trials=null_trials, progress=progress)
    related = relation(models, maps, stored_null(maps)).as_dict()
    maps.save(out)
    report = {"out": str(out), "method": row.name, **maps.report, "relation": related}
    _print(report, as_json, _match_text)


@app.command(
    cls=_Command,
    help="Carry the fine-tune TUNED of SOURCE over to TARGET: align, transport, check, write." + _MODELS,
    examples="""
    transfuse port old-base my-classifier new-base -o ported
    transfuse port old-base my-classifier new-base -o ported --method transfusion --alpha 0.8
    transfuse port old-base another-tune new-base -o ported2 --maps maps.safetensors
    transfuse port old-base my-classifier new-base --dry-run
    """,
)
@click.argument("source")
@click.argument("tuned")
@click.argument("target")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--alpha", default=1.0, show_default=True, help="Scale of the task vector.")
@click.option("--maps", metavar="FILE", help="Maps from `transfuse match` of the same two bases.")
@click.option("--verify/--no-verify", default=True, show_default=True, help="Check the maps and the output.")
@click.option("--double", is_flag=True, help="Check in float64.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; match and write nothing.")
@_null_trials(1)
@_matching
@_common
def port(source: str, tuned: str, target: str, out: Path | None, dry_run: bool, **options: Any) -> None:
    from .port import port as run

    as_json, rest = _set_up(options)
    if out is None and not dry_run:
        raise click.UsageError("give the folder to write with -o, or --dry-run")
    explicit = click.get_current_context().get_parameter_source("method") == ParameterSource.COMMANDLINE
    if options["maps"] and explicit:
        raise click.UsageError("--maps brings its method along; leave out --method")
    started = time.monotonic()
    result = run(source, tuned, target, out=out, dry_run=dry_run, **rest)
    if out is not None and not dry_run and rest["progress"]:
        click.echo(f"wrote {out} in {time.monotonic() - started:.1f} s", err=True)
    _print({"out": None if dry_run else str(out), **result.report}, as_json, _port_text)


@app.command(
    cls=_Command,
    help="Run a model against itself mapped by MAPS, on seeded inputs: the outputs must agree." + _MODELS,
    examples="""
    transfuse verify old-base maps.safetensors
    transfuse verify old-base maps.safetensors --double --json
    """,
)
@click.argument("source")
@click.argument("maps")
@click.option("--double", is_flag=True, help="Compute in float64.")
@click.option("--seed", default=0, show_default=True, help="Of the inputs.")
@_common
def verify(source: str, maps: str, double: bool, seed: int, **options: Any) -> None:
    from .errors import VerificationError
    from .maps import Maps
    from .models import open_models
    from .verify import check_equivalence

    as_json, rest = _set_up(options)
    found = Maps.load(maps)
    models = open_models(source, source, family=rest["family"] or found.family or None, config=rest["config"])
    if found.source != models.source.checkpoint.fingerprint():
        raise InputError(f"{maps} was made for another source than {source} (fingerprints differ)")
    checked = check_equivalence(models.source, models.layout, found, seed=seed, double=double)
    _print(checked.as_dict(), as_json, _equivalence_text)
    if checked.passed is not True:
        raise VerificationError(checked.reason or f"the mapped model differs by {checked.error:.1e}")


@app.command(
    cls=_Command,
    help="List the methods: what each needs, what it guarantees, where it is from.",
    examples="""
    transfuse methods
    transfuse methods --json
    """,
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def methods(as_json: bool) -> None:
    from dataclasses import asdict

    from .methods import METHODS

    _print({name: asdict(row) for name, row in METHODS.items()}, as_json, _methods_text)


@app.command(
    cls=_Command,
    help="Train tiny ViTs on real digits, port a fine-tune to three new bases by every method, and show what worked.",
    examples="""
    transfuse demo -o demo-out
    """,
)
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no messages.")
def demo(out: Path, seed: int, as_json: bool, quiet: bool) -> None:
    from .demo import run_demo

    def say(line: str) -> None:
        if not quiet:
            click.echo(line, err=True)

    report = run_demo(out, seed=seed, progress=say)
    _print(report, as_json, lambda _: (out / "table.md").read_text(encoding="utf-8"))


def _set_up(options: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Logging and progress from the common options; the rest is passed on."""
    quiet, verbose = options.pop("quiet"), options.pop("verbose")
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    options["progress"] = not quiet and sys.stderr.isatty()
    return options.pop("as_json"), options


def _print(report: Mapping[str, Any], as_json: bool, as_text: Callable[[Mapping[str, Any]], str]) -> None:
    click.echo(json.dumps(report, indent=2, sort_keys=True) if as_json else as_text(report).rstrip())


def _inspect_text(report: Mapping[str, Any]) -> str:
    lines = [f"family     {report['family'] or 'unknown (only naive and random can port it)'}"]
    for tower, facts in report["towers"].items():
        said = ", ".join(
            f"{value} {key}" if isinstance(value, int) else f"{key} {value}" for key, value in facts.items()
        )
        lines.append(f"{tower or 'model':<10} {said}")
    for role, about in report["models"].items():
        lines.append(
            f"{role:<10} {about['location']}: {' '.join(about['architectures']) or about['kind']}, "
            f"{about['parameters']:,} parameters in {about['tensors']} tensors and {about['files']} files, "
            f"{', '.join(about['dtypes'])}" + (f", vocabulary {about['vocabulary']}" if about["vocabulary"] else "")
        )
        lines += [f"           shared: {one} = {other}" for one, other in about["tied"].items()]
    if "delta" in report:
        lines += _delta_lines(report["delta"])
    if "relation" in report:
        lines += _relation_lines(report["relation"])
    for action, names in report.get("plan", {}).items():
        shown = "" if action == "add" else ": " + ", ".join(names[:6]) + (" ..." if len(names) > 6 else "")
        lines.append(f"{action:<10} {len(names)} tensors{shown}")
    return "\n".join(lines)


def _delta_lines(delta: Mapping[str, Any]) -> list[str]:
    said = {
        "fine-tune": "tuned is a fine-tune of source",
        "head-only": "the body is source's own; only a head is new",
        "large": "WARNING: a very large change for a fine-tune; is source really its base?",
        "unrelated": "WARNING: larger than the weights themselves: source is not the base of tuned",
    }[delta["verdict"]]
    shares = {part: "new" if value is None else f"{value:.3f}" for part, value in delta["parts"].items()}
    parts = ", ".join(f"{part} {share}" for part, share in shares.items())
    return [f"delta      {delta['relative_norm']:.4f} of the weights' norm: {said}", f"           {parts}"]


def _relation_lines(found: Mapping[str, Any]) -> list[str]:
    lines = [f"relation   {found['verdict']}: {found['text']}"]
    for tower, cosine in found["cosines"].items():
        label = "layers" if tower == "model" else f"{tower} layers"
        line = f"           {label}: cosine of the weights as they are {cosine:.4f}"
        if null := (found["null"] or {}).get(tower):
            entries, orders = (sum(null[key]) / len(null[key]) for key in ("entries", "orders"))
            line += (
                f", after matching {null['matched']:.4f}; by chance {max(entries, orders):.4f} "
                f"(ratio {null['ratio']:.2f}, z {null['z']:.1f})"
            )
        lines.append(line)
    return lines


def _match_lines(found: Mapping[str, Any]) -> list[str]:
    if not found:
        return []
    good = " (the identity is as good)" if found["identity_is_as_good"] else ""
    return [
        f"matching   {found['sweeps']} sweeps, similarity {found['similarity_identity']:.4f} -> "
        f"{found['similarity_matched']:.4f}{good}"
    ]


def _match_text(report: Mapping[str, Any]) -> str:
    lines = _match_lines(report if "sweeps" in report else {}) + _relation_lines(report["relation"])
    return "\n".join([*lines, f"maps       {report['out']}"])


def _port_text(report: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{action} {count}" for action, count in report["tensors"].items())
    lines = [f"method     {report['method']}, alpha {report['alpha']}", *_delta_lines(report["delta"])]
    if "relation" in report:
        lines += [*_match_lines(report["match"]), *_relation_lines(report["relation"])]
    lines.append(f"tensors    {counts}" + (f" (carried: {', '.join(report['carried'])})" if report["carried"] else ""))
    if report.get("equivalence"):
        lines.append(_equivalence_text(report["equivalence"]))
    if report.get("lost_updates") is not None:
        lines.append(f"rounding   {report['lost_updates']:.2%} of the updates lost in the target's dtype")
    if report.get("loads"):
        lines.append(f"loads      {report['loads']}")
    return "\n".join([*lines, f"output     {report['out'] or 'nothing written (dry run)'}"])


def _equivalence_text(found: Mapping[str, Any]) -> str:
    if found["error"] is None:
        return f"verified   not run: {found['reason']}"
    word = "ok" if found["passed"] else "FAILED"
    note = f"; {found['reason']}" if found["reason"] else ""
    where = f"{found['checked']} ({found['dtype']})"
    return f"verified   {word}: mapped source differs by {found['error']:.1e} in {where}{note}"


def _methods_text(rows: Mapping[str, Any]) -> str:
    lines = [
        f"{'method':<12} {'evidence':<9} {'group':<12} {'heads':<14} {'streams':<9} {'function':<8} "
        f"{'exportable':<10} paper"
    ]
    for name, row in rows.items():
        kept = "exact" if row["exact"] else "approx."
        lines.append(
            f"{name:<12} {row['evidence']:<9} {row['group']:<12} {row['heads']:<14} {row['streams']:<9} {kept:<8} "
            f"{'yes' if row['exportable'] else 'no':<10} {row['paper']}\n{'':<12} {row['summary']}"
        )
    return "\n".join(lines)


def main() -> None:
    """Entry point of the console script."""
    # As Ctrl-C, so that half-written outputs are cleaned away.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
