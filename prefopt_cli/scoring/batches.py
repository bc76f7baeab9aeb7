"""Examples as tensors, packed or padded. Both name the tokens to score in the same way.

Every batch has ``input_ids`` (R, W), ``predicting`` (N,), ``targets`` (N,), ``slots`` (K, longest) and ``passages``
(K + U, 2), as in `packing.Packed`: K responses in response-major order, all first responses before all second ones,
then those that are not scored.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from prefopt_cli.scoring.attention import BLOCK, Way
from prefopt_cli.scoring.packing import Example, pack, rows_for_masks, token_slots


def packed_batch(
    examples: Sequence[Example], way: Way, padding_id: int, multiple: int = 1, width_cost: float = 0.0
) -> dict[str, Tensor]:
    """One packed batch, with ``position_ids`` (R, W), ``num_tokens`` () and what `way` needs.

    That is ``calls`` (C, 4) for pieces, else ``segments`` and ``branches``, each (R, W).
    """
    rows = rows_for_masks([example.tokens for example in examples], width_cost) if way == "mask" else None
    multiple = int(np.lcm(multiple, BLOCK)) if way == "blocks" else multiple
    packed = pack(examples, rows=rows, multiple=multiple, padding_id=padding_id)
    names = ("calls",) if way == "pieces" else ("segments", "branches")
    batch = {
        name: torch.from_numpy(getattr(packed, name))
        for name in ("input_ids", "position_ids", "predicting", "targets", "slots", "passages", *names)
    }
    return {**batch, "num_tokens": torch.tensor(packed.tokens)}


def padded_batch(examples: Sequence[Example], padding_id: int, multiple: int = 1) -> dict[str, Tensor]:
    """One padded batch of a row per response, with ``attention_mask``, ``completion_mask`` (R, W), ``num_tokens`` ().

    For pairs these are TRL's rows: all chosen responses, then all rejected ones. Those not to be scored come last.
    """
    most = max(len(example.responses) for example in examples)
    rows = [
        (example.prompt, example.responses[branch])
        for branch in range(most)
        for example in examples
        if branch < len(example.responses)
    ]
    scored_rows = len(rows)
    rows += [(example.prompt, response) for example in examples for response in example.unscored]
    widest = max(len(prompt) + len(response) for prompt, response in rows)
    width = -(-widest // multiple) * multiple
    input_ids = np.full((len(rows), width), padding_id, dtype=np.int64)
    attention_mask, completion_mask = np.zeros_like(input_ids), np.zeros_like(input_ids)
    places, passages = [], []
    for row, (prompt, response) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(response)
        input_ids[row, :start], input_ids[row, start:end] = prompt, response
        attention_mask[row, :end] = 1
        passages.append((row * width + start, end - start))
        if row < scored_rows:
            completion_mask[row, start:end] = 1
            places.append(row * width + np.arange(max(start, 1), end))
    scored = np.concatenate(places)
    arrays = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "completion_mask": completion_mask,
        "predicting": scored - 1,
        "targets": input_ids.reshape(-1)[scored],
        "slots": token_slots([len(each) for each in places]),
        "passages": np.array(passages),
        "num_tokens": attention_mask.sum(),
    }
    return {name: torch.as_tensor(array) for name, array in arrays.items()}
