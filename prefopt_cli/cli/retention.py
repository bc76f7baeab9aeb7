"""`prefopt retention`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from prefopt_cli.cli.tables import Column, print_line, print_table, text

if TYPE_CHECKING:
    from rich.console import Console

    from prefopt_cli.evaluation.retention_table import Retention

EPILOG = "Example: prefopt retention runs/harmless --json"

TRAINED = "*"

MEASURES = {
    "accuracy": "accuracy, %",
    "margin": "margin, nats",
    "logp_accuracy": "log-prob accuracy, %",
}


def retention(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="The last stage's run folder.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Fields to set over the recipe's, such as 'dataset.eval={helpful: FILE, harmless: FILE}'.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FOLDER",
            help="Where the JSON, CSV and PNG files go; by default eval/retention in the run folder.",
            show_default=False,
        ),
    ] = None,
    runs_dir: RunsDirOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what every stage of a run's line did to every dimension, the earlier ones included.

    The base and each stage's policy are asked about the held-out sets of the run's recipe. Known log-probabilities
    come from the cache.
    """
    prepare_libraries()
    from prefopt_cli.evaluation.retention import retention as measured
    from prefopt_cli.runs.finding import RunFinder
    from prefopt_cli.runs.writable import require_writable

    with scoring() as work:
        runs = RunFinder(runs_dir)
        last = runs.find(run, key="RUN")
        folder = output.expanduser() if output else last.evaluation("retention")
        require_writable(folder, key="--output" if output else "RUN: the folder")
        found = measured(last, work.reporter, runs, overrides=overrides or (), stopping=work.stopping)
    with last_work() as alone:
        if alone:
            found.write(folder)
    if not main_process():
        return
    if json:
        from json import dumps

        typer.echo(dumps(found.to_dict()))
        return
    console = standard_output()
    print_retention(found, console)
    print_line(console, f"Files: {folder}")


def print_retention(retention: "Retention", console: "Console") -> None:
    """The stages with their figures on every held-out set, what was forgotten, and what the figures mean."""
    names = ["base", *(f"{number} {name}" for number, name in enumerate(retention.stages[1:], 1))]
    for measure, title in MEASURES.items():
        relative = measure != "logp_accuracy"  # to the base, which has nothing to show there
        shown = list(enumerate(retention.chain))[1 if relative else 0 :]
        columns = []
        for each in retention.sets:
            cells = [
                text(getattr(retention.cells[stage.name, each], measure), percent=measure != "margin")
                + (f" {TRAINED}" if stage.dimension == each else "  ")
                for _, stage in shown
            ]
            columns.append(Column(f"{title}  \n{each}  ", cells))
        print_table(console, Column("stage", [names[number] for number, _ in shown]), columns)
        print_line(console)
    _print_changes(retention, console)
    for note in _notes(retention):
        print_line(console, note)


def _print_changes(retention: "Retention", console: "Console") -> None:
    changes = retention.changes
    if not changes:
        return
    print_table(
        console,
        Column(f"forgetting\nuntil {retention.stages[-1]}", list(changes)),
        [
            Column("since", [each.since for each in changes.values()]),
            Column(
                "change of\naccuracy, points",
                [text(each.accuracy, percent=True, signed=True) for each in changes.values()],
            ),
            Column("change of\nmargin, nats", [text(each.margin, signed=True) for each in changes.values()]),
        ],
    )
    print_line(console)


def _notes(retention: "Retention") -> list[str]:
    pairs = ", ".join(f"{name} {found.pairs} pairs" for name, found in retention.held_out.items())
    notes = [
        f"{TRAINED} the dimension that the stage trained. In brackets: 95 % intervals, prompts resampled. {pairs}.",
        "accuracy: pairs that the stage's policy ranks as preferred by its log-ratio to the base; margin: the mean of "
        "that, chosen minus rejected. log-prob accuracy: the same by log-probability alone.",
    ]
    if retention.changes:
        notes.append("forgetting: pair by pair, from the stage that trained the dimension to the last one.")
    untold = [
        stage.dimension
        for stage in retention.chain
        if stage.dimension and stage.dimension not in retention.sets
    ]
    if untold:
        notes.append(f"No held-out set is named after {', '.join(dict.fromkeys(untold))}.")
    return notes
