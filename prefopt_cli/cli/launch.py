"""`prefopt launch`: what starts a recipe's processes, here and on clusters."""

import shlex
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from prefopt_cli.cli import launch_skypilot, launch_slurm
from prefopt_cli.cli.common import DebugOption, JsonOption, OverridesArgument, RecipeArgument

if TYPE_CHECKING:
    from prefopt_cli.launch.plan import LaunchPlan


class _Group(TyperGroup):
    """Commands, of which one may be asked for as an option: `prefopt launch --print my.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = next((place for place, word in enumerate(args) if word in self.commands), len(args))
        if "--print" in args[:named]:
            args.remove("--print")
            args.insert(0, "print")
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="launch",
    cls=_Group,
    help="Show what `prefopt train` runs to start a recipe's processes, or write a cluster's script.",
    epilog="Example: prefopt launch --print my.yaml launch.processes=2",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command(name="slurm", epilog=launch_slurm.EPILOG)(launch_slurm.slurm)
app.command(name="skypilot", epilog=launch_skypilot.EPILOG)(launch_skypilot.skypilot)


@app.command(name="print", epilog="Example: prefopt launch print my.yaml launch.processes=2")
def print_launch(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print the command and the environment by which a recipe's processes are started on this machine.

    Pasted into a shell, it trains as prefopt train does, with torchrun's own messages.
    """
    from prefopt_cli.cli.train import training_job
    from prefopt_cli.launch.plan import LaunchPlan, plan_launch
    from prefopt_cli.recipe import load_recipe

    job = training_job(load_recipe(recipe, overrides or ()), recipe, overrides or [], [])
    plan = plan_launch(job.settings, job.arguments, use_cpu=job.use_cpu)
    if json:
        from json import dumps

        alone = LaunchPlan(tuple(job.arguments), environment={}, processes=1).to_dict()
        alone["command"] = ["prefopt", *job.arguments]
        typer.echo(dumps(alone if plan is None else plan.to_dict()))
    elif plan is None:
        typer.echo(f"# One process, which needs no launcher.\n{shlex.join(['prefopt', *job.arguments])}")
    else:
        typer.echo(f"# {_described(plan)}\n{plan.shell()}")


def _described(plan: "LaunchPlan") -> str:
    from os import environ

    from prefopt_cli.launch.addresses import INTERFACES

    processes = f"{plan.processes} process{'es' if plan.processes > 1 else ''}; engine: {plan.engine}."
    if plan.machines == 1:
        return processes
    machines = (
        f"Machine {plan.machine_rank} of {plan.machines}; launch.machine_rank=K shows it for the others."
    )
    text = f"{processes} {machines}"
    if plan.interface_open and not any(name in environ for name in INTERFACES):
        text += (
            "\n# prefopt train finds by itself the network interface that leads to the others. To paste this line, put "
            "that\n# interface's name (`ip -brief address`) before it: GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME==eth0"
        )
    return text
