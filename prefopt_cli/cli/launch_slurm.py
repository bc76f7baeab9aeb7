"""`prefopt launch slurm`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefopt_cli.cli.common import DebugOption, OverridesArgument

if TYPE_CHECKING:
    from prefopt_cli.launch.batch_script import Work
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
    recipe: Annotated[str, typer.Argument(help="Path of a YAML recipe, or of a chain.", show_default=False)],
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
        str | None,
        typer.Option(
            "--mem",
            metavar="SIZE",
            help="Memory of a node: 64G; 0: all of it; standard: 40G for each GPU, or all with --sbatch exclusive.",
            show_default=False,
        ),
    ] = None,
    cpus_per_task: Annotated[
        int | None,
        typer.Option(
            "--cpus-per-task",
            min=1,
            help="Cores of a node for the run; standard: 8 for each GPU; without GPUs, one for each process.",
            show_default=False,
        ),
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
    container_mount: Annotated[
        list[str] | None,
        typer.Option(
            "--container-mount",
            metavar="HOST[:CONTAINER]",
            help="Another folder that the container sees.",
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

    It trains a recipe or a chain, saves before the time limit, goes back into the queue and goes on. It runs in the
    present folder, with the present Python environment; both must lie on a disk that all nodes share.
    """
    from prefopt_cli.errors import UserError
    from prefopt_cli.launch.batch_script import write_script
    from prefopt_cli.launch.slurm import script_of
    from prefopt_cli.launch.slurm_options import SlurmOptions, with_defaults

    if container_mount and container is None:
        raise UserError("--container-mount is for a container; add --container IMAGE.")
    work, on_cpu = _work(recipe, overrides or [])
    options = SlurmOptions(
        nodes=nodes or work.launch.machines,
        gpus_per_node=gpus_per_node if gpus_per_node is not None else _gpus(work, on_cpu=on_cpu),
        time=time,
        partition=partition,
        account=account,
        mem=mem,
        cpus_per_task=cpus_per_task,
        container=container,
        container_mounts=container_mount or (),
        directives=sbatch or (),
        setup=setup or (),
    )
    options, assumed = with_defaults(options, work)
    text = script_of(work, options)
    if output is None:
        typer.echo(text, nl=False)
    else:
        write_script(text, output, overwrite=overwrite)
    if assumed is not None:
        typer.echo(assumed, err=True)
    if output is not None:
        typer.echo(f"Wrote {output}. Submit it: sbatch {output}", err=True)


def _work(path: str, overrides: list[str]) -> "tuple[Work, bool]":
    """What the job is to do, and whether it keeps off GPUs."""
    from dataclasses import replace

    from prefopt_cli.launch.batch_script import training
    from prefopt_cli.launch.resolving import resolve_launch
    from prefopt_cli.recipe import load_recipe

    if _is_chain(path):
        work, recipe = _chain(path, overrides)
    else:
        recipe = load_recipe(path, overrides)
        work = training(path, overrides, recipe)
    # A file of `launch.config` may say how many there are; Slurm's own job, in which this may be typed, may not.
    resolved = resolve_launch(recipe.launch, {})
    return replace(work, launch=resolved.settings), resolved.on_cpu or bool(recipe.training.get("use_cpu"))


def _is_chain(path: str) -> bool:
    from prefopt_cli.recipe.files import read_recipe_text
    from prefopt_cli.recipe.yaml_reader import parse_yaml

    data = parse_yaml(read_recipe_text(Path(path)), path).data
    return isinstance(data, dict) and "stages" in data


def _chain(path: str, overrides: list[str]) -> "tuple[Work, Recipe]":
    """The chain's work, and the recipe of its first stage."""
    from prefopt_cli.chain.loader import load_chain
    from prefopt_cli.chain.settings import PLAN_FILE
    from prefopt_cli.errors import UserError
    from prefopt_cli.launch.batch_script import Work

    chain = load_chain(path, overrides)
    for number, stage in enumerate(chain.data["stages"]):
        if "launch" in stage:
            raise UserError(
                f"stages.{number}.launch: the job's nodes and GPUs are set for all stages together, and what a stage "
                "says for itself would stand against them. Write launch beside stages, or leave it out."
            )
    first = chain.stages[0].recipe
    content = [stage.recipe.model_dump(mode="json") for stage in chain.stages]
    # The same command goes on with a chain that has begun.
    work = Work(path, overrides, first.launch, chain.output_dir, content, "chain", PLAN_FILE, going_on=())
    return work, first


def _gpus(work: "Work", *, on_cpu: bool) -> str:
    from prefopt_cli.errors import UserError

    if on_cpu:
        return "0"
    if work.launch.processes == "auto":
        raise UserError("launch.processes is auto: say how many GPUs a node has, with --gpus-per-node.")
    return str(work.launch.processes)
