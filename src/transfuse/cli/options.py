"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click


def options_of(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator; help lists them in this order."""

    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


# --- what is said -------------------------------------------------------------------------------------------------

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress and no notes on stderr.")
reporting = options_of(
    json_option,
    quiet_option,
    click.option("-v", "--verbose", is_flag=True, help="Say more on stderr."),
)

# --- models and matching ------------------------------------------------------------------------------------------

common = options_of(
    click.option("--family", metavar="NAME", help="Layout family, if the config does not say it."),
    click.option(
        "--config", metavar="JSON|FILE", help="Added to the models' configs (head counts, axes of extra tensors)."
    ),
    reporting,
)


def method_option(default: str) -> Callable[[Any], Any]:
    return click.option("--method", default=default, show_default=True, help="See `transfuse methods`.")


_how = options_of(
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
        help="Further climbs from maps in part drawn anew; the best is taken.",
    ),
    click.option("--max-sweeps", type=click.IntRange(min=1), default=100, show_default=True),
    click.option(
        "--tie-qkv/--split-qkv", default=None, help="One inner map for q, k, v of a head; default: the method's."
    ),
    click.option("--paper-form", is_flag=True, help="Match heads by q, k, v alone, as the paper's eq. 7 to 9 say."),
    click.option("--device", default="cpu", show_default=True, help="Where products are computed."),
)
_data_dir = click.option(
    "--data-dir", type=click.Path(path_type=Path, exists=True, file_okay=False), help="Where local data sets lie."
)
_inputs = options_of(
    click.option(
        "--inputs",
        metavar="TASK|synthetic",
        help="Unlabelled inputs, for methods that go by activations: the data of a task (YAML or JSON), or drawn ones.",
    ),
    click.option(
        "--inputs-count", type=click.IntRange(min=2), default=512, show_default=True, help="So many of them at most."
    ),
    click.option(
        "--ridge",
        type=click.FloatRange(min=0),
        help="Of method functional: pull toward target's own weights; default: chosen on the inputs.",
    ),
    click.option("--keep-embeddings", is_flag=True, help="No task vector for tables, positions and patches (Theseus)."),
)
inputs_options = options_of(_inputs, _data_dir)  # beside `task_options`, which bring the folder: `inputs_of_task`
inputs_of_task = _inputs
matching = options_of(method_option("tied"), _how)
porting = options_of(method_option("auto"), _how)
labelled_options = options_of(
    click.option("--labelled", metavar="TASK", help="Labelled examples, by which auto takes method and scale."),
    click.option("--per-class", type=click.IntRange(min=1), default=5, show_default=True, help="So many of a class."),
)
maps_option = click.option("--maps", metavar="FILE", help="Maps from `transfuse match` of the same two bases.")
verify_option = click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Check the maps, and what is written."
)
double_option = click.option("--double", is_flag=True, help="Check in float64.")


def null_trials_option(default: int) -> Callable[[Any], Any]:
    said = "Shuffled targets of each kind in the null test; 0: none."
    return click.option("--null-trials", type=click.IntRange(min=0), default=default, show_default=True, help=said)


# --- data and outputs ---------------------------------------------------------------------------------------------

task_options = options_of(
    click.option("--task", required=True, metavar="TASK", help="What to measure: a YAML or JSON file, or JSON text."),
    _data_dir,
    click.option("--limit", type=click.IntRange(min=1), help="At most so many rows of a split, chosen by the seed."),
)
split_option = click.option(
    "--split",
    type=click.Choice(["train", "validation", "test"]),
    default="test",
    show_default=True,
    help="Which rows.",
)


def output_options(*, required: bool = True, what: str = "folder") -> Callable[[Any], Any]:
    return options_of(
        click.option("-o", "--out", required=required, type=click.Path(path_type=Path), help=f"The {what} to write."),
        click.option("--force", is_flag=True, help="Replace an existing output."),
    )
