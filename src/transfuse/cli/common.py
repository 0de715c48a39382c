"""What all commands share: the group, help with examples, how reports are printed."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import click

from .._version import __version__
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
    """A command whose help lists everyday options first, and whose examples are printed as they stand."""

    def __init__(self, *args: Any, examples: str = "", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": [], "Expert options": []}
        for one in self.get_params(ctx):
            line = one.get_help_record(ctx)
            if line is not None and not isinstance(one, click.Argument):
                sections["Expert options" if getattr(one, "expert", False) else "Options"].append(line)
        for title, lines in sections.items():
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines)

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


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version")
def app() -> None:
    """Carry a fine-tune over to a new release of its base model, without retraining."""


def set_up(given: dict[str, Any]) -> tuple[bool, bool]:
    """Logging from the options of reporting, which are taken out; whether to print JSON, and whether to show bars."""
    quiet, verbose = given.pop("quiet"), given.pop("verbose")
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    return given.pop("as_json"), not quiet and sys.stderr.isatty()


def print_report(report: Mapping[str, Any], as_json: bool, as_text: Callable[[Mapping[str, Any]], str]) -> None:
    click.echo(json.dumps(report, indent=2, sort_keys=True) if as_json else as_text(report).rstrip())
