"""Padded batches of preference pairs."""

from typing import Any

import torch
from torch import Tensor


class PairCollator:
    """Pairs to one padded batch of 2B rows: all chosen responses, then all rejected ones.

    Args:
        pad_token_id: id that fills the rows up (it is masked everywhere).
        pad_to_multiple_of: round the width up to a multiple of this, for accelerators that like it.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None) -> None:
        self.pad_token_id = pad_token_id
        self.multiple = pad_to_multiple_of or 1

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch of `input_ids`, `attention_mask`, `completion_mask` (2B, T) and `pair_index` (B,).

        Reference log-probabilities that are already known pass through as `ref_*_logps` (B,).
        """
        rows = [(pair["prompt_ids"], pair[side]) for side in ("chosen_ids", "rejected_ids") for pair in pairs]
        longest = max(len(prompt) + len(response) for prompt, response in rows)
        width = -(-longest // self.multiple) * self.multiple
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
        completion_mask = torch.zeros((len(rows), width), dtype=torch.long)
        for i, (prompt, response) in enumerate(rows):
            end = len(prompt) + len(response)
            input_ids[i, :end] = torch.tensor([*prompt, *response])
            attention_mask[i, :end] = 1
            completion_mask[i, len(prompt) : end] = 1
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "completion_mask": completion_mask}
        batch["pair_index"] = torch.tensor([pair["pair_index"] for pair in pairs])
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in pairs[0]:
                batch[name] = torch.tensor([pair[name] for pair in pairs])
        return batch
