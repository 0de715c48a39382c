"""What all commands share: the group, help with examples, common options, how reports are printed."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import click

from .. import __version__
from ..errors import TransfuseError

MODELS = """

Models are directories (Hugging Face, open_clip, timm), single .safetensors/.pt files with --family and --config, or hub
ids (org/name, org/name@revision).
"""


RUN_MODELS = """

Models are directories or hub ids (org/name, org/name@revision) in the format of transformers: they are run on data.
`transfuse convert` makes one of an open_clip CLIP.
"""


class Command(click.Command):
    """A command whose examples are printed as they stand."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for line in self.examples.strip().splitlines():
                formatter.write(f"  {line.strip()}\n")


class Group(click.Group):
    """Turns the project's errors into one line on stderr and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TransfuseError as error:
            click.echo(f"transfuse: {error}", err=True)
            ctx.exit(error.exit_code)


def options_of(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


common = options_of(
    click.option("--family", metavar="NAME", help="Layout family, if the config does not say it."),
    click.option(
        "--config", metavar="JSON|FILE", help="Added to the models' configs (head counts, axes of extra tensors)."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    click.option("-q", "--quiet", is_flag=True, help="No progress and no notes on stderr."),
    click.option("-v", "--verbose", is_flag=True, help="Say more on stderr."),
)


def null_trials_option(default: int) -> Callable[[Any], Any]:
    said = "Shuffled targets of each kind in the null test; 0: none."
    return click.option("--null-trials", type=click.IntRange(min=0), default=default, show_default=True, help=said)


matching = options_of(
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


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version")
def app() -> None:
    """Carry a fine-tune over to a new release of its base model, without retraining."""


def set_up(options: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Logging and progress from the common options; the rest is passed on."""
    quiet, verbose = options.pop("quiet"), options.pop("verbose")
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    options["progress"] = not quiet and sys.stderr.isatty()
    return options.pop("as_json"), options


def print_report(report: Mapping[str, Any], as_json: bool, as_text: Callable[[Mapping[str, Any]], str]) -> None:
    click.echo(json.dumps(report, indent=2, sort_keys=True) if as_json else as_text(report).rstrip())
