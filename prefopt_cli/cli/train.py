"""`prefopt train`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefopt_cli.cli.common import (
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
from prefopt_cli.cli.launching import OF_A_MACHINE, Job, command_again, exit_code, in_processes

if TYPE_CHECKING:
    from prefopt_cli.recipe.schema import Recipe
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
    """Train the policy that a recipe describes, in as many processes as its section launch asks for.

    Ctrl-C finishes the step, saves a checkpoint and prints how to go on.
    """
    from prefopt_cli.errors import UserError
    from prefopt_cli.launch.devices import require_accelerators
    from prefopt_cli.recipe import load_recipe

    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other.")
    loaded = load_recipe(recipe, overrides or ())
    options = _options(resume=resume, overwrite=overwrite, runs_dir=runs_dir, json=json, debug=debug)
    in_processes(training_job(loaded, recipe, overrides or [], options), debug=debug)
    prepare_libraries()
    require_accelerators(use_cpu=bool(loaded.training.get("use_cpu")))
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
        raise typer.Exit(exit_code(outcome.signal))
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
        again = command_again("train", recipe, overrides or [], [*_moved(runs_dir), "--resume"])
        console.print(
            f"Stopped {where}. Go on with:\n  {again}",
            markup=False,
            soft_wrap=True,
        )
    raise typer.Exit(exit_code(outcome.signal))


def training_job(loaded: "Recipe", recipe: str, overrides: list[str], options: list[str]) -> Job:
    """`prefopt train` as something that may want several processes.

    Args:
        loaded: the recipe, with its overrides.
        recipe: its path.
        overrides: as the command line has them.
        options: the command line's others.
    """
    content = loaded.model_dump(mode="json")
    for name in OF_A_MACHINE:
        content["launch"].pop(name)
    kept = [each for each in options if each not in ("--json", "--debug", "--overwrite", "--resume")]
    return Job(
        settings=loaded.launch,
        arguments=["train", recipe, *overrides, *options],
        output_dir=loaded.output_dir,
        use_cpu=bool(loaded.training.get("use_cpu")),
        content=[content, "--resume" in options, "--overwrite" in options],
        again=command_again("train", recipe, overrides, [*kept, "--resume"]),
    )


def _options(*, resume: bool, overwrite: bool, runs_dir: Path | None, json: bool, debug: bool) -> list[str]:
    flags = {"--resume": resume, "--overwrite": overwrite, "--json": json, "--debug": debug}
    return [*_moved(runs_dir), *(name for name, given in flags.items() if given)]


def _moved(runs_dir: Path | None) -> list[str]:
    return ["--runs-dir", str(runs_dir)] if runs_dir else []


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
