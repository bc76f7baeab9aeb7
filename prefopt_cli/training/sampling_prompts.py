"""Which prompts the policy is asked while it trains."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from prefopt_cli.data import TokenizedData
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import Regularizer
from prefopt_cli.training.extent import prompt_lengths
from prefopt_cli.training.reporting import Reporter

USUAL_LENGTH = 256
"""Longest sample, in tokens, where the recipe names none and the model's context holds twice as many."""


@dataclass(frozen=True)
class SamplingPrompts:
    """What the policy is asked during training, and how much it may answer."""

    rows: Dataset
    """Columns `row_id` and `prompt_ids`."""
    max_new_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt + sample that there may be."""
        return int(prompt_lengths(self.rows).max()) + self.max_new_tokens


def sampling_prompts(
    settings: Regularizer, place: str, config: Any, tokens: TokenizedData, reporter: Reporter
) -> SamplingPrompts:
    """The regularizer's own prompts, or the different prompts of the training data.

    Prompts that leave no room for a sample in the model's context are left out; the reporter is told how many.
    `place` is where the recipe has the settings, for messages.

    Raises:
        UserError: none is left.
    """
    prompts = tokens.prompts if tokens.prompts is not None else _different(tokens.train)
    of_what = "of dataset.train" if tokens.prompts is None else f"of {place}.prompts"
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    new_tokens = settings.max_new_tokens or min(USUAL_LENGTH, (context or 2 * USUAL_LENGTH) // 2)
    lengths = prompt_lengths(prompts)
    room = np.full(len(prompts), True) if context is None else lengths + new_tokens <= context
    if not room.any():
        raise UserError(
            f"{place}.max_new_tokens: with {new_tokens} of them no prompt {of_what} fits the "
            f"model's context of {context} tokens (the shortest has {lengths.min()}). Set it lower."
        )
    kept = prompts if room.all() else prompts.select(np.flatnonzero(room))
    left_out = (
        ""
        if room.all()
        else f"; {len(prompts) - len(kept):,} are left out, as {new_tokens} new tokens would not fit the "
        f"model's context of {context}"
    )
    reporter.message(
        f"Sampling prompts: {len(kept):,} {of_what}, to be answered in at most {new_tokens} tokens{left_out}."
    )
    return SamplingPrompts(kept, new_tokens)


def _different(train: Dataset) -> Dataset:
    """The first row of every prompt."""
    column = train.with_format("arrow")[:]["prompt_ids"].combine_chunks()
    starts, ids = column.offsets.to_numpy(), column.values.to_numpy()
    first: dict[bytes, int] = {}
    for row in range(len(train)):
        first.setdefault(ids[starts[row] : starts[row + 1]].tobytes(), row)
    return train.select_columns(["row_id", "prompt_ids"]).select(list(first.values()))
