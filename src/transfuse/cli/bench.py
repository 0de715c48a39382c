"""The command `transfuse bench`."""

from __future__ import annotations

import json

import click

from ..options.requests import BenchRequest
from .common import Command, app
from .options import options_of


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
@click.option("--list", "list_them", is_flag=True, help="List the shipped recipes.")
@options_of(BenchRequest)
def bench(recipe: str | None, list_them: bool, request: BenchRequest, as_json: bool) -> None:
    from ..bench.recipes.reading import load_recipe, shipped_recipes
    from ..bench.run import resolve, run_bench

    if list_them:
        titles = {name: load_recipe(name).title for name in shipped_recipes()}
        listed = "\n".join(f"{name:<32} {title}" for name, title in titles.items())
        click.echo(json.dumps(titles, indent=2) if as_json else listed)
        return
    out, how, data = request.output.out, request.bench, request.data
    if recipe is None or out is None:
        raise click.UsageError("give a recipe and the folder for its results (-o), or --list")
    asked = {"seeds": how.seeds, "limit": data.limit}
    found = load_recipe(recipe, how.override)
    resolved = resolve(found, quick_run=how.quick, tiny_run=how.tiny, data_dir=data.data_dir, **asked)
    about = {**asked, "quick": how.quick, "tiny": how.tiny, "override": how.override, "recipe": recipe}
    # Its progress is lines, which a log can take as well as a terminal.
    request = request.changed(progress=not click.get_current_context().params["quiet"])
    finished = run_bench(resolved, out, request=request, about=about)
    click.echo(
        json.dumps(finished.result, indent=1) if as_json else f"{out / 'report.html'}\n\n{finished.tables}".rstrip()
    )
    for one in finished.failures:
        click.echo(f"FAILED {one.what}: {one.error}", err=True)
    if finished.failures:
        click.get_current_context().exit(1)
