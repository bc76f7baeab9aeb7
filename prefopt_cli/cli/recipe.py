"""`prefopt recipe`: the shipped recipes, starters, and the JSON Schema."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="recipe",
    help="List, show and start recipes.",
    epilog="Example: prefopt recipe new gpo --output my.yaml",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command(name="list", epilog="Example: prefopt recipe list")
def list_recipes(
    json: Annotated[bool, typer.Option("--json", help="Print a JSON list on standard output.")] = False,
) -> None:
    """List the recipes that come with prefopt."""
    from prefopt_cli.recipe.shipped import describe_recipes

    recipes = describe_recipes()
    if json:
        from json import dumps

        typer.echo(dumps([recipe.to_dict() for recipe in recipes], indent=2))
        return
    names = max((len(recipe.name) for recipe in recipes), default=0)
    methods = max((len(recipe.method) for recipe in recipes), default=0)
    for recipe in recipes:
        typer.echo(f"{recipe.name:{names}}  {recipe.method:{methods}}  {recipe.purpose}")


@app.command(epilog="Example: prefopt recipe show gpo-ultrafeedback > my.yaml")
def show(
    name: Annotated[str, typer.Argument(help="As `prefopt recipe list` prints it.", show_default=False)],
) -> None:
    """Print a shipped recipe, comments and all."""
    from prefopt_cli.recipe.shipped import shipped_file

    typer.echo(shipped_file(name).read_text(encoding="utf-8"), nl=False)


@app.command(epilog="Example: prefopt recipe new gpo --output my.yaml")
def new(
    method: Annotated[str, typer.Argument(help="The method, such as gpo.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write to this new file instead of standard output."),
    ] = None,
) -> None:
    """Print a recipe to start from, with every key explained."""
    from prefopt_cli.recipe.starter import starter_recipe, write_starter

    if output is None:
        typer.echo(starter_recipe(method), nl=False)
        return
    write_starter(method, output)
    typer.echo(f"Wrote {output}. Next: prefopt check {output}", err=True)


@app.command(epilog="Example: prefopt recipe schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON Schema of recipes, with which editors complete and check them."""
    from json import dumps

    from prefopt_cli.recipe import recipe_json_schema

    typer.echo(dumps(recipe_json_schema(), indent=2, ensure_ascii=False))
