"""`prefopt sandbox`: its commands, and `build`."""

import time
from typing import Annotated

import typer

from prefopt_cli.cli import sandbox_info, sandbox_sample, sandbox_score
from prefopt_cli.cli.common import (
    DebugOption,
    JsonOption,
    WorldSeedOption,
    prepare_libraries,
    standard_error,
    standard_output,
)

app = typer.Typer(
    name="sandbox",
    help="A small world of customer messages and replies, in which the true reward is known.",
    epilog="Example: prefopt sandbox sample sandbox:base --prompts 3",
    no_args_is_help=True,
    rich_markup_mode=None,
)


def build(
    seed: WorldSeedOption = 0,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Make it anew even if it is already there.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make the sandbox's base policy and preference data now instead of on first use.

    It takes one or two minutes, needs no network, and gives the same bytes for the same seed and versions.
    """
    prepare_libraries()
    from prefopt_cli.cli.progress import reporter_for
    from prefopt_cli.sandbox.facts import folder_bytes
    from prefopt_cli.sandbox.world import find_world, open_world

    was_there = find_world(seed) is not None and not rebuild
    begun = time.monotonic()
    reporter = reporter_for(standard_error())
    try:
        world = open_world(seed, progress=reporter.progress, rebuild=rebuild)
    finally:
        reporter.close()
    seconds = None if was_there else time.monotonic() - begun
    size = folder_bytes(world.folder)
    if json:
        from json import dumps

        found = {"seed": seed, "folder": str(world.folder), "bytes": size, "seconds": seconds}
        typer.echo(dumps(found))
        return
    console = standard_output()
    took = "It was already there" if seconds is None else f"Built in {seconds:.0f} s"
    console.print(f"{took}, {size / 1e6:.1f} MB: {world.folder}", markup=False, soft_wrap=True)
    policy = "sandbox:base" if seed == 0 else f"sandbox:base/seed={seed}"
    console.print(f"Next: prefopt sandbox sample {policy}", markup=False, soft_wrap=True)


app.command(epilog="Example: prefopt sandbox build")(build)
app.command(name="info", epilog=sandbox_info.EPILOG)(sandbox_info.info)
app.command(name="sample", epilog=sandbox_sample.EPILOG)(sandbox_sample.sample)
app.command(name="score", epilog=sandbox_score.EPILOG)(sandbox_score.score)
