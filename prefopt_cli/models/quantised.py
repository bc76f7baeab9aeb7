"""Models whose weights are stored in a few bits each (bitsandbytes), with adapters that are trained on them."""

from typing import Any

import torch
from torch import nn

PACKS_FOR_INFERENCE = "support_avx512bf16_for_cpu"
"""An attribute of bitsandbytes' 4-bit layers: whether they may be stored in another order, for good, by a pass without
gradients on the CPU. There is no gradient through weights in that order, and no error says so."""


def is_quantised(model: nn.Module) -> bool:
    """Whether a loaded model's weights are stored in 4 or 8 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False))


def stores_few_bits(config: Any) -> bool:
    """Whether the weights that a configuration belongs to are stored quantised."""
    return getattr(config, "quantization_config", None) is not None


def keep_trainable(model: nn.Module) -> None:
    """See to it that gradients pass through quantised weights on the CPU, whatever was computed with them before."""
    for module in model.modules():
        if hasattr(module, PACKS_FOR_INFERENCE):
            setattr(module, PACKS_FOR_INFERENCE, False)


def compute_in_bfloat16(model: nn.Module, adapter: str) -> None:
    """Make an adapter on quantised weights what TRL makes it when it trains it, wherever it is only read, too.

    Otherwise a policy and its reference would be computed in different numbers, and differ before the first step.
    """
    for name, parameter in model.named_parameters():
        of_adapter = parameter.requires_grad or f".{adapter}." in name
        if of_adapter and "lora_magnitude_vector" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
