"""The last batch of an epoch in several processes: rows that only fill it up count for nothing.

Every process gets batches of one size, so what is missing is taken from the epoch's beginning. Trained on, these rows
would count twice, and another number of processes would train another policy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

ROW_WEIGHTS = "row_weights"
"""(B,) what each row of a batch counts in the mean over the rows; not there where all count alike."""


def weigh_rows(batches: Sequence[dict[str, Any]], accelerator: Accelerator) -> None:
    """Give the last of the micro-batches of a step `ROW_WEIGHTS`, where the data does not fill it in all processes.

    Their mean over the rows of all processes is 1.
    """
    state, processes = accelerator.gradient_state, accelerator.num_processes
    if processes == 1 or not batches or not state.end_of_dataloader or state.remainder <= 0:
        return
    rows = len(batches[-1]["row_index"])
    # The batches of a round go to the processes in turn.
    own = min(max(state.remainder - accelerator.process_index * rows, 0), rows)
    real = torch.arange(rows) < own
    batches[-1][ROW_WEIGHTS] = real * (processes * rows / state.remainder)


def mean_over_rows(values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """() mean over the rows (B,) of a batch; its mean over the processes is that over the rows of all."""
    return values.mean() if ROW_WEIGHTS not in inputs else (values * inputs[ROW_WEIGHTS].to(values)).mean()


def counted(values: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Per-row figures (B,) with those of rows that count for nothing left out."""
    return values if ROW_WEIGHTS not in inputs else values * (inputs[ROW_WEIGHTS] > 0)
