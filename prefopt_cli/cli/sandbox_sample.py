"""`prefopt sandbox sample`."""

from typing import TYPE_CHECKING, Annotated

import typer

from prefopt_cli.cli.common import (
    DebugOption,
    JsonOption,
    prepare_libraries,
    standard_error,
    standard_output,
)
from prefopt_cli.cli.tables import print_hanging, print_line
from prefopt_cli.sandbox.names import LARGEST_SEED

if TYPE_CHECKING:
    from rich.console import Console

    from prefopt_cli.sandbox.replies import Answers

EPILOG = "Example: prefopt sandbox sample sandbox:base --prompts 2 --per-prompt 3"


def sample(
    policy: Annotated[
        str, typer.Argument(help="sandbox:base, or the folder of a run that started from it.")
    ] = "sandbox:base",
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Held-out prompts to reply to.")] = 3,
    per_prompt: Annotated[int, typer.Option("--per-prompt", min=1, max=1000, help="Replies to each.")] = 4,
    seed: Annotated[
        int,
        typer.Option("--seed", min=0, max=LARGEST_SEED, help="Of the sampling: the same, the same replies."),
    ] = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Let a policy reply to held-out prompts, and print what its replies are worth.

    The replies are drawn at temperature 1. The sandbox is built if it has not been built yet.
    """
    prepare_libraries()
    from prefopt_cli.cli.progress import reporter_for
    from prefopt_cli.sandbox.replies import answers

    reporter = reporter_for(standard_error())
    try:
        found = answers(policy, prompts, per_prompt, seed=seed, progress=reporter.progress)
    finally:
        reporter.close()
    if json:
        from json import dumps

        typer.echo(dumps({"policy": policy, "seed": seed, **found.to_dict()}))
    else:
        _print(found, standard_output())


def _print(found: "Answers", console: "Console") -> None:
    from prefopt_cli.sandbox.names import DIMENSIONS

    for answered in found.prompts:
        print_line(console, answered.prompt.text)
        print_line(console, "  ".join([*DIMENSIONS, "reply"]))
        for reply in answered.replies:
            worth = "  ".join(f"{reply.rewards[name]:{len(name)}.2f}" for name in DIMENSIONS)
            text = reply.text.strip() if reply.well_formed else f"(not well-formed) {reply.text.strip()}"
            print_hanging(console, f"{worth}  ", text)
        print_line(console)
    means = ", ".join(f"{name} {mean:.2f}" for name, mean in found.means.items())
    print_line(
        console,
        f"Mean of {len(found.replies)} replies: {means}; {found.well_formed:.1%} are well-formed.",
    )
