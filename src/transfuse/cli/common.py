"""What all commands share: the group, help with examples, how reports are printed."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import click
from click.core import ParameterSource

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


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, "--version")
def app() -> None:
    """Carry a fine-tune over to a new release of its base model, without retraining."""


def set_up(options: dict[str, Any]) -> tuple[bool, dict[str, Any]]:
    """Logging and progress from the options of `reporting`; the rest is passed on.

    Raises:
        click.UsageError: maps and a method are given.
    """
    explicit = click.get_current_context().get_parameter_source("method") == ParameterSource.COMMANDLINE
    if options.get("maps") and explicit:
        raise click.UsageError("--maps brings its method along; leave out --method")
    if options.get("maps"):
        options.pop("method", None)  # the default, which is not what the maps were made by
    quiet, verbose = options.pop("quiet"), options.pop("verbose")
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    options["progress"] = not quiet and sys.stderr.isatty()
    if "labelled" in options:
        options["labelled"] = _labelled(options)
    if "inputs" in options:
        options["inputs"] = _inputs(options)
    return options.pop("as_json"), options


def _inputs(options: dict[str, Any]) -> Any:
    """Unlabelled inputs from `inputs_options`; they use the data folder of a task where there is one."""
    given, count = options["inputs"], options.pop("inputs_count")
    data_dir = options["data_dir"] if "task" in click.get_current_context().params else options.pop("data_dir")
    if given is None:
        return None
    from ..running.unlabelled import Inputs

    return Inputs(given, count=count, data_dir=data_dir)


def _labelled(options: dict[str, Any]) -> Any:
    given, per_class = options["labelled"], options.pop("per_class")
    if given is None:
        return None
    from ..methods.auto import Labelled

    return Labelled(given, per_class, options["data_dir"])


def print_report(report: Mapping[str, Any], as_json: bool, as_text: Callable[[Mapping[str, Any]], str]) -> None:
    click.echo(json.dumps(report, indent=2, sort_keys=True) if as_json else as_text(report).rstrip())
