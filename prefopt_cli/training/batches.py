"""Batches of preference pairs."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example


def example_of(pair: Mapping[str, Any]) -> Example:
    """A tokenised pair as a prompt with its chosen and its rejected response."""
    return Example(pair["prompt_ids"], (pair["chosen_ids"], pair["rejected_ids"]))


def examples_of(rows: Dataset) -> list[Example]:
    """All pairs of a tokenised set; their tokens stay where they are, as slices of the set's columns."""
    if not len(rows):
        return []
    table = rows.with_format("arrow")[:]
    columns = []
    for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
        lists = table[name].combine_chunks()
        columns.append((lists.offsets.to_numpy(), lists.values.to_numpy()))

    def row(index: int) -> Iterator[np.ndarray]:
        for offsets, values in columns:
            yield values[offsets[index] : offsets[index + 1]]

    return [Example(prompt, responses) for prompt, *responses in map(row, range(len(rows)))]


class PairCollator:
    """Pairs to one batch of a layout.

    Args:
        layout: packed or padded.
        pad_token_id: id that fills rows up (it is masked everywhere).
        pad_to_multiple_of: round the width up to a multiple of this, for accelerators that like it.
    """

    def __init__(self, layout: Layout, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        self.layout = layout
        self.pad_token_id = pad_token_id
        self.multiple = pad_to_multiple_of

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch of B pairs with 2B responses, all chosen ones first; see `prefopt_cli.scoring.batches`.

        It begins with `pair_index` (B,). Reference log-probabilities that are already known pass through as
        `ref_*_logps` (B,).
        """
        # The library takes the length of the first tensor for the size of the batch.
        batch = {"pair_index": torch.tensor([pair["pair_index"] for pair in pairs])}
        batch.update(
            self.layout.batch([example_of(pair) for pair in pairs], self.pad_token_id, self.multiple)
        )
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in pairs[0]:
                batch[name] = torch.tensor([pair[name] for pair in pairs])
        return batch
