"""`prefopt launch skypilot`."""

from typing import Annotated

import typer

from prefopt_cli.cli.common import DebugOption, OverridesArgument, RecipeArgument
from prefopt_cli.cli.launch_slurm import OutputOption, OverwriteOption

EPILOG = "Example: prefopt launch skypilot my.yaml --accelerators H100:8 -o sky.yaml"


def skypilot(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    accelerators: Annotated[
        str | None,
        typer.Option("--accelerators", metavar="NAME:N", help="GPUs of each machine.", show_default=False),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option("--nodes", min=1, help="Machines; standard: launch.machines.", show_default=False),
    ] = None,
    cloud: Annotated[
        str | None,
        typer.Option(
            "--cloud", metavar="INFRA", help="As in aws, gcp/us-central1 or k8s.", show_default=False
        ),
    ] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Machines that may be taken away.")] = False,
    disk_size: Annotated[
        int | None, typer.Option("--disk-size", min=1, metavar="GB", help="Of each.", show_default=False)
    ] = None,
    mount: Annotated[
        list[str] | None,
        typer.Option(
            "--mount",
            metavar="PLACE=SOURCE",
            help="A bucket (s3://...) to mount, or files to copy.",
            show_default=False,
        ),
    ] = None,
    volume: Annotated[
        list[str] | None,
        typer.Option(
            "--volume", metavar="PLACE=NAME", help="A volume that SkyPilot manages.", show_default=False
        ),
    ] = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a task file for SkyPilot.

    It installs prefopt on machines of a cloud and trains a recipe there. The present folder, with the recipe and
    its data, is copied to the machines.
    """
    from prefopt_cli.launch.batch_script import write_script
    from prefopt_cli.launch.resolving import resolve_launch
    from prefopt_cli.launch.skypilot import SkyOptions, notes, skypilot_task, start_command
    from prefopt_cli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    # How many machines there are may stand in a file of `launch.config`.
    found = resolve_launch(loaded.launch, {}).settings
    launch = found.model_copy(update={"config": loaded.launch.config})
    loaded = loaded.model_copy(update={"launch": launch})
    options = SkyOptions(
        nodes=nodes or loaded.launch.machines,
        accelerators=accelerators,
        cloud=cloud,
        spot=spot,
        disk_size=disk_size,
        mounts=mount or (),
        volumes=volume or (),
    )
    text = skypilot_task(recipe, overrides or (), loaded, options)
    for note in notes(recipe, loaded, options):
        typer.echo(f"Note: {note}", err=True)
    if output is None:
        typer.echo(text, nl=False)
        return
    write_script(text, output, overwrite=overwrite)
    typer.echo(f"Wrote {output}. Start it: {start_command(recipe, options, str(output))}", err=True)
