"""A planned chain, done: stage after stage, with the retention table after each."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from accelerate import PartialState

from prefopt_cli.chain.places import read_record, read_table
from prefopt_cli.chain.plan import Plan, Step
from prefopt_cli.chain.record import stages_now, write_record
from prefopt_cli.chain.settings import RETENTION_FILES
from prefopt_cli.errors import PrefoptError
from prefopt_cli.evaluation.retention import retention
from prefopt_cli.evaluation.retention_table import Retention
from prefopt_cli.recipe import dump_recipe
from prefopt_cli.runs import atomic
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.scoring.frozen import ScoringStopped
from prefopt_cli.training.callbacks import stopping_gently
from prefopt_cli.training.outcome import Outcome
from prefopt_cli.training.processes import decided, signal_to_any
from prefopt_cli.training.reporting import Reporter
from prefopt_cli.training.run import train

Told = Callable[[Step, Outcome | None, Retention | None], None]
"""Called with a stage, how its training ended if it was trained now, and the table up to it if there is a new one."""


@dataclass
class ChainOutcome:
    """How a chain ended."""

    plan: Plan
    status: Literal["running", "finished", "interrupted", "failed"] = "running"
    begun: list[RunFolder] = field(default_factory=list)
    """Runs that are as the plan wants them: skipped, or begun by it."""
    last: Outcome | None = None
    """Of the last stage that was trained; None where all were skipped."""
    retention: dict[str, Any] | None = None
    """Which run and which data the retention table is about, as chain.json keeps it."""
    stopped_scoring: int | None = None
    """The signal that came to any process while a table was computed."""

    @property
    def signal(self) -> int | None:
        """The signal that interrupted it."""
        return self.stopped_scoring or (self.last.signal if self.last else None)

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        table = read_table(self.plan.chain) if self.retention is not None else {}
        return {
            "status": self.status,
            "stages": stages_now(self.plan, self.begun),
            "retention": table or None,
        }


def run_plan(plan: Plan, *, reporter: Reporter, runs: RunFinder, told: Told) -> ChainOutcome:
    """Do what the plan says, up to its end or to the first stage that is interrupted.

    Args:
        plan: just made; see `make_plan`.
        reporter: told what happens within the stages.
        runs: finds runs that were moved.
        told: told of every stage that was trained, and of every table.

    Raises:
        UserError: a stage cannot be trained as it stands.
        PrefoptError: a stage failed; what was done before it is kept.
    """
    known = read_record(plan.chain).get("retention")
    begun = [step.run for step in plan.steps if step.action in ("skip", "resume")]
    outcome = ChainOutcome(plan, begun=begun, retention=known if isinstance(known, dict) else None)
    _wait()  # for those who still plan by what the main process is about to change
    _record(outcome)
    try:
        for step in plan.steps:
            if not _do(step, outcome, reporter, runs, told):
                outcome.status = "interrupted"
                break
        else:
            _keep_table_up_to_date(outcome, reporter, runs, told)
            outcome.status = "interrupted" if outcome.signal else "finished"
    except BaseException as error:
        outcome.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with suppress(PrefoptError):  # the disk may be the very thing that is full
            _record(outcome)
        raise
    _record(outcome)
    return outcome


def _do(step: Step, outcome: ChainOutcome, reporter: Reporter, runs: RunFinder, told: Told) -> bool:
    """Do one stage; returns whether the chain may go on."""
    plan = outcome.plan
    title = f"Stage {step.stage.number} of {len(plan.steps)}, {step.stage.dimension}"
    reporter.message(f"{title}: {step.action}, because {step.reason}.")
    if step.action == "skip":
        return True
    if step.action == "resume" and _is_main():
        # It has the same content, which the plan has seen; only places may have changed.
        atomic.write_text(step.run.recipe, dump_recipe(step.recipe))
    _wait()
    outcome.begun.append(step.run)
    done = train(
        step.recipe,
        recipe_folder=plan.chain.recipe_folder,
        reporter=reporter,
        resume=step.action == "resume",
        overwrite=step.action == "retrain",
        runs=runs,
    )
    _wait()  # for the main process, which has written what the others are about to read
    outcome.last = done
    goes_on = done.status == "finished" and done.signal is None
    table = _table(step, outcome, reporter, runs) if goes_on else None
    _record(outcome)
    told(step, done, table)
    return table is not None and outcome.signal is None


def _table(step: Step, outcome: ChainOutcome, reporter: Reporter, runs: RunFinder) -> Retention | None:
    """The retention table up to this stage, written into the chain's folder; None where a signal came."""
    dataset = step.recipe.model_dump(mode="json")["dataset"]
    overrides = [f"dataset={json.dumps(dataset)}"]
    found = None
    with stopping_gently() as stop:
        try:
            found = retention(step.run, reporter, runs, overrides=overrides, stopping=stop.asked)
        except ScoringStopped:
            stop.hear()
    outcome.stopped_scoring = signal_to_any(stop)  # it may have come too late to stop the scoring
    if found is None:
        return None
    if _is_main():
        found.write(outcome.plan.chain.folder)
    outcome.retention = _about(step)
    return found


def _keep_table_up_to_date(outcome: ChainOutcome, reporter: Reporter, runs: RunFinder, told: Told) -> None:
    """Make the table anew where no stage was trained and it is not about these runs and these held-out sets."""
    step = outcome.plan.steps[-1]
    # The main process decides: it may still write what the others would look at.
    if decided(lambda: _is_outdated(step, outcome)):
        told(step, None, _table(step, outcome, reporter, runs))


def _is_outdated(step: Step, outcome: ChainOutcome) -> bool:
    chain = outcome.plan.chain
    missing = [name for name in RETENTION_FILES if not (chain.folder / name).is_file()]
    return bool(missing) or not read_table(chain) or outcome.retention != _about(step)


def _about(step: Step) -> dict[str, Any]:
    sets = {name: value for name, value in step.fingerprints.items() if name != "train"}
    return {"run_id": step.run.read_manifest().get("run_id"), "data": sets}


def _record(outcome: ChainOutcome) -> None:
    if _is_main():
        write_record(outcome.plan, outcome.begun, outcome.status, outcome.retention)


def _is_main() -> bool:
    return bool(PartialState().is_main_process)


def _wait() -> None:
    PartialState().wait_for_everyone()
