"""`prefopt sandbox score`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefopt_cli.cli.common import (
    DebugOption,
    JsonOption,
    prepare_libraries,
    standard_error,
    standard_output,
)
from prefopt_cli.sandbox.names import DIMENSIONS, LARGEST_SEED

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from prefopt_cli.evaluation.statistics import Estimate
    from prefopt_cli.sandbox.score import Report, Score

EPILOG = "Example: prefopt sandbox score runs/gpo-sandbox --show 3"

PERCENT = ("distinct", "well_formed", "heldout/logp_accuracy", "heldout/reward_accuracy")


def score(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs that started from sandbox:base.")],
    against: Annotated[
        str | None,
        typer.Option("--against", help="Run that they are compared with, in place of the base policy."),
    ] = None,
    dimension: Annotated[
        str | None,
        typer.Option("--dimension", help=f"{', '.join(DIMENSIONS)}; else what the first run was trained on."),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--target", help="For the total variation: closed-form (of the run's method) or softmax:ALPHA."
        ),
    ] = "closed-form",
    prompts: Annotated[int, typer.Option("--prompts", min=2, help="Held-out prompts to sample.")] = 300,
    per_prompt: Annotated[
        int, typer.Option("--per-prompt", min=1, max=1000, help="Samples of each prompt.")
    ] = 8,
    exact_prompts: Annotated[
        int,
        typer.Option("--exact-prompts", min=0, help="Prompts all of whose replies are enumerated; 0: none."),
    ] = 24,
    show: Annotated[int, typer.Option("--show", min=0, help="Prompts to show with replies to them.")] = 0,
    plot: Annotated[
        str | None, typer.Option("--plot", help="Where the picture of several runs goes (.png).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Of the sampling.")] = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Judge policies by the true reward: samples on held-out prompts, compared with the base policy's.

    The figures also go into eval/sandbox/summary.json of every run, and with several runs a picture of KL against
    win rate into eval/sandbox/kl_win_rate.png of the first. Intervals are 95 %, bootstrap over prompts.
    """
    prepare_libraries()
    from prefopt_cli.cli.progress import reporter_for
    from prefopt_cli.sandbox.bench import ScoreSettings
    from prefopt_cli.sandbox.results import require_picture_path, write_picture, write_summaries
    from prefopt_cli.sandbox.score import score as score_policies

    if plot is not None:
        require_picture_path(Path(plot))
    reporter = reporter_for(standard_error())
    try:
        report = score_policies(
            runs,
            against=against,
            dimension=dimension,
            target=target,
            settings=ScoreSettings(prompts, per_prompt, exact_prompts, seed),
            progress=reporter.progress,
        )
    finally:
        reporter.close()
    written = write_summaries(report)
    if len(runs) > 1 or plot is not None:
        written.append(write_picture(report, Path(plot) if plot else None))
    if json:
        from json import dumps

        typer.echo(dumps({**report.to_dict(), "written": [str(path) for path in written]}))
        return
    console = standard_output()
    _print_samples(report, show, console)
    (_print_one if len(runs) == 1 else _print_many)(report, console)
    _print_notes(report, console)
    for path in written:
        console.print(f"Written: {path}", markup=False, soft_wrap=True)


def _rows(report: "Report") -> list[tuple[str, str]]:
    """(what it is called, its metric), in the order of the table."""
    rows = [(f"gold reward, {name}", f"reward/{name}") for name in DIMENSIONS]
    rows += [
        ("held-out accuracy, log-prob", "heldout/logp_accuracy"),
        ("held-out accuracy, implicit reward", "heldout/reward_accuracy"),
        ("KL to the base policy (nats)", "kl"),
        ("entropy (nats)", "entropy"),
        ("distinct replies of a prompt", "distinct"),
        ("well-formed replies", "well_formed"),
    ]
    if report.target:
        rows.append(("total variation to the target", "total_variation"))
    return rows


def _print_one(report: "Report", console: "Console") -> None:
    """Before and after, with the difference."""
    after, before = report.policies[0], report.opponent
    table = _table("", before.name, after.name, "difference")
    for name in DIMENSIONS:
        won = after.win_rates[name]
        table.add_row(
            f"win rate, {name}",
            "",
            _text(won, percent=True),
            "significant" if won.excludes(0.5) else "",
            style="bold" if name == report.dimension else "",
        )
    for title, metric in _rows(report):
        change = after.changes.get(metric)
        table.add_row(
            title,
            _text(before.figures.get(metric), percent=metric in PERCENT),
            _text(after.figures.get(metric), percent=metric in PERCENT),
            _text(change, percent=metric in PERCENT, signed=True),
            style="bold" if metric == f"reward/{report.dimension}" else "",
        )
    console.print(table)


def _print_many(report: "Report", console: "Console") -> None:
    """One line per policy, by what they were trained for."""
    own = report.dimension
    table = _table("", f"win rate, {own}", f"gold reward, {own}", "KL", "entropy", "distinct", "well-formed")
    if report.target:
        table.add_column("TV", justify="right")

    def add(score: "Score") -> None:
        figures = score.figures
        row = [
            score.name,
            _text(score.win_rates.get(own), percent=True),
            _text(figures[f"reward/{own}"]),
            _text(figures["kl"]),
            f"{figures['entropy'].value:.2f}",
            f"{figures['distinct'].value:.1%}",
            f"{figures['well_formed'].value:.1%}",
        ]
        table.add_row(*row, *([f"{figures['total_variation'].value:.3f}"] if report.target else []))

    for each in (report.opponent, *report.policies):
        add(each)
    console.print(table)


def _table(*columns: str) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _text(estimate: "Estimate | None", *, percent: bool = False, signed: bool = False) -> str:
    """`1.23 [1.10, 1.36]`."""
    if estimate is None:
        return ""
    scale, digits = (100.0, 1) if percent else (1.0, 2)
    value, low, high = (scale * part for part in estimate)
    plus = "+" if signed else ""
    unit = " %" if percent else ""
    return f"{value:{plus}.{digits}f}{unit} [{low:.{digits}f}, {high:.{digits}f}]"


def _print_samples(report: "Report", show: int, console: "Console") -> None:
    from prefopt_cli.sandbox.grammar import parse_prompt
    from prefopt_cli.sandbox.preferences import text_rewards

    for number, text in enumerate(report.prompts[:show]):
        console.print(text, markup=False, soft_wrap=True)
        prompt = parse_prompt(text)
        for each in (report.opponent, *report.policies):
            reply = each.samples[number][0]
            worth = (
                f"  ({report.dimension} {text_rewards(prompt, reply)[report.dimension]:.1f})"
                if prompt
                else ""
            )
            console.print(f"  {each.name}:{reply}{worth}", markup=False, soft_wrap=True)
        console.print()


def _print_notes(report: "Report", console: "Console") -> None:
    settings = report.settings

    def line(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    line("")
    line(
        f"{len(report.prompts)} held-out prompts, {settings.per_prompt} samples each; brackets: 95 % intervals. "
        f"Win rates and differences are against {report.opponent.name}."
    )
    line(
        f"Held-out pairs are labelled by {report.dimension} at temperature {report.temperature:g}; the gold reward "
        f"itself agrees with {report.attainable:.1%} of the labels."
    )
    if report.target:
        line(f"Target of the total variation: {report.target}, exact on {settings.exact_prompts} prompts.")
    elif report.target_note:
        line(f"No total variation: {report.target_note}.")
