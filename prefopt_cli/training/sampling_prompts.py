"""Which prompts the policy is asked while it trains."""

from typing import Any

import numpy as np
from datasets import Dataset

from prefopt_cli.data import TokenizedData
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import Regularizer
from prefopt_cli.training.extent import prompt_lengths
from prefopt_cli.training.reporting import Reporter


def sampling_prompts(
    settings: Regularizer, config: Any, tokens: TokenizedData, reporter: Reporter
) -> Dataset:
    """The regularizer's own prompts, or the different prompts of the training data; columns `row_id`, `prompt_ids`.

    Prompts that leave no room for a sample in the model's context are left out; the reporter is told how many.

    Raises:
        UserError: none is left.
    """
    prompts = tokens.prompts if tokens.prompts is not None else _different(tokens.train)
    of_what = "of dataset.train" if tokens.prompts is None else "of method.regularizer.prompts"
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    lengths = prompt_lengths(prompts)
    room = np.full(len(prompts), True) if context is None else lengths + settings.max_new_tokens <= context
    if not room.any():
        raise UserError(
            f"method.regularizer.max_new_tokens: with {settings.max_new_tokens} of them no prompt {of_what} fits the "
            f"model's context of {context} tokens (the shortest has {lengths.min()}). Set it lower."
        )
    kept = prompts if room.all() else prompts.select(np.flatnonzero(room))
    left_out = (
        ""
        if room.all()
        else f"; {len(prompts) - len(kept):,} are left out, as {settings.max_new_tokens} new tokens would not fit the "
        f"model's context of {context}"
    )
    reporter.message(f"Sampling prompts: {len(kept):,} {of_what}{left_out}.")
    return kept


def _different(train: Dataset) -> Dataset:
    """The first row of every prompt."""
    column = train.with_format("arrow")[:]["prompt_ids"].combine_chunks()
    starts, ids = column.offsets.to_numpy(), column.values.to_numpy()
    first: dict[bytes, int] = {}
    for row in range(len(train)):
        first.setdefault(ids[starts[row] : starts[row + 1]].tobytes(), row)
    return train.select_columns(["row_id", "prompt_ids"]).select(list(first.values()))
