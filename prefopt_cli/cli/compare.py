"""`prefopt compare`."""

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from prefopt_cli.cli.common import (
    DebugOption,
    JsonOption,
    RunsDirOption,
    last_work,
    main_process,
    prepare_libraries,
    scoring,
    standard_output,
)
from prefopt_cli.cli.evaluate import BetaOption, DataOption, DimensionOption, ReferenceOption, SplitOption

EPILOG = "Example: prefopt compare runs/* --sort kl"

NAME = "compare"

OVERRIDE = re.compile(r"[A-Za-z_][\w.\[\]-]*=")
"""What can only be KEY=VALUE, unless there is a folder of this name; a path has a slash before any equals sign."""


class Sort(StrEnum):
    """What the table is ordered by."""

    accuracy = "accuracy"
    margin = "margin"
    kl = "kl"
    gold = "gold"
    name = "name"


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN RUN...",
            help="Runs or models; the first one is what the others are measured from. KEY=VALUE sets a field over "
            "the recipes'.",
            show_default=False,
        ),
    ],
    data: DataOption = None,
    split: SplitOption = None,
    dimension: DimensionOption = None,
    reference: ReferenceOption = None,
    beta: BetaOption = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="RUN",
            help="What the others are measured from, in place of the first.",
            show_default=False,
        ),
    ] = None,
    kl_prompts: Annotated[
        int,
        typer.Option("--kl-prompts", min=0, help="Held-out prompts to sample for the KL; 0 leaves it out."),
    ] = 128,
    sort: Annotated[Sort, typer.Option("--sort", help="What the table is ordered by.")] = Sort.accuracy,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            help="Where a picture of KL against accuracy (in the sandbox: gold reward) goes, .png or .svg; by default "
            "kl.png beside the other files.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help=f"Where the files go; by default eval/{NAME} in the first run's folder.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of sampling and resampling.")] = 0,
    runs_dir: RunsDirOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare policies on the same held-out pairs: paired differences, their p-values, and who moved how far.

    The pairs are those of the first run's recipe, or of --data. Every difference is to the first policy, pair by
    pair; p-values are adjusted for the number of comparisons (Holm). Names that are neither run nor model are left
    out and told, so that `runs/*` works.
    """
    from prefopt_cli.errors import UserError

    if beta == 0:
        raise UserError("--beta 0: every reward would be 0; give a number above it.")
    overrides = [each for each in runs if OVERRIDE.match(each) and not Path(each).exists()]
    names = [each for each in runs if each not in overrides]
    if baseline:
        place = Path(baseline).resolve()
        names = [baseline, *(each for each in names if Path(each).resolve() != place)]
    prepare_libraries()
    from prefopt_cli.evaluation.compare import compare as compared
    from prefopt_cli.evaluation.compare import find_targets
    from prefopt_cli.evaluation.compare_files import write
    from prefopt_cli.evaluation.held_out import chosen_sets
    from prefopt_cli.runs.finding import RunFinder
    from prefopt_cli.runs.writable import require_writable
    from prefopt_cli.sandbox.results import require_picture_path

    if plot is not None:
        require_picture_path(plot)
        if not kl_prompts:
            raise UserError("--plot draws the KL, which --kl-prompts 0 leaves out. Give one of them alone.")
    finder = RunFinder(runs_dir)
    with scoring() as work:
        targets, skipped = find_targets(
            names, work.reporter, finder, reference=reference, beta=beta, overrides=overrides
        )
        if baseline and skipped and skipped[0].name == baseline.rstrip("/"):
            raise UserError(
                f"--baseline {baseline}: nothing can be measured from it, it is {skipped[0].reason}."
            )
        first = targets[0]
        folder = output.expanduser() if output else first.run.evaluation(NAME) if first.run else Path(NAME)
        require_writable(folder, key="--output" if output else f"{first.name}: the folder")
        settings = chosen_sets(first.recipe.dataset, data or [], split=split, dimensions=dimension or [])
        result = compared(
            targets,
            settings,
            work.reporter,
            finder,
            skipped=skipped,
            kl_prompts=kl_prompts,
            stopping=work.stopping,
            seed=seed,
        )
    with last_work() as alone:
        if alone:
            write(result, folder, plot)
    if not main_process():
        return
    if json:
        from json import dumps

        from prefopt_cli.evaluation.compare_files import summary_of

        typer.echo(dumps(summary_of(result)))
        return
    from prefopt_cli.cli.compare_report import print_comparison

    print_comparison(result, sort.value, folder, standard_output())
