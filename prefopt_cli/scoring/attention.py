"""How a model is told that a response sees its prompt and itself only.

Three ways, all through public doors of transformers (no model's code is touched):

- ``pieces``: an attention function of our own, registered with `AttentionInterface`, runs scaled dot-product
  attention once per run of queries that sees one stretch of keys. Nothing that the mask forbids is computed, and
  the batch is one row without padding. For the CPU, where a call costs little.
- ``blocks``: a FlexAttention block mask over one row. For CUDA, where one kernel skips what is masked.
- ``mask``: a boolean (or, for `eager`, additive) mask of rows x 1 x width x width, for every other device.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

Way = Literal["pieces", "blocks", "mask"]

PIECES = "prefopt_pieces"
"""Name of our function among the attention implementations."""

BLOCK = 128
"""Tokens on a side of a FlexAttention block; rows are filled up to a multiple of it."""


def attention_in_pieces(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of one packed row; any other input goes to sdpa as it is.

    Args:
        module: the attention layer.
        query: (1, heads, W, d); key and value: (1, heads or groups, W, d).
        attention_mask: the table of calls (1, 1, C, 4) of `packing.Packed`, int64; it takes the mask's place, as
            that is the one argument that every model hands down, also through gradient checkpointing.

    Returns:
        (1, W, heads, d), None.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        return output
    if kwargs.get("position_bias") is not None:
        raise NotImplementedError("a position bias cannot be cut into pieces")
    calls: list[list[int]] = attention_mask[0, 0].tolist()
    lengths = [length for _, length, _, _ in calls]
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    number = {start: index for index, (start, *_) in enumerate(calls)}
    outputs = []
    for index, (_, length, before, seen) in enumerate(calls):
        own_keys, own_values, mask = keys[index], values[index], None
        if seen:
            piece = number[before]
            own_keys = torch.cat((keys[piece][:, :, :seen], own_keys), dim=2)
            own_values = torch.cat((values[piece][:, :, :seen], own_values), dim=2)
            mask = torch.ones(1, 1, length, seen + length, dtype=torch.bool, device=query.device).tril_(seen)
        options = {**kwargs, "is_causal": mask is None}
        outputs.append(
            sdpa_attention_forward(module, queries[index], own_keys, own_values, mask, **options)[0]
        )
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(PIECES, attention_in_pieces)
# Calls that are not packed (generation, padded batches) get the masks that sdpa would get.
AttentionMaskInterface.register(PIECES, sdpa_mask)


def attention_input(way: Way, batch: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Any:
    """What a packed batch passes as ``attention_mask``.

    Args:
        way: one of the three.
        batch: holds `calls` (C, 4) for pieces, else `segments` and `branches`, each (R, W).
        dtype: type of an additive mask; None makes it boolean.
    """
    if way == "pieces":
        return batch["calls"][None, None]
    if way == "blocks":
        return block_mask(batch["segments"], batch["branches"])
    visible = dense_mask(batch["segments"], batch["branches"])[:, None]
    if dtype is None:
        return visible
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
        ~visible, torch.finfo(dtype).min
    )


def dense_mask(segments: Tensor, branches: Tensor) -> Tensor:
    """(R, W, W) boolean: whether query q sees key k. Every query sees itself, padding too.

    Args:
        segments: (R, W) number of the segment, rising along the row.
        branches: (R, W) 0 in the prompt, 1, 2, ... in the responses.
    """
    width = segments.size(1)
    visible = segments[:, :, None] == segments[:, None, :]
    visible &= (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    return visible & torch.ones(width, width, dtype=torch.bool, device=segments.device).tril_()


def block_mask(segments: Tensor, branches: Tensor) -> Any:
    """The same as a FlexAttention `BlockMask`, made without any (W, W) tensor.

    A block of keys is listed for a block of queries where their segments overlap and it is not all in the
    future; within listed blocks the kernel asks, token by token.

    Args:
        segments: (R, W) number of the segment, rising along the row; W is a multiple of `BLOCK`.
        branches: (R, W) 0 in the prompt, 1, 2, ... in the responses.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        branch = branches[row, key]
        return (
            (key <= query)
            & (segments[row, query] == segments[row, key])
            & ((branch == 0) | (branch == branches[row, query]))
        )

    rows, width = segments.shape
    blocks = segments.view(rows, width // BLOCK, BLOCK)
    first, last = blocks[:, :, 0], blocks[:, :, -1]
    listed = last[:, None, :] >= first[:, :, None]
    listed &= torch.ones_like(listed[0]).tril_()
    # Listed blocks first, in order; the rest of each row of indices is not looked at.
    order = torch.argsort(listed.to(torch.int8), dim=-1, descending=True, stable=True)
    return BlockMask.from_kv_blocks(
        listed.sum(-1, dtype=torch.int32)[:, None],
        order.to(torch.int32)[:, None].contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(width, width),
    )
