"""What a step takes by rules of thumb, for architectures that cannot be traced."""

from typing import Any

from torch import nn

from prefopt_cli.scoring.head import CHUNK_ELEMENTS, CHUNK_ROWS, KEPT_BYTES, TRL_CHUNK
from prefopt_cli.training.memory_stand_ins import Device
from prefopt_cli.training.memory_step import Reference, StepShape
from prefopt_cli.training.memory_units import tensor_bytes

HEAD_COPIES = 3
"""Of a chunk of logits in float32 on the CPU."""


def rule_of_thumb(model: Any, shape: StepShape) -> dict[str, int]:
    """Dense transformer, no stored attention scores: 10 hidden and 4 feed-forward vectors per layer.

    After Korthikanti et al. 2022 (arXiv 2205.05198, section 4.1).
    """
    config = model.config.get_text_config()
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    item = 2 if shape.mixed_precision != "no" else next(model.parameters()).element_size()
    batches = [batch for batch in (shape.batch(), shape.sample_batch()) if batch]
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    scored = sum(batch["targets"].numel() for batch in batches)
    layer = tokens * item * (10 * hidden + 4 * inner)
    layers = config.num_hidden_layers
    activations = layer + layers * tokens * item * hidden if shape.gradient_checkpointing else layers * layer
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = 0 if shape.device == "cuda" else min(KEPT_BYTES, 4 * scored * config.vocab_size)
    return {
        **resident_bytes(model, shape.reference),
        "gradients": tensor_bytes(trainable),
        "activations": activations,
        "LM head": head_bytes(scored, config.vocab_size, shape.device) + kept,
    }


def head_bytes(scored: int, vocabulary: int, device: Device) -> int:
    """A few copies of one chunk of logits in float32."""
    if device == "cuda":
        return 4 * 4 * min(scored, 4096) * min(vocabulary, TRL_CHUNK)
    return 4 * HEAD_COPIES * min(scored, max(CHUNK_ELEMENTS // vocabulary, CHUNK_ROWS)) * vocabulary


def resident_bytes(model: nn.Module, reference: Reference) -> dict[str, int]:
    """Of the policy's weights, and of its frozen copy's."""
    weights = tensor_bytes([*model.parameters(), *model.buffers()])
    return {"weights": weights, "frozen policy": weights if reference == "copy" else 0}
