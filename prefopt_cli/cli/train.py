"""`prefopt train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefopt_cli.cli.common import (
    SIGNAL_EXIT_BASE,
    DebugOption,
    JsonOption,
    OverridesArgument,
    RecipeArgument,
    RunsDirOption,
    main_process,
    prepare_libraries,
    standard_error,
    standard_output,
)

if TYPE_CHECKING:
    from prefopt_cli.training.run import Outcome

EPILOG = "Example: prefopt train recipes/gpo-hh.yaml method.beta=0.05"


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in output_dir.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Delete the run in output_dir first.")
    ] = False,
    runs_dir: RunsDirOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train the policy that a recipe describes.

    Ctrl-C finishes the step, saves a checkpoint and prints how to go on.
    """
    from prefopt_cli.errors import UserError
    from prefopt_cli.recipe import load_recipe

    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other.")
    loaded = load_recipe(recipe, overrides or ())
    prepare_libraries()
    from prefopt_cli.cli.progress import reporter_for
    from prefopt_cli.runs.finding import RunFinder
    from prefopt_cli.training import run as training
    from prefopt_cli.training.processes import leave_together
    from prefopt_cli.training.reporting import Reporter, Silent

    console = standard_error()
    reporter: Reporter = reporter_for(console) if main_process() else Silent()
    try:
        outcome = training.train(
            loaded,
            recipe_folder=Path(recipe).parent,
            reporter=reporter,
            resume=resume,
            overwrite=overwrite,
            runs=RunFinder(runs_dir),
        )
        leave_together()
    finally:
        reporter.close()
    if not main_process():
        raise typer.Exit(_exit_code(outcome))
    if json:
        typer.echo(_as_json(outcome))
    elif outcome.status == "finished":
        _print_finished(outcome)
    if outcome.status == "interrupted":
        where = (
            f"at step {outcome.step} of {outcome.total_steps}; a checkpoint was saved"
            if outcome.total_steps
            else "while scoring with the reference policy; what is done is kept"
        )
        console.print(
            f"Stopped {where}. Go on with:\n  {resume_command(recipe, overrides or [], runs_dir)}",
            markup=False,
            soft_wrap=True,
        )
    raise typer.Exit(_exit_code(outcome))


def resume_command(recipe: str, overrides: list[str], runs_dir: Path | None) -> str:
    """The command line that goes on with a run."""
    import os
    import shlex

    # Under a launcher, each process sees how many there are.
    launched = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1"), "-m", "prefopt_cli"]
    program = launched if os.environ.get("WORLD_SIZE", "1") != "1" else ["prefopt"]
    moved = ["--runs-dir", str(runs_dir)] if runs_dir else []
    return shlex.join([*program, "train", recipe, *overrides, *moved, "--resume"])


def _exit_code(outcome: "Outcome") -> int:
    return 0 if outcome.signal is None else SIGNAL_EXIT_BASE + outcome.signal


def _as_json(outcome: "Outcome") -> str:
    import json

    summary: dict[str, Any] = {
        "status": outcome.status,
        "run": str(outcome.run.path),
        "model": str(outcome.run.model) if outcome.status == "finished" else None,
        "step": outcome.step,
        "steps": outcome.total_steps,
        "metrics": outcome.metrics,
    }
    return json.dumps(summary)


def _print_finished(outcome: "Outcome") -> None:
    import shlex

    from prefopt_cli.cli.progress import figures

    console = standard_output()
    if outcome.trained:
        console.print(f"Finished {outcome.step} steps. {figures(outcome.metrics)}", markup=False)
    else:
        console.print(f"Already finished ({outcome.step} steps): nothing to do.", markup=False)
    console.print(f"Policy: {outcome.run.model}", markup=False, soft_wrap=True)
    console.print(f"Run:    {outcome.run.path}", markup=False, soft_wrap=True)
    if {"train", "prompts"} < {"train", "prompts", *outcome.run.read_manifest().get("data", {})}:
        console.print(
            f"Judge it: prefopt eval {shlex.quote(str(outcome.run.path))}", markup=False, soft_wrap=True
        )
