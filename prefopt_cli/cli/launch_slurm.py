"""`prefopt launch slurm`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefopt_cli.cli.common import DebugOption, OverridesArgument, RecipeArgument

if TYPE_CHECKING:
    from prefopt_cli.recipe.schema import Recipe

EPILOG = "Example: prefopt launch slurm my.yaml --nodes 2 --time 8:00:00 -o my.sbatch"

OutputOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write to this new file instead of standard output.",
        show_default=False,
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the file of --output.")]


def slurm(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    nodes: Annotated[
        int | None,
        typer.Option("--nodes", min=1, help="Machines; standard: launch.machines.", show_default=False),
    ] = None,
    gpus_per_node: Annotated[
        str | None,
        typer.Option(
            "--gpus-per-node",
            metavar="[TYPE:]N",
            help="GPUs of each, and processes; standard: launch.processes.",
            show_default=False,
        ),
    ] = None,
    time: Annotated[
        str | None,
        typer.Option("--time", metavar="LIMIT", help="As in 8:00:00 or 1-12:00:00.", show_default=False),
    ] = None,
    partition: Annotated[str | None, typer.Option("--partition", help="Queue.", show_default=False)] = None,
    account: Annotated[
        str | None, typer.Option("--account", help="Whom to charge.", show_default=False)
    ] = None,
    mem: Annotated[
        str | None, typer.Option("--mem", metavar="SIZE", help="Memory of a node: 64G.", show_default=False)
    ] = None,
    cpus_per_task: Annotated[
        int | None,
        typer.Option("--cpus-per-task", min=1, help="Cores of a node for the run.", show_default=False),
    ] = None,
    container: Annotated[
        str | None,
        typer.Option(
            "--container",
            metavar="IMAGE",
            help="Image with prefopt, for pyxis and enroot.",
            show_default=False,
        ),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(
            "--sbatch", metavar="NAME=VALUE", help="Any other option of sbatch: qos=high.", show_default=False
        ),
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(
            "--setup", metavar="LINE", help="Shell before the run: 'module load cuda'.", show_default=False
        ),
    ] = None,
    output: OutputOption = None,
    overwrite: OverwriteOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a batch script for Slurm.

    It trains a recipe, saves before the time limit, goes back into the queue and goes on. It runs in the present
    folder, with the present Python environment; both must lie on a disk that all nodes share.
    """
    from prefopt_cli.launch.batch_script import write_script
    from prefopt_cli.launch.slurm import SlurmOptions, slurm_script
    from prefopt_cli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    options = SlurmOptions(
        nodes=nodes or loaded.launch.machines,
        gpus_per_node=gpus_per_node if gpus_per_node is not None else _gpus(loaded),
        time=time,
        partition=partition,
        account=account,
        mem=mem,
        cpus_per_task=cpus_per_task,
        container=container,
        directives=sbatch or (),
        setup=setup or (),
    )
    text = slurm_script(recipe, overrides or (), loaded, options)
    if output is None:
        typer.echo(text, nl=False)
        return
    write_script(text, output, overwrite=overwrite)
    typer.echo(f"Wrote {output}. Submit it: sbatch {output}", err=True)


def _gpus(recipe: "Recipe") -> str:
    from prefopt_cli.errors import UserError

    if recipe.training.get("use_cpu"):
        return "0"
    if recipe.launch.processes == "auto":
        raise UserError("launch.processes is auto: say how many GPUs a node has, with --gpus-per-node.")
    return str(recipe.launch.processes)
