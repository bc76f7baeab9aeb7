"""How the processes of a run agree to stop."""

import signal
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from prefopt_cli.training.callbacks import Stopping, stopping_gently


def all_reduce_during_which(happens: Any, others: int) -> Any:
    """A maximum over this process and others, who say `others`; meanwhile something happens here."""

    def reduce(value: Tensor, operation: Any) -> None:
        assert operation == torch.distributed.ReduceOp.MAX
        value.clamp_(min=others)
        happens()

    return reduce


@pytest.mark.parametrize("others", [0, signal.SIGTERM])
def test_a_signal_while_processes_agree_waits_for_the_next_time(
    others: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Whoever obeyed it at once would save a checkpoint while the others take the next step, and all would hang."""
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)

    def after_a_step(happens: Any) -> bool:
        control = TrainerControl()
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce_during_which(happens, others))
        callback.on_step_end(args, TrainerState(global_step=1, max_steps=9, epoch=0.1), control)
        return control.should_training_stop and control.should_save

    with stopping_gently() as stop:
        callback = Stopping(stop)
        assert after_a_step(lambda: signal.raise_signal(signal.SIGINT)) is bool(others)
        assert stop.received == signal.SIGINT
        assert after_a_step(lambda: None)


def test_the_first_signal_here_after_another_processs_is_no_second_one() -> None:
    """The checkpoint that all have agreed on is still being written."""
    with stopping_gently() as stop:
        stop.hear(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
