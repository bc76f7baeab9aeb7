"""What it takes in memory to let the policy write responses: arithmetic on its configuration."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from prefopt_cli.scoring.forward import plain_model
from prefopt_cli.scoring.packing import Example
from prefopt_cli.training.memory_log import AllocationLog

LOW_BYTES = 2
"""Of a number in bfloat16 or float16."""

LOGIT_COPIES = 4
"""Float32 copies of one row of logits per response: cast, softmax, and what drawing from it takes."""

HIDDEN_COPIES, INNER_COPIES = 6, 2
"""Vectors of a layer that are alive at once while prompts are read, in units of its two widths."""


@dataclass(frozen=True)
class Sampling:
    """One draw of one process, at its heaviest."""

    prompts: tuple[int, ...]
    """Tokens of its prompts."""
    max_new_tokens: int

    def examples(self, groups: int) -> list[Example]:
        """The heaviest of the groups in which the samples go through the policy; the tokens are zeros."""
        blank = [
            Example(np.zeros(length, dtype=np.int64), [np.zeros(self.max_new_tokens, dtype=np.int64)])
            for length in sorted(self.prompts, reverse=True)
        ]
        return blank[:: min(groups, len(blank))]

    @property
    def tokens(self) -> int:
        """Tokens of all responses, if none stops before the limit."""
        return len(self.prompts) * self.max_new_tokens


def sampling_bytes(model: Any, sampling: Sampling, mixed_precision: str) -> dict[str, int]:
    """Bytes by part while responses are drawn: keys and values of every token so far, logits, one layer's work.

    Args:
        model: a causal language model, peft's wrapper or not; only its configuration, shapes and types are looked at.
        sampling: how much is drawn at once.
        mixed_precision: no, bf16 or fp16.
    """
    plain = plain_model(model)
    config = plain.config.get_text_config()
    low = mixed_precision != "no"
    item = LOW_BYTES if low else plain.dtype.itemsize
    heads = getattr(config, "num_attention_heads", None)
    heads = heads if isinstance(heads, int) else 1  # a state-space model has none, some have a list of them
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    count, longest = len(sampling.prompts), max(sampling.prompts)
    tokens = count * (longest + sampling.max_new_tokens)
    reading = reading_bytes(plain, count * longest, low_precision=low)
    drawing = LOGIT_COPIES * 4 * count * config.vocab_size  # in turns
    return {
        "keys and values": 2 * config.num_hidden_layers * groups * size * tokens * item,
        "logits of samples": drawing if drawing > reading else 0,
        "activations": reading if reading >= drawing else 0,
        AllocationLog.CAST: cast_bytes(plain) if low else 0,
    }


def reading_bytes(model: Any, tokens: int, *, low_precision: bool) -> int:
    """Bytes of one layer's work on so many tokens, without gradients.

    Args:
        model: a causal language model, not peft's wrapper.
        tokens: positions that go through it at once.
        low_precision: whether that is done under autocast.
    """
    config = model.config.get_text_config()
    item = LOW_BYTES if low_precision else model.dtype.itemsize
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inner = inner if isinstance(inner, int) else max(inner)
    # Under autocast the outputs of the layers stay in the type of the weights.
    return tokens * (HIDDEN_COPIES * config.hidden_size * model.dtype.itemsize + INNER_COPIES * inner * item)


def cast_bytes(model: nn.Module) -> int:
    """What autocast keeps of weights in low precision: those that are trained, and one at a time of the others."""
    matrices = dict.fromkeys(
        weight
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for weight in module.parameters(recurse=False)
        if weight.ndim > 1 and weight.element_size() > LOW_BYTES
    )
    kept = sum(weight.numel() for weight in matrices if weight.requires_grad)
    return LOW_BYTES * (
        kept + max((weight.numel() for weight in matrices if not weight.requires_grad), default=0)
    )
