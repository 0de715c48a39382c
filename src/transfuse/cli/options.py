"""Options of commands, made from what is declared in `options/`: names, defaults, limits, help."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import click

from ..options.declare import REQUIRED, Option, Request
from .common import set_up


class CommandOption(click.Option):
    """An option that help may list apart."""

    def __init__(self, *args: Any, expert: bool = False, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.expert = expert


class Numbers(click.ParamType):
    """Numbers with commas between them."""

    name = "numbers"

    def __init__(self, kind: type):
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        """The numbers; a default is a tuple of them."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self.kind(piece) for piece in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: {'whole ' if self.kind is int else ''}numbers with commas between them are needed")


class NumberOr(click.ParamType):
    """A number, or one of a few words."""

    name = "number"

    def __init__(self, words: tuple[str, ...]):
        self.words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        """The number or the word."""
        if value in self.words:
            return value
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r}: a number, or {', '.join(self.words)}, is needed")


def options_of(request: type[Request], *, required: Collection[str] = ()) -> Callable[[Any], Any]:
    """The options of a request, and those of reporting; the command is called with `request` and `as_json`.

    Args:
        request: its class.
        required: names of options that the command insists on.
    """
    declared = {
        name: one
        for name, (_, _, one) in request.declared().items()
        if one.flags != ()  # Python alone
    }

    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def command(**given: Any) -> Any:
            as_json, progress = set_up(given)
            asked = {name: given.pop(name) for name in declared}
            if "progress" in request.declared():
                asked["progress"] = progress
            return function(request=request.of(**asked), as_json=as_json, **given)

        for decorator in (verbose_option, quiet_option, json_option):
            command = decorator(command)
        for name, one in reversed(declared.items()):
            command = _option(name, one, required=name in required)(command)
        return command

    return decorate


def _option(name: str, declared: Option, *, required: bool) -> Callable[[Any], Any]:
    """One option of a command."""
    needed = required or declared.default is REQUIRED
    about: dict[str, Any] = {"help": declared.help, "expert": declared.expert, "metavar": declared.metavar}
    if needed:
        about["required"] = True
    elif declared.many == "repeated":
        about["multiple"] = True
    else:
        about["default"] = declared.default
        about["show_default"] = not (declared.default is None or declared.kind is bool or declared.many)
    if declared.kind is bool:
        about["is_flag"] = True
        about["show_default"] = bool(declared.default)
    else:
        about["type"] = _type(declared)
    flags = declared.flags or (f"--{name.replace('_', '-')}",)
    return click.option(*flags, name, cls=CommandOption, **about)


def _type(declared: Option) -> Any:
    """How the text of an option becomes a value. What a group checks more strictly (finite numbers) it says itself."""
    if declared.many == "commas":
        return Numbers(declared.kind)
    if declared.words:
        return NumberOr(declared.words)
    if declared.choices:
        return click.Choice(declared.choices)
    if declared.kind is Path:
        return click.Path(path_type=Path, exists=declared.exists, file_okay=not declared.exists)
    if declared.kind not in (int, float):
        return str
    low = declared.minimum if declared.above is None else declared.above
    if low is None and declared.maximum is None:
        return declared.kind
    limits: dict[str, Any] = {"min": low, "max": declared.maximum, "min_open": declared.above is not None}
    return click.IntRange(**limits) if declared.kind is int else click.FloatRange(**limits)


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress and no notes on stderr.")
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
task_option = click.option(
    "--task", required=True, metavar="TASK", help="What to measure: a YAML or JSON file, or JSON text."
)
