"""The command `transfuse bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .common import Command, app


def _numbers(_: Any, __: Any, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(one) for one in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of whole numbers such as 0,1,2") from error


@app.command(
    cls=Command,
    help="""Run a RECIPE: make its models, measure every method on every target, and write tables, figures and a report.

    RECIPE is a YAML file or the name of a shipped recipe (--list). Models and finished measurements are cached, for
    all recipes: a run that was stopped goes on where it was.
    """,
    examples="""
    transfuse bench --list
    transfuse bench table1-clip-vitb16-small -o table1 --data-dir data
    transfuse bench table1-clip-vitb16-small -o quick --data-dir data --quick
    transfuse bench table1-clip-vitb16 -o dry --data-dir data --tiny
    transfuse bench recipe.yaml -o out --only transport --override transport.null_trials=3
    """,
)
@click.argument("recipe", required=False)
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder for the results.")
@click.option("--list", "list_them", is_flag=True, help="List the shipped recipes.")
@click.option("--data-dir", type=click.Path(path_type=Path), metavar="DIR", help="Folder with local data sets.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where models and measurements are kept. [default: $TRANSFUSE_CACHE or ~/.cache/transfuse]",
)
@click.option("--seeds", callback=_numbers, metavar="0,1,...", help="Instead of the recipe's.")
@click.option(
    "--limit", type=click.IntRange(min=1), metavar="N", help="Rows at most of every data set, trainings included."
)
@click.option("--quick", is_flag=True, help="The recipe's short form.")
@click.option("--tiny", is_flag=True, help="Dry run: tiny random models of the same classes, data from --data-dir.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(["transport", "alpha", "fewshot", "interpolation"]),
    help="These sections only; may be repeated.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes. [default: one a core, four at most]")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of each process.")
@click.option("--device", default="cpu", show_default=True, help="Where models run.")
@click.option("--override", multiple=True, metavar="KEY.PATH=VALUE", help="Changes the recipe; may be repeated.")
@click.option("--json", "as_json", is_flag=True, help="Print result.json on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
def bench(recipe: str | None, out: Path | None, list_them: bool, as_json: bool, quiet: bool, **options: Any) -> None:
    from ..bench.recipes.reading import load_recipe, shipped_recipes
    from ..bench.run import resolve, run_bench

    if list_them:
        click.echo("\n".join(f"{name:<32} {load_recipe(name).title}" for name in shipped_recipes()))
        return
    if recipe is None or out is None:
        raise click.UsageError("give a recipe and the folder for its results (-o), or --list")
    found = load_recipe(recipe, options["override"])
    asked = {"quick_run": options["quick"], "tiny_run": options["tiny"], "seeds": options["seeds"]}
    resolved = resolve(found, **asked, limit=options["limit"], data_dir=options["data_dir"])
    finished = run_bench(
        resolved,
        out,
        **{key: options[key] for key in ("cache", "data_dir", "only", "workers", "threads", "device")},
        progress=not quiet,
        options={key: options[key] for key in ("quick", "tiny", "seeds", "limit", "override")} | {"recipe": recipe},
    )
    click.echo(
        json.dumps(finished.result, indent=1) if as_json else f"{out / 'report.html'}\n\n{finished.tables}".rstrip()
    )
    for one in finished.failures:
        click.echo(f"FAILED {one.what}: {one.error}", err=True)
    if finished.failures:
        click.get_current_context().exit(1)
