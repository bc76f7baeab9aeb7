"""What happens around the steps: metrics to disk, progress to the screen, checkpoints marked, signals obeyed."""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, rotate_checkpoints

from prefopt_cli.launch import worker
from prefopt_cli.runs import atomic, metrics
from prefopt_cli.runs.folder import CHECKPOINT_MARK, RunFolder
from prefopt_cli.training.reporting import Reporter
from prefopt_cli.training.trainer import RUN_SUMMARY


class MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one line, from the main process only."""
        # The closing summary tells of this session, not of the run, which may have been resumed.
        if state.is_world_process_zero and logs and RUN_SUMMARY not in logs:
            metrics.append(self._run.metrics, {"step": state.global_step, **logs})


class Progress(TrainerCallback):
    """Passes steps and evaluations on to the reporter.

    Args:
        reporter: told of them.
        extras: figures of the moment that are shown but not recorded, as no two runs have the same.
    """

    def __init__(self, reporter: Reporter, extras: Callable[[], dict[str, float]] = dict) -> None:
        self._reporter = reporter
        self._extras = extras
        self._evaluated = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show where a resumed run starts."""
        self._reporter.step(state.global_step, state.max_steps, None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One step further."""
        self._reporter.step(state.global_step, state.max_steps, None)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """The figures of a logged step."""
        if logs and "loss" in logs:
            self._reporter.step(state.global_step, state.max_steps, {**logs, **self._extras()})

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """One batch of an evaluation."""
        self._evaluated += 1
        self._reporter.progress("evaluating", self._evaluated, len(eval_dataloader))

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """The figures of an evaluation."""
        self._evaluated = 0
        self._reporter.evaluation(metrics or {})


class CheckpointMark(TrainerCallback):
    """Declares a checkpoint complete once every file of it is on disk, then removes the oldest ones.

    Rotation waits for the mark, so at every moment at least one complete checkpoint exists.

    Args:
        run: the run folder.
        keep: how many checkpoints stay (``save_total_limit``); None keeps all.
        state: what to write into the mark; called in every process with the checkpoint's folder, where it may put
            files too.
    """

    def __init__(self, run: RunFolder, keep: int | None, state: Callable[[Path], dict[str, Any]]) -> None:
        self._run, self._keep, self._state = run, keep, state

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the checkpoint of this step."""
        folder = self._run.checkpoints / f"checkpoint-{state.global_step}"
        progress = self._state(folder)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process has written its share
        if not state.is_world_process_zero:
            return
        atomic.sync(folder)
        atomic.write_json(folder / CHECKPOINT_MARK, progress)
        rotate_checkpoints(
            output_dir=str(self._run.checkpoints),
            save_total_limit=self._keep,
            best_model_checkpoint=state.best_model_checkpoint,
        )


class StopSignal:
    """Which signal asked the run to stop, if any: one to this process, or to another one of the run."""

    received: int | None = None
    came_here: bool = False

    def asked(self) -> bool:
        """Whether one did."""
        return self.received is not None

    def hear(self, number: int = signal.SIGTERM) -> None:
        """Another process was asked; the first signal to this one then says nothing new."""
        if self.received is None:
            self.received = number


class Stopping(TrainerCallback):
    """After the step or evaluation in which a signal came: save, then stop.

    It also sees to it that a checkpoint at the end of an epoch holds that epoch's evaluation, so that a run
    that goes on from it has lost nothing: the library saves first and evaluates then.
    """

    def __init__(self, stop: StopSignal) -> None:
        self._stop = stop
        self._stopping = False
        self._save_after_evaluation = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask the trainer to save and stop; all processes stop at the same step."""
        self._obey(args, control)
        ends = _ends_epoch(state)
        self._save_after_evaluation = ends and control.should_save and _evaluates_epochs(args)
        if self._save_after_evaluation and not self._stopping:
            control.should_save = False

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A signal during an evaluation is obeyed as soon as that is done."""
        self._obey(args, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The loop is left through here too; an epoch that was cut short is not evaluated."""
        if self._stopping and not _ends_epoch(state):
            control.should_log = control.should_evaluate = control.should_save = False
        elif self._save_after_evaluation:
            control.should_save = True

    def _obey(self, args: TrainingArguments, control: TrainerControl) -> None:
        if self._asked(args.device):
            self._stopping = True
            control.should_save = True
            control.should_training_stop = True

    def _asked(self, device: torch.device) -> bool:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self._stop.asked()
        # It may have come to some of them only, as on one of several machines; all end the run alike. One that comes
        # to this process meanwhile, which the others have not heard of, is for the next time.
        signal_number = torch.tensor(self._stop.received or 0, device=device)
        torch.distributed.all_reduce(signal_number, torch.distributed.ReduceOp.MAX)
        agreed = int(signal_number)
        if agreed:
            self._stop.hear(agreed)
        return agreed != 0


def _ends_epoch(state: TrainerState) -> bool:
    """Whether the library evaluates after this step: at the end of an epoch, and of the run."""
    return state.global_step >= state.max_steps or float(state.epoch or 0.0).is_integer()


def _evaluates_epochs(args: TrainingArguments) -> bool:
    return args.eval_strategy == IntervalStrategy.EPOCH


class AlreadyTrained(Exception):
    """Raised once the weights of a checkpoint are in place and nothing is left to train."""


class OnlyLoad(TrainerCallback):
    """Leaves training as soon as the checkpoint is loaded; the library would take one more step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise `AlreadyTrained`."""
        raise AlreadyTrained


@contextlib.contextmanager
def stopping_gently() -> Iterator[StopSignal]:
    """Ctrl-C or SIGTERM within the block lets the step or evaluation end; a second one stops at once.

    Under prefopt's launcher both come through it, as SIGINT, and it says so itself. It may do so late, when another
    process has heard of the signal first and all have agreed to stop: then it no longer ends anything.

    Raises:
        KeyboardInterrupt: the signal came twice.
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # Python delivers signals to the main thread only
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.came_here:
            raise KeyboardInterrupt
        stop.came_here = True
        stop.hear(number)
        if worker.launched():
            return
        # Drawing is not safe inside a signal handler; writing to the descriptor is.
        with contextlib.suppress(OSError):
            os.write(2, b"\nStopping as soon as what is being computed is done; once more to stop at once.\n")

    heard = (signal.SIGINT,) if worker.launched() else (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, handle) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if stop.asked():
            worker.stay_stopped()


def remove_unfinished(checkpoints: Path) -> None:
    """Delete checkpoints that were cut off while being written."""
    for folder in checkpoints.glob("checkpoint-*"):
        if not (folder / CHECKPOINT_MARK).is_file():
            shutil.rmtree(folder, ignore_errors=True)
