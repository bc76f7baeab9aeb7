"""How much memory a training step will take, from the model's configuration alone.

One step is run on tensors without data (`memory_step`) while every allocation is logged (`memory_log`); the
optimizer's share is arithmetic (`memory_optimizer`), and so is what each process holds of it where several share a
model (`memory_engines`), and what it takes to read without gradients before training and when evaluating
(`memory_forward`). Not counted: Python and its libraries (about 0.6 GiB of resident memory on the CPU; the CUDA
context and the buffers of NCCL on a GPU), and data. What an allocator keeps back is a rule of thumb: on the CPU glibc
may keep much more, as the table in `benchmarks/results/memory.md` shows; MALLOC_MMAP_THRESHOLD_=65536 makes it return
all.
"""

from collections.abc import Sequence

import numpy as np
from torch import nn

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import QuantizationSettings, SelfSupervisedSettings
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example
from prefopt_cli.training.memory_engines import ALONE, Sharing
from prefopt_cli.training.memory_estimate import MemoryEstimate, format_bytes
from prefopt_cli.training.memory_forward import Forward
from prefopt_cli.training.memory_log import Timeline
from prefopt_cli.training.memory_phases import TracedStep, of_step
from prefopt_cli.training.memory_rules import rule_of_thumb
from prefopt_cli.training.memory_sampling import Sampling
from prefopt_cli.training.memory_stand_ins import Device
from prefopt_cli.training.memory_step import Precision, Reference, StepShape, trace_step

__all__ = [
    "Device",
    "Forward",
    "MemoryEstimate",
    "Precision",
    "Reference",
    "Sampling",
    "Sharing",
    "TracedStep",
    "estimate_memory",
    "format_bytes",
    "of_step",
    "trace",
]


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
    sharing: Sharing = ALONE,
    quantization: QuantizationSettings | None = None,
    forward: Forward | None = None,
) -> MemoryEstimate:
    """Estimate the peak memory of one process.

    Args:
        model: a PreTrainedModel, or a PeftModel around one, on any device; on the meta device it costs
            nothing. It is left as it is, and not quantised yet.
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
        sharing: the engine and its processes.
        quantization: how the model's base will be stored.
        forward: what is read without gradients, before training and when evaluating; None: nothing.

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
    return of_step(
        model,
        trace(model, shape),
        optimizer=optimizer,
        sampling=sampling,
        sharing=sharing,
        quantization=quantization,
        forward=forward,
    )


def trace(model: nn.Module, shape: StepShape) -> TracedStep:
    """Follow a step of one process that holds the whole model; by a rule of thumb where that fails."""
    try:
        return TracedStep(shape, trace_step(model, shape), "traced", ())
    except Exception as error:
        # Any code may be in a model, and any of it may need data. A rough answer that says so beats none.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        note = f"This architecture could not be traced, so activations are a rule of thumb ({reason})."
        rough = rule_of_thumb(model, shape)
        timeline = Timeline(tuple(rough), np.array([list(rough.values())]))
        return TracedStep(shape, timeline, "formula", (note,))
