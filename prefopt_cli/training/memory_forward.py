"""What it takes to read without gradients: before training, when frozen policies score the data, and in evaluation."""

from dataclasses import dataclass
from typing import Any

from prefopt_cli.scoring.forward import plain_model
from prefopt_cli.training.memory_log import AllocationLog
from prefopt_cli.training.memory_rules import head_bytes
from prefopt_cli.training.memory_sampling import cast_bytes, reading_bytes
from prefopt_cli.training.memory_step import StepShape


@dataclass(frozen=True)
class Forward:
    """Batches that are only read."""

    scored: int
    """Positions of a batch before training: of the scoring, or of the trial of the layout."""
    longest: int
    """Positions of the longest row with its responses: the least that such a batch can have."""
    evaluated: int
    """Positions of a batch of an evaluation; 0 where nothing evaluates."""
    earlier_policies: bool = False
    """Whether policies of earlier stages score the data too, one after the other."""


def forward_bytes(model: Any, positions: int, shape: StepShape) -> dict[str, int]:
    """Bytes by part of reading a batch, besides the weights.

    Args:
        model: a causal language model, peft's wrapper or not; only its configuration, shapes and types are looked at.
        positions: of the batch; at most all of them go through the head.
        shape: of the training step, for device and precision.
    """
    plain = plain_model(model)
    low = shape.mixed_precision != "no"
    reading = reading_bytes(plain, positions, low_precision=low)
    scoring = head_bytes(positions, plain.config.get_text_config().vocab_size, shape.device)  # afterwards
    return {
        "activations": reading if reading >= scoring else 0,
        "LM head": scoring if scoring > reading else 0,
        AllocationLog.CAST: cast_bytes(plain) if low else 0,
    }
