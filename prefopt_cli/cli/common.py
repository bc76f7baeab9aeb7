"""What the commands share: options, the two output streams, quiet libraries."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from prefopt_cli.launch import failures
from prefopt_cli.launch.environment import adopt_task
from prefopt_cli.sandbox.names import LARGEST_SEED

if TYPE_CHECKING:
    from rich.console import Console

    from prefopt_cli.training.reporting import Reporter

RecipeArgument = Annotated[str, typer.Argument(help="Path of a YAML recipe.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Fields to set over the recipe's, such as method.beta=0.05.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
RunsDirOption = Annotated[
    Path | None,
    typer.Option("--runs-dir", metavar="DIR", help="Where moved runs are looked for.", show_default=False),
]
WorldSeedOption = Annotated[
    int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Of the world: another seed, another world.")
]
DebugOption = Annotated[
    bool,
    typer.Option("--debug", help="Show tracebacks and the libraries' own messages.", is_eager=True),
]


SIGNAL_EXIT_BASE = failures.SIGNAL_EXIT_BASE
"""A command that a signal stopped exits with this and the signal's number, as shells have it."""


def standard_output() -> "Console":
    """Results go here."""
    from rich.console import Console

    return Console(highlight=False)


def standard_error() -> "Console":
    """Progress and messages go here, so that results can be piped."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def is_debug() -> bool:
    """Whether --debug was given anywhere on the command line."""
    return "--debug" in sys.argv[1:]


def prepare_libraries() -> None:
    """Before torch and transformers are imported: no telemetry, and silence unless --debug was given.

    A task of several that Slurm or MPI started learns here which it is.
    """
    adopt_task()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # Threads that wait for one another give way soon: where other programs want the processor too, small models
    # on the CPU otherwise train many times slower. Where none does, it makes no difference.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    if is_debug():
        return
    import logging

    warnings.simplefilter("ignore")
    for name in (
        "bitsandbytes",
        "torch",
        "trl",
        "accelerate",
        "peft",
        "datasets",
        "huggingface_hub",
        "matplotlib",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")


class Work(NamedTuple):
    """What a command that scores preferences works with."""

    reporter: "Reporter"
    stopping: Callable[[], bool]
    """Whether a signal has asked to stop."""


@contextmanager
def scoring() -> Iterator[Work]:
    """Around work that scores preferences, in one process or several: a signal ends it gently.

    What was scored by then is in the cache; the command exits as shells have it after a signal.
    """
    from prefopt_cli.cli.progress import reporter_for
    from prefopt_cli.scoring.frozen import ScoringStopped
    from prefopt_cli.training.callbacks import stopping_gently
    from prefopt_cli.training.processes import leave_together
    from prefopt_cli.training.reporting import Silent

    reporter = reporter_for(standard_error(), receipts=False) if main_process() else Silent()
    try:
        with stopping_gently() as stop:
            try:
                yield Work(reporter, stop.asked)
            except ScoringStopped:
                stop.hear()
                reporter.message(
                    "Stopped. What was scored is in the cache, and the same command goes on from there."
                )
                leave_together()
                raise typer.Exit(SIGNAL_EXIT_BASE + (stop.received or 0)) from None
    finally:
        reporter.close()


@contextmanager
def last_work() -> Iterator[bool]:
    """Around what the main process does alone at the end (true there): the others wait for it, even if it fails."""
    from prefopt_cli.training.processes import leave_together

    try:
        yield main_process()
    finally:
        leave_together()


def main_process() -> bool:
    """False in all but the first of the processes that a launcher started."""
    adopt_task()
    return os.environ.get("RANK", "0") == "0"


def several_processes() -> bool:
    """Whether a launcher started this process as one of several."""
    adopt_task()
    return os.environ.get("WORLD_SIZE", "1") != "1"
