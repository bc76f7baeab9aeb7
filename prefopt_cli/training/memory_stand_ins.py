"""What a step on fake tensors cannot run as it is, replaced by code that allocates the same.

- A fake table of calls cannot be read, so attention in pieces gets a real one (`pieces_of`).
- `nonzero` and Triton need data, so two functions of `prefopt_cli.scoring.head` are replaced (`head_stand_ins`).
- FlexAttention needs a GPU; like causal attention it keeps queries, keys, values, outputs and one number per
  query and head (`causal_row`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

from prefopt_cli.scoring import head
from prefopt_cli.scoring.attention import attention_in_pieces
from prefopt_cli.scoring.head import TRL_CHUNK, TokenScores
from prefopt_cli.training.memory_log import AllocationLog

Device = Literal["cpu", "cuda"]

TRACED_PIECES = "prefopt_pieces_traced"
"""Name of the attention implementation that `pieces_of` registers."""

TRACED_ROW = "prefopt_row_traced"
"""Name of `causal_row` among the attention implementations; without a mask function, so that no mask is made."""


class _Table:
    """The table of calls with its data, in the shape that `attention_in_pieces` reads."""

    dtype = torch.int64

    def __init__(self, calls: list[list[int]]) -> None:
        self._calls = calls

    def __getitem__(self, _: Any) -> "_Table":
        return self

    def tolist(self) -> list[list[int]]:
        return self._calls


def pieces_of(*batches: Tensor) -> str:
    """Register attention in the pieces of these batches, whatever table the model hands down; returns its name.

    Args:
        *batches: (C, 4) tables of calls with data, see `prefopt_cli.scoring.packing.Packed`. They replace those of
            an earlier call. Batches are told apart by their tokens.
    """
    tables: dict[int, Any] = {int(calls[:, 1].sum()): _Table(calls.tolist()) for calls in batches}

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return attention_in_pieces(module, query, key, value, tables[query.size(2)], **kwargs)

    AttentionInterface.register(TRACED_PIECES, attention)
    AttentionMaskInterface.register(TRACED_PIECES, sdpa_mask)
    return TRACED_PIECES


def causal_row(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Causal attention over the packed row as if it were one sequence; see `attention_in_pieces` for shapes."""
    options = {**kwargs, "is_causal": True}
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, None, **options)
    return output


AttentionInterface.register(TRACED_ROW, causal_row)


@contextmanager
def head_stand_ins(device: Device, log: AllocationLog) -> Iterator[None]:
    """Let the head of `prefopt_cli.scoring.head` run without data, and tell the log when it does.

    The divergence from a reference needs no data, and is the same function on every device.
    """
    real = {name: getattr(head, name) for name in ("token_scores", "token_divergence", "_is_first_maximum")}
    replacements = {
        "token_scores": _logged(_triton_scores if device == "cuda" else real["token_scores"], log),
        "token_divergence": _logged(real["token_divergence"], log),
        "_is_first_maximum": _is_maximum,
    }
    try:
        for name, function in replacements.items():
            setattr(head, name, function)
        yield
    finally:
        for name, function in real.items():
            setattr(head, name, function)


def _logged(function: Callable[..., Any], log: AllocationLog) -> Callable[..., Any]:
    """A function of the head whose allocations, forward and backward, belong to the head."""

    def logged(hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        if hidden.requires_grad:
            hidden.register_hook(_leaving_head(log))
        part, log.part = log.part, "LM head"
        result = function(hidden, *arguments, **options)
        log.part = part
        return result

    return logged


def _is_maximum(logits: Tensor, target: Tensor, wanted: Tensor) -> Tensor:
    """Without the copy of those rows whose target is the most likely token: part of a chunk, freed at once."""
    return target[:, 0] >= logits.amax(1)


def _leaving_head(log: AllocationLog) -> Callable[[Tensor], None]:
    """Backward hook: the gradient has left the head, what is born from now on belongs to the layers."""

    def hook(_: Tensor) -> None:
        log.part = "backward temporaries"

    return hook


def _triton_scores(hidden: Tensor, weight: Tensor, *_: Any, **__: Any) -> TokenScores:
    log_probs = _TritonHead.apply(hidden, weight)
    return TokenScores(*[log_probs, *torch.zeros_like(log_probs.detach()).expand(3, -1)])


class _TritonHead(torch.autograd.Function):
    """The allocations of TRL's head where Triton folds each tile in place (CUDA), without its arithmetic."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        ctx.save_for_backward(hidden, weight)
        ctx.compute_dtype = low
        _tiles(hidden, weight, low)
        return hidden.new_zeros(hidden.size(0), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = tensors = ctx.saved_tensors
        sums = [
            torch.zeros_like(tensor, dtype=torch.float32) if needed else None
            for tensor, needed in zip(tensors, ctx.needs_input_grad, strict=True)
        ]
        _tiles(hidden, weight, ctx.compute_dtype)
        by_hidden, by_weight = (
            None if total is None else total.to(tensor.dtype)
            for total, tensor in zip(sums, tensors, strict=True)
        )
        return by_hidden, by_weight


def _tiles(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """One tile of logits beside one chunk of the cast inputs; the loop over further tiles reuses them."""
    tokens, vocabulary = min(hidden.size(0), TOKEN_CHUNK_SIZE), min(weight.size(0), TRL_CHUNK)
    tile = hidden.new_empty(tokens, TRL_CHUNK, dtype=dtype)
    hidden_chunk, weight_chunk = hidden[:tokens].to(dtype), weight[:vocabulary].to(dtype)
    del tile, hidden_chunk, weight_chunk
