"""`prefopt merge`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from prefopt_cli.cli.common import (
    DebugOption,
    JsonOption,
    RunsDirOption,
    prepare_libraries,
    several_processes,
    standard_error,
    standard_output,
)
from prefopt_cli.errors import UserError

if TYPE_CHECKING:
    from prefopt_cli.evaluation.merge_check import Merged

EPILOG = "Example: prefopt merge runs/harmless merged --dtype bfloat16 --tolerance 5"


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run folder.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new model folder.", show_default=False)],
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="Type of the saved weights; merged is always in float32."),
    ] = "float32",
    pairs: Annotated[int, typer.Option("--pairs", min=1, help="Pairs that are scored for the proof.")] = 64,
    base: Annotated[
        Literal["dequantized", "original"] | None,
        typer.Option(
            "--base",
            help="Of a run on quantised weights: merge into those (dequantized, the default), which is the policy as "
            "it was trained, or into the original ones, which is another.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            metavar="NATS",
            min=0.0,
            help="Largest difference of a response's log-probability, 0.01 unless given; half precision needs a larger "
            "one, and --base original has none.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", metavar="FILE", help="Preferences to score in place of the run's.", show_default=False
        ),
    ] = None,
    runs_dir: RunsDirOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the merged model in OUT, and nothing else.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Export a run's policy as one plain model, adapters merged, and prove that it is the same policy.

    A sample of pairs is scored by the policy as it was trained and by the folder as plain transformers loads it.
    Above the tolerance nothing is written. What was measured stands in the folder's card and record.
    """
    if several_processes():  # they would all write into the same folder
        raise UserError(
            "prefopt merge is the work of one process. Run it without torchrun or accelerate launch."
        )
    prepare_libraries()
    from prefopt_cli.cli.progress import reporter_for
    from prefopt_cli.evaluation.merge_check import MergeSettings, merge_run
    from prefopt_cli.runs.finding import RunFinder

    settings = MergeSettings(dtype, pairs, tolerance, data, overwrite, base)
    reporter = reporter_for(standard_error(), receipts=False)
    try:
        merged = merge_run(run, out.expanduser(), settings, reporter, RunFinder(runs_dir))
    finally:
        reporter.close()
    if json:
        from json import dumps

        typer.echo(dumps(merged.to_dict()))
    else:
        _print(merged)


def _print(merged: "Merged") -> None:
    from prefopt_cli.cli.tables import print_line

    console, found = standard_output(), merged.difference
    if merged.record["merged_into"] == "original":
        print_line(
            console,
            "Merged into the original weights: another policy than the one that was trained on quantised ones.",
        )
    told = "Measured" if merged.tolerance is None else f"Equal within {merged.tolerance:g} nats"
    print_line(
        console,
        f"{told}: over {found.responses} responses ({found.tokens:,} tokens) the "
        f"log-probabilities differ by at most {found.max:.2g}, by {found.mean:.2g} on average.",
    )
    print_line(
        console, f"Per token: at most {found.max_per_token:.2g}, {found.mean_per_token:.2g} on average."
    )
    print_line(console, f"Model: {merged.folder} ({merged.dtype})")
