"""Batches of comparisons: prompts with two or more responses each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example, token_slots

PREVIOUS_MARGINS = "previous_margins"
"""Column of a dataset: for each pair the implicit reward margins of earlier stages."""

PASSED_ON = ("ref_chosen_logps", "ref_rejected_logps", PREVIOUS_MARGINS)
"""Columns of figures that a batch takes over as they are."""


def example_of(row: Mapping[str, Any]) -> Example:
    """A tokenised row as a prompt with its responses, the best first."""
    return Example(row["prompt_ids"], tuple(row["response_ids"]))


def examples_of(rows: Dataset) -> list[Example]:
    """All rows of a tokenised set; their tokens stay where they are, as slices of the set's columns."""
    if not len(rows):
        return []
    table = rows.with_format("arrow")[:]
    prompts = table["prompt_ids"].combine_chunks()
    lists = table["response_ids"].combine_chunks()
    prompt_at, prompt_ids = prompts.offsets.to_numpy(), prompts.values.to_numpy()
    list_at, responses = lists.offsets.to_numpy(), lists.values
    response_at, response_ids = responses.offsets.to_numpy(), responses.values.to_numpy()

    def example(row: int) -> Example:
        own = range(list_at[row], list_at[row + 1])
        return Example(
            prompt_ids[prompt_at[row] : prompt_at[row + 1]],
            tuple(response_ids[response_at[i] : response_at[i + 1]] for i in own),
        )

    return [example(row) for row in range(len(rows))]


def padding_id(tokenizer: Any, config: Any) -> int:
    """A token to fill rows up with, masked everywhere: the padding token, if the model has an embedding of it."""
    wanted, vocabulary = tokenizer.pad_token_id, getattr(config.get_text_config(), "vocab_size", None)
    known = wanted is not None and (vocabulary is None or wanted < vocabulary)
    return int(wanted) if known else int(tokenizer.eos_token_id or 0)


class ComparisonCollator:
    """Rows to one batch of a layout.

    Args:
        layout: packed or padded.
        pad_token_id: id that fills rows up (it is masked everywhere).
        pad_to_multiple_of: round the width up to a multiple of this, for accelerators that like it.
    """

    def __init__(self, layout: Layout, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        self.layout = layout
        self.pad_token_id = pad_token_id
        self.multiple = pad_to_multiple_of

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch of B rows with K responses in all, at most N to a prompt; see `prefopt_cli.scoring.batches`.

        It begins with `row_index` (B,), and has `responses` (B, N), the places of a row's responses among the K
        (K where it has no more), and `ranks` (B, N). What is known of the pairs already passes through: reference
        log-probabilities as `ref_*_logps` (B,), margins of n-1 earlier stages as `previous_margins` (B, n-1).
        """
        return self.batch(rows, [example_of(row) for row in rows])

    def batch(self, rows: list[dict[str, Any]], examples: Sequence[Example]) -> dict[str, Tensor]:
        """The same of rows that were made into examples already."""
        # The library takes the length of the first tensor for the size of the batch.
        batch = {"row_index": torch.tensor([row["row_index"] for row in rows])}
        batch.update(self.layout.batch(examples, self.pad_token_id, self.multiple))
        batch["responses"], batch["ranks"] = _places([row["ranks"] for row in rows])
        for name in PASSED_ON:
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        return batch


def _places(ranks: list[list[int]]) -> tuple[Tensor, Tensor]:
    """(B, N) places of the responses in response-major order, and (B, N) their ranks."""
    counts = np.array([len(each) for each in ranks])
    there = np.arange(counts.max()) < counts[:, None]
    places = np.full(there.shape, counts.sum())
    # Response-major: all first responses, then the second ones of the rows that have two, ...
    places.T[there.T] = np.arange(counts.sum())
    flat = np.array([rank for each in ranks for rank in each])
    own = token_slots(counts.tolist())
    return torch.from_numpy(places), torch.from_numpy(np.append(flat, 0)[own])


@dataclass(frozen=True)
class Lists:
    """Which of a batch's K responses belong to which of its B rows, and what was preferred to what."""

    places: Tensor
    """(B, N) places among the K responses, the best first; K where a row has no more."""
    ranks: Tensor
    """(B, N) 0 is best, equal ranks tie; 0 where a row has no more."""
    mask: Tensor
    """(B, N) which of these there are."""

    @classmethod
    def of(cls, batch: Mapping[str, Tensor]) -> "Lists":
        """Those of a batch of `ComparisonCollator`."""
        return cls(batch["responses"], batch["ranks"], batch["responses"] < batch["slots"].size(0))

    def by_row(self, values: Tensor) -> Tensor:
        """(B, N) of figures (K,) of the responses; 0 where a row has no more."""
        return torch.cat((values, values.new_zeros(1)))[self.places]

    @property
    def chosen(self) -> Tensor:
        """(B, N) the best responses of each row."""
        return self.mask & (self.ranks == 0)

    @property
    def rejected(self) -> Tensor:
        """(B, N) the others."""
        return self.mask & (self.ranks > 0)

    @property
    def preferred(self) -> Tensor:
        """(B, N, N) whether response i of a row was preferred to its response j."""
        there = self.mask[:, :, None] & self.mask[:, None, :]
        return there & (self.ranks[:, :, None] < self.ranks[:, None, :])

    @property
    def are_pairs(self) -> bool:
        """Whether every row is a chosen and a rejected response."""
        return self.places.size(1) == 2
