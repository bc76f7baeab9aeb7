"""How much memory a training step will take, from the model's configuration alone.

One step is run on tensors without data (`memory_step`) while every allocation is logged (`memory_log`); the
optimizer's share is arithmetic (`memory_optimizer`). Not counted: Python and its libraries (about 0.6 GiB of
resident memory on the CPU; the CUDA context on a GPU), data, and the scoring of the data with the reference before
training. What an allocator keeps back is a rule of thumb: on the CPU glibc may keep much more, as the table in
`benchmarks/results/memory.md` shows; MALLOC_MMAP_THRESHOLD_=65536 makes it return all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import SelfSupervisedSettings
from prefopt_cli.scoring.head import CHUNK_ELEMENTS, CHUNK_ROWS, KEPT_BYTES, TRL_CHUNK
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from prefopt_cli.training.memory_optimizer import (
    is_known_optimizer,
    optimizer_state_bytes,
    optimizer_step_bytes,
)
from prefopt_cli.training.memory_sampling import Sampling, sampling_bytes
from prefopt_cli.training.memory_stand_ins import Device
from prefopt_cli.training.memory_step import Precision, Reference, StepShape, trace_step

__all__ = [
    "Device",
    "MemoryEstimate",
    "Precision",
    "Reference",
    "Sampling",
    "estimate_memory",
    "format_bytes",
]

ALLOCATOR_SHARE = {"cpu": 0.15, "cuda": 0.0}
"""What the allocator keeps of freed memory, as a share of what is alive. A rule of thumb for glibc, which kept
7 to 43 % in runs of TRL's trainer; PyTorch's own figures of CUDA memory leave it out."""

ALLOCATOR = "kept by the allocator"

Phase = Literal["forward and backward", "optimizer step", "sampling"]

_ORDER = (
    "weights",
    "frozen policy",
    "gradients",
    "optimizer",
    "activations",
    "recomputed activations",
    "LM head",
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of a training step (from the second step on), taken apart."""

    parts: dict[str, int]
    """Bytes by part at the peak: weights, frozen policy, gradients, optimizer, activations, LM head, ..."""
    parameters: int
    """Numbers in the policy, tied weights counted once, adapter included."""
    trainable_parameters: int
    """Those that are trained."""
    phase: Phase
    """When the peak is."""
    method: Literal["traced", "formula"]
    """traced: every allocation of a step was followed; formula: only a rule of thumb for the activations."""
    notes: tuple[str, ...] = ()
    """What the reader should know about the estimate, one sentence each."""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())

    @property
    def alive(self) -> int:
        """Bytes of tensors alive at the peak: the total without what the allocator keeps."""
        return self.total - self.parts.get(ALLOCATOR, 0)


def estimate_memory(
    model: nn.Module,
    examples: Sequence[Example],
    layout: Layout,
    *,
    reference: Reference,
    optimizer: str = "adamw_torch_fused",
    mixed_precision: Precision = "no",
    gradient_checkpointing: bool = False,
    gradient_accumulation_steps: int = 1,
    device: Device = "cpu",
    sampling: Sampling | None = None,
    degrees: SelfSupervisedSettings | None = None,
) -> MemoryEstimate:
    """Estimate the peak memory of one process.

    Args:
        model: a PreTrainedModel, or a PeftModel around one, on any device; on the meta device it costs
            nothing. It is left as it is.
        examples: the pairs of a heavy batch; only their lengths matter.
        layout: packed or padded.
        reference: where the frozen policy's scores come from in each step: a second copy of the model, the
            same model without its adapter, or no forward pass at all (scores computed before training).
        optimizer: `optim` of TrainingArguments.
        mixed_precision: autocast during the forward passes.
        gradient_checkpointing: recompute each layer in backward.
        gradient_accumulation_steps: with more than one, gradients are there during forward too.
        device: cpu or cuda.
        sampling: the policy's own responses, for the KL to the reference; `reference` then says where that lives,
            and it does not see the batch.
        degrees: how the levels of responses are told, degraded ones being the examples' unscored responses.

    Raises:
        UserError: a batch without pairs, or an adapter's reference for a model without an adapter.
    """
    if not examples:
        raise UserError("A batch without pairs has nothing to score.")
    if reference == "adapter_disabled" and not hasattr(model, "peft_config"):
        raise UserError("The reference is the model without its adapter, but the model has no adapter.")
    shape = StepShape(
        examples=examples,
        layout=layout,
        reference=reference,
        mixed_precision=mixed_precision,
        gradient_checkpointing=gradient_checkpointing,
        accumulates=gradient_accumulation_steps > 1,
        device=device,
        samples=sampling.examples(gradient_accumulation_steps) if sampling else (),
        kept_positions=sampling.tokens if sampling else 0,
        degrees=degrees,
    )
    method, step, notes = _step_parts(model, shape)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    states = optimizer_state_bytes(optimizer, trainable)
    if not is_known_optimizer(optimizer):
        notes += (f"The states of optim={optimizer} are not known; those of AdamW are assumed.",)
    phases: dict[Phase, dict[str, int]] = {
        "forward and backward": {**step, "optimizer": states},
        "optimizer step": {
            **_resident(model, reference),
            "gradients": _bytes(trainable),
            "optimizer": states,
            "optimizer temporaries": optimizer_step_bytes(optimizer, trainable, device),
        },
    }
    if sampling:
        phases["sampling"] = {
            **_resident(model, reference),
            "optimizer": states,
            **sampling_bytes(model, sampling, mixed_precision),
        }
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    kept = round(ALLOCATOR_SHARE[device] * sum(phases[phase].values()))
    return MemoryEstimate(
        parts=_ordered({**phases[phase], ALLOCATOR: kept}),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable_parameters=sum(parameter.numel() for parameter in trainable),
        phase=phase,
        method=method,
        notes=notes,
    )


def format_bytes(count: int) -> str:
    """Bytes for people: ``512 B``, ``3.4 MiB``, ``15.0 GiB``."""
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def _step_parts(
    model: nn.Module, shape: StepShape
) -> tuple[Literal["traced", "formula"], dict[str, int], tuple[str, ...]]:
    try:
        return "traced", trace_step(model, shape), ()
    except Exception as error:
        # Any code may be in a model, and any of it may need data. A rough answer that says so beats none.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        note = f"This architecture could not be traced, so activations are a rule of thumb ({reason})."
        return "formula", _rule_of_thumb(model, shape), (note,)


def _rule_of_thumb(model: Any, shape: StepShape) -> dict[str, int]:
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
    return {
        **_resident(model, shape.reference),
        "gradients": _bytes(trainable),
        "activations": activations,
        "LM head": _head_rule_of_thumb(scored, config.vocab_size, shape.device),
    }


def _head_rule_of_thumb(scored: int, vocabulary: int, device: Device) -> int:
    """A few copies of one chunk of logits in float32, and on the CPU the probabilities that are kept."""
    if device == "cuda":
        return 4 * 4 * min(scored, 4096) * min(vocabulary, TRL_CHUNK)
    chunk = min(scored, max(CHUNK_ELEMENTS // vocabulary, CHUNK_ROWS)) * vocabulary
    return 4 * 3 * chunk + min(KEPT_BYTES, 4 * scored * vocabulary)


def _resident(model: nn.Module, reference: Reference) -> dict[str, int]:
    weights = _bytes([*model.parameters(), *model.buffers()])
    return {"weights": weights, "frozen policy": weights if reference == "copy" else 0}


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _ordered(parts: dict[str, int]) -> dict[str, int]:
    """What stays first, then what passes, largest first; nothing that is zero."""
    rest = sorted(set(parts) - set(_ORDER), key=lambda part: -parts[part])
    return {part: parts[part] for part in (*_ORDER, *rest) if parts.get(part)}
