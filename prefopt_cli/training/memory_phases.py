"""From a step that was traced in one process to the peak of each of several, over all phases of a run."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from prefopt_cli.models.quantised import weight_bytes
from prefopt_cli.recipe.schema import QuantizationSettings
from prefopt_cli.training.memory_engines import DEQUANTISED, GATHERED, Holding, Sharing, hold
from prefopt_cli.training.memory_estimate import MemoryEstimate, Phase, ordered, with_allocator
from prefopt_cli.training.memory_forward import Forward, forward_bytes
from prefopt_cli.training.memory_log import Timeline
from prefopt_cli.training.memory_optimizer import (
    is_known_optimizer,
    optimizer_state_bytes,
    optimizer_step_bytes,
)
from prefopt_cli.training.memory_rules import resident_bytes
from prefopt_cli.training.memory_sampling import Sampling, sampling_bytes
from prefopt_cli.training.memory_step import StepShape
from prefopt_cli.training.memory_units import tensor_bytes


@dataclass(frozen=True)
class TracedStep:
    """What a step allocates in a process that holds all; every engine's share follows from it."""

    shape: StepShape
    timeline: Timeline
    method: Literal["traced", "formula"]
    notes: tuple[str, ...]


def of_step(
    model: nn.Module,
    step: TracedStep,
    *,
    optimizer: str,
    sharing: Sharing,
    sampling: Sampling | None = None,
    quantization: QuantizationSettings | None = None,
    forward: Forward | None = None,
) -> MemoryEstimate:
    """The peak of one process, from a step that was traced once for all engines; see `estimate_memory`."""
    shape = step.shape
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    holding = hold(
        model,
        sharing,
        states=optimizer_state_bytes(optimizer, trainable),
        low_precision=shape.mixed_precision != "no",
        reference_copy=shape.reference == "copy",
        quantization=quantization,
        offloads=shape.device != "cpu",
    )
    phases = _phases(model, step, holding, optimizer, sampling, forward)
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    notes = step.notes
    if not is_known_optimizer(optimizer):
        notes += (f"The states of optim={optimizer} are not known; those of AdamW are assumed.",)
    before, needed = _before(model, shape, holding, forward, quantization, sharing)
    return MemoryEstimate(
        parts=with_allocator(phases[phase], shape.device),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable_parameters=sum(parameter.numel() for parameter in trainable),
        phase=phase,
        method=step.method,
        notes=notes,
        sharing=sharing,
        host=ordered(holding.host),
        before=before,
        whole_before=not is_sharded_early(model, sharing),
        needed_before=needed,
    )


def _phases(
    model: nn.Module,
    step: TracedStep,
    holding: Holding,
    optimizer: str,
    sampling: Sampling | None,
    forward: Forward | None,
) -> dict[Phase, dict[str, int]]:
    """Bytes by part in every phase of training."""
    shape = step.shape
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    resident = {
        **{
            part: round(size * holding.shares.get(part, 1.0))
            for part, size in resident_bytes(model, shape.reference).items()
        },
        "optimizer": holding.optimizer,
        **holding.constant,
    }
    gradients = holding.accumulated if shape.accumulates else holding.shares.get("gradients", 1.0)
    temporaries = round(holding.steps_on * optimizer_step_bytes(optimizer, trainable, shape.device))
    phases: dict[Phase, dict[str, int]] = {
        "forward and backward": {
            **step.timeline.peak({**holding.shares, "gradients": gradients}),
            "optimizer": holding.optimizer,
            **holding.constant,
            **holding.passing,
            **holding.backward,
        },
        "optimizer step": {
            **resident,
            "gradients": round(holding.shares.get("gradients", 1.0) * tensor_bytes(trainable)),
            "optimizer temporaries": temporaries,
        },
    }
    if sampling:
        written = sampling_bytes(model, sampling, shape.mixed_precision)
        phases["sampling"] = {**resident, **holding.passing, **_held(written, holding)}
    if forward and forward.evaluated:
        read = forward_bytes(model, forward.evaluated, shape)
        phases["evaluation"] = {**resident, **holding.passing, **_held(read, holding)}
    return phases


def is_sharded_early(model: nn.Module, sharing: Sharing) -> bool:
    """Whether frozen policies are sharded for scoring: see `prefopt_cli.training.frozen_policies.shards`."""
    return sharing.engine == "fsdp" and not hasattr(model, "peft_config")


def _before(
    model: nn.Module,
    shape: StepShape,
    holding: Holding,
    forward: Forward | None,
    quantization: QuantizationSettings | None,
    sharing: Sharing,
) -> tuple[dict[str, int], int]:
    """(bytes by part before training, those of them that are needed): one model, read without gradients.

    It is whole in every process, but under FSDP where all its weights are trained. Batches that do not fit are halved
    neither then nor on a CPU, where the system ends a process that takes too much.
    """
    if forward is None:
        return {}, 0
    weights = weight_bytes(model, quantization) + tensor_bytes(model.buffers())
    sharded = is_sharded_early(model, sharing)
    if sharded:
        weights = round(weights * holding.shares["weights"])
    passing = {DEQUANTISED, GATHERED} if sharded else {DEQUANTISED}
    whole = {"weights": weights, **{part: holding.passing.get(part, 0) for part in passing}}
    if forward.earlier_policies and shape.device == "cpu":  # on a GPU the policy makes room for them
        whole["frozen policy"] = weights
    read = [forward_bytes(model, tokens, shape) for tokens in (forward.scored, forward.longest)]
    if sharded:  # weights are gathered in low precision, and autocast has nothing left to copy
        read = [_held(parts, holding) for parts in read]
    most, least = (with_allocator({**whole, **parts}, shape.device) for parts in read)
    return most, sum((least if shape.device == "cuda" and not sharded else most).values())


def _held(parts: dict[str, int], holding: Holding) -> dict[str, int]:
    return {part: round(size * holding.shares.get(part, 1.0)) for part, size in parts.items()}
