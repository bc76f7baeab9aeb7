"""`prefopt sandbox score`."""

from pathlib import Path
from typing import Annotated

import typer

from prefopt_cli.cli.common import (
    DebugOption,
    JsonOption,
    prepare_libraries,
    standard_error,
    standard_output,
)
from prefopt_cli.sandbox.names import DIMENSIONS, LARGEST_SEED

EPILOG = "Example: prefopt sandbox score runs/gpo-sandbox --show 3"


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
        int | None,
        typer.Option(
            "--exact-prompts",
            min=0,
            help="Of them, how many have all their replies enumerated, for the total variation; 0: none.",
            show_default="24",
        ),
    ] = None,
    show: Annotated[int, typer.Option("--show", min=0, help="Prompts to show with replies to them.")] = 0,
    plot: Annotated[
        str | None,
        typer.Option("--plot", help="Where the picture of KL against win rate goes (.png or .svg)."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Of the sampling.")] = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Judge policies by the true reward: samples on held-out prompts, compared with the base policy's.

    The figures also go into eval/sandbox/summary.json of every run, and with several runs a picture of KL against
    win rate into eval/sandbox/kl_win_rate.png of the first. Intervals are 95 %, bootstrap over prompts.
    """
    from prefopt_cli.errors import PrefoptError, UserError
    from prefopt_cli.sandbox.plan import STANDARD, ScoreSettings, plan_score
    from prefopt_cli.sandbox.results import require_picture_path, save

    if show > prompts:
        raise UserError(f"--show {show}: only {prompts} prompts are sampled; raise --prompts.")
    if plot is not None:
        require_picture_path(Path(plot))
    if exact_prompts is None:
        exact_prompts = min(STANDARD.exact_prompts, prompts)
    settings = ScoreSettings(prompts, per_prompt, exact_prompts, seed)
    plan = plan_score(runs, against=against, dimension=dimension, target=target, settings=settings)
    prepare_libraries()
    from prefopt_cli.cli.progress import reporter_for
    from prefopt_cli.sandbox.score import carry_out

    reporter = reporter_for(standard_error())
    try:
        report = carry_out(plan, reporter.progress)
    finally:
        reporter.close()
    saved = save(report, Path(plot) if plot else None)
    if json:
        from json import dumps

        found = {
            **report.to_dict(),
            "samples": report.samples_dict(show),
            "written": [str(path) for path in saved.written],
            "not_written": {str(path): reason for path, reason in saved.failed.items()},
        }
        typer.echo(dumps(found))
    else:
        from prefopt_cli.cli.sandbox_report import print_report

        console = standard_output()
        print_report(report, show, console)
        for path in saved.written:
            console.print(f"Written: {path}", markup=False, soft_wrap=True)
    if saved.failed:
        places = "; ".join(f"{path} ({reason})" for path, reason in saved.failed.items())
        raise PrefoptError(f"The figures are printed, but could not be written to {places}.")
