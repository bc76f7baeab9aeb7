"""What it takes in memory to let the policy write responses: arithmetic on its configuration."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from prefopt_cli.scoring.forward import plain_model
from prefopt_cli.scoring.packing import Example

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


def sampling_bytes(model: Any, sampling: Sampling, mixed_precision: str) -> dict[str, int]:
    """Bytes by part while responses are drawn: keys and values of every token so far, logits, one layer's work.

    Args:
        model: a causal language model, peft's wrapper or not; only its configuration and type are looked at.
        sampling: how much is drawn at once.
        mixed_precision: no, bf16 or fp16.
    """
    plain = plain_model(model)
    config = plain.config.get_text_config()
    item = 2 if mixed_precision != "no" else plain.dtype.itemsize
    heads = getattr(config, "num_attention_heads", None)
    heads = heads if isinstance(heads, int) else 1  # a state-space model has none, some have a list of them
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    count, longest = len(sampling.prompts), max(sampling.prompts)
    tokens = count * (longest + sampling.max_new_tokens)
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    inner = inner if isinstance(inner, int) else max(inner)
    layer = HIDDEN_COPIES * config.hidden_size + INNER_COPIES * inner
    return {
        "keys and values": 2 * config.num_hidden_layers * groups * size * tokens * item,
        "logits of samples": LOGIT_COPIES * 4 * count * config.vocab_size,
        "activations": count * longest * layer * item,
    }
