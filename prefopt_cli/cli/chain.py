"""`prefopt chain`."""

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefopt_cli.cli.common import (
    DebugOption,
    JsonOption,
    RunsDirOption,
    main_process,
    prepare_libraries,
    standard_error,
    standard_output,
)
from prefopt_cli.cli.launching import OF_A_MACHINE, Job, command_again, exit_code, in_processes
from prefopt_cli.cli.tables import print_hanging, print_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prefopt_cli.chain.plan import Plan, Step
    from prefopt_cli.chain.run import ChainOutcome, Told
    from prefopt_cli.chain.settings import Chain
    from prefopt_cli.evaluation.retention_table import Retention
    from prefopt_cli.training.outcome import Outcome
    from prefopt_cli.training.reporting import Reporter

EPILOG = "Example: prefopt chain recipes/chain-sandbox.yaml --dry-run"


def chain(
    file: Annotated[
        str, typer.Argument(metavar="CHAIN", help="Path of a YAML file with stages.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Fields to set over the file's, such as method.beta=0.05 or stages.1.lambdas.helpful=0.3.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, and train nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Train all stages anew, whatever is there.")
    ] = False,
    runs_dir: RunsDirOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train the stages of a chain in order, and show after each what became of every dimension.

    One launch serves all stages: where their section launch asks for processes, the whole chain runs in them.
    Finished stages are skipped, an interrupted one goes on, and a changed one is trained anew with all after it.
    """
    from prefopt_cli.chain.loader import load_chain
    from prefopt_cli.errors import UserError
    from prefopt_cli.launch.devices import require_accelerators
    from prefopt_cli.launch.resolving import launch_here

    loaded = load_chain(file, overrides or ())
    if runs_dir is not None and not runs_dir.is_dir():
        raise UserError(f"--runs-dir: there is no folder {runs_dir}.")
    again = command_again("chain", file, overrides or [], _moved(runs_dir))
    if not dry_run:
        flags = {"--overwrite": overwrite, "--json": json, "--debug": debug}
        options = [*_moved(runs_dir), *(name for name, given in flags.items() if given)]
        in_processes(_job(loaded, overrides or [], options, again), debug=debug)
    else:
        launch_here(loaded.stages[0].recipe.launch)  # tells what is wrong with it
    prepare_libraries()
    require_accelerators(use_cpu=bool(loaded.stages[0].recipe.training.get("use_cpu")))
    from prefopt_cli.chain.plan import make_plan
    from prefopt_cli.runs.finding import RunFinder
    from prefopt_cli.training.processes import leave_together

    # A chain whose folder was moved finds its own runs again.
    runs = RunFinder(runs_dir or (loaded.folder if loaded.folder.is_dir() else None))
    with _reporting(receipts=False) as reporter:
        plan = make_plan(loaded, reporter=reporter, runs=runs, overwrite=overwrite, counts_scores=dry_run)
    if dry_run:
        leave_together()
        if main_process():
            _print_plan(plan, as_json=json)
        return
    from prefopt_cli.chain.run import run_plan

    told = _told(quiet=json or not main_process())
    try:
        with _reporting(receipts=True) as reporter:
            outcome = run_plan(plan, reporter=reporter, runs=runs, told=told)
            leave_together()
    except KeyboardInterrupt:  # not in training, or a second time
        if main_process():
            print_line(standard_error(), f"What is done is kept. Go on with:\n  {again}")
        raise
    if main_process():
        _print_outcome(outcome, as_json=json, again=again)
    raise typer.Exit(exit_code(outcome.signal))


@contextmanager
def _reporting(*, receipts: bool) -> "Iterator[Reporter]":
    """A reporter of the first process's work; the others say nothing."""
    from prefopt_cli.cli.progress import reporter_for
    from prefopt_cli.training.reporting import Silent

    reporter = reporter_for(standard_error(), receipts=receipts) if main_process() else Silent()
    try:
        yield reporter
    finally:
        reporter.close()


def _told(*, quiet: bool) -> "Told":
    """Prints what each stage ended with, as soon as it is known."""
    from prefopt_cli.cli.retention import print_retention

    def told(step: "Step", done: "Outcome | None", table: "Retention | None") -> None:
        if quiet or table is None:
            return
        console = standard_output()
        if done is not None:
            print_line(console, f"Stage {step.stage.dimension}: finished {done.step} steps.")
        print_retention(table, console)

    return told


def _print_plan(plan: "Plan", *, as_json: bool) -> None:
    if as_json:
        from json import dumps

        typer.echo(dumps({"stages": [step.to_dict() for step in plan.steps]}))
        return
    console = standard_output()
    for step in plan.steps:
        begins = f"{step.stage.number}. {step.stage.dimension}: "
        print_hanging(console, begins, f"{step.action}, because {step.reason}.")
        print_line(console, f"   Run: {step.run.path}")
        if step.action == "skip":
            continue
        print_hanging(console, "   Reference: ", f"{step.reference}.")
        if step.stage.lambdas is not None:
            print_line(console, f"   Lambdas: {_lambdas(step)}")
        for each in step.scores or ():
            print_line(console, f"   Scores under {each.describe()}.")
    print_line(console, "Nothing was trained: this is what would be done.")


def _lambdas(step: "Step") -> str:
    given = step.stage.lambdas
    if isinstance(given, dict):
        return ", ".join(f"{name} {value:g}" for name, value in given.items())
    return f"{given:g} for every earlier dimension"


def _print_outcome(outcome: "ChainOutcome", *, as_json: bool, again: str) -> None:
    if as_json:
        from json import dumps

        typer.echo(dumps(outcome.to_dict()))
    folder = outcome.plan.chain.folder
    if outcome.stopped_scoring:
        print_line(
            standard_error(), f"Stopped while the retention table was computed. Go on with:\n  {again}"
        )
    elif outcome.status == "interrupted" and outcome.last is not None:
        done = outcome.last
        where = (
            "after its last step"
            if done.status == "finished"
            else f"at step {done.step} of {done.total_steps}; a checkpoint was saved"
            if done.total_steps
            else "while scoring with frozen policies; what is done is kept"
        )
        print_line(standard_error(), f"Stopped in {done.run.path} {where}. Go on with:\n  {again}")
    elif not as_json:
        console, last = standard_output(), outcome.plan.steps[-1].run
        if outcome.last is None:
            print_line(console, "All stages were finished before: nothing was trained.")
        print_line(console, f"Policy:    {last.model}")
        print_line(console, f"Retention: {folder / 'retention.csv'} (and .json, .png)")


def _job(loaded: "Chain", overrides: list[str], options: list[str], again: str) -> Job:
    """The chain as something that may want several processes, which then do all of it."""
    first, content = loaded.stages[0].recipe, []
    for stage in loaded.stages:
        content.append(stage.recipe.model_dump(mode="json"))
        for name in OF_A_MACHINE:
            content[-1]["launch"].pop(name)
    return Job(
        settings=first.launch,
        arguments=["chain", loaded.file, *overrides, *options],
        output_dir=loaded.output_dir,
        use_cpu=bool(first.training.get("use_cpu")),
        content=[content, "--overwrite" in options],
        again=again,
    )


def _moved(runs_dir: Path | None) -> list[str]:
    return ["--runs-dir", str(runs_dir)] if runs_dir else []
