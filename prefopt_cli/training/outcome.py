"""How a run ended, for whoever started it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainerState

from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.callbacks import StopSignal
from prefopt_cli.training.trainer import RUN_SUMMARY


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: RunFolder
    status: Literal["finished", "interrupted"]
    step: int
    total_steps: int
    signal: int | None = None
    """The signal that asked it to stop; one that came after the last step has not interrupted it."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """The last logged figures of training and of every eval set."""
    trained: bool = True
    """False where the run had been finished before, so that nothing was left to do."""


def outcome_of(state: TrainerState, run: RunFolder, stop: StopSignal) -> Outcome:
    """How training ended, by the trainer's state and the signal that came, if one did."""
    stopped = stop.asked() and state.global_step < state.max_steps
    return Outcome(
        run=run,
        status="interrupted" if stopped else "finished",
        step=state.global_step,
        total_steps=state.max_steps,
        signal=stop.received if stopped else None,
        metrics=_last_figures(state.log_history),
    )


def _last_figures(history: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest value of every logged figure; the closing summary tells of one session only."""
    figures: dict[str, Any] = {}
    for record in history:
        if RUN_SUMMARY not in record:
            figures.update(record)
    return figures


def already_finished(run: RunFolder, manifest: dict[str, Any]) -> Outcome:
    """That of a run in which nothing is left to do."""
    return Outcome(
        run, "finished", manifest["step"], manifest["steps"], metrics=manifest["metrics"], trained=False
    )
