"""What each process holds of a model that several share: arithmetic for DDP, FSDP2 and DeepSpeed's ZeRO.

- ddp: everything, and the gradients once more, in the buckets that are sent round.
- fsdp: a part of weights, gradients and optimizer. The layer at work, the next one and the piece outside the layers
  (embedding or head) are whole, and so are the gradients of one piece, twice: as autograd gives them and as they are
  sent. Gradients of several micro-batches stay whole until the last one, unless `sync_each_batch` is set.
- deepspeed: a part of the optimizer, its float32 copy of the weights included (stage 1), of gradients (2), of weights
  (3). Its buckets are those of its default settings; they do not shrink with the model.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from prefopt_cli.recipe.launch_settings import Engine
from prefopt_cli.recipe.schema import QuantizationSettings, Recipe
from prefopt_cli.training.memory_log import AllocationLog
from prefopt_cli.training.memory_units import ModelBytes, model_bytes, shard_share

BUCKET_NUMBERS = 500_000_000
"""Numbers in DeepSpeed's buffer for gradients on their way (reduce_bucket_size)."""

LIVE_NUMBERS = 1_000_000_000
"""Numbers that ZeRO-3 keeps whole at most (stage3_max_live_parameters)."""

MASTER_BYTES = 4
"""Of a weight in the float32 copy that DeepSpeed's optimizer steps on."""

GRADIENT_BUCKETS, GATHERED, WHOLE_GRADIENTS = "gradient buckets", "gathered weights", "gathered gradients"
COMMUNICATION, DEQUANTISED = "communication buckets", "dequantised weights"


@dataclass(frozen=True)
class Sharing:
    """How processes share a model: the part of ``launch`` that decides about memory."""

    engine: Engine = "ddp"
    processes: int = 1
    """On all machines together."""
    zero_stage: int = 2
    """0, which only a file of DeepSpeed's can say, shards nothing."""
    reshard_after_forward: bool = True
    cpu_offload: bool = False
    sync_each_batch: bool = False
    """With fsdp and several micro-batches per step, whether gradients are sharded after each."""

    @property
    def shards_weights(self) -> bool:
        """Whether each process holds a part of the weights only."""
        return self.engine == "fsdp" or (self.engine == "deepspeed" and self.zero_stage == 3)

    def describe(self) -> str:
        """``fsdp on 8 processes, resharded after forward``."""
        words = {"ddp": "", "fsdp": "", "deepspeed": f" (ZeRO-{self.zero_stage})"}[self.engine]
        text = f"{self.engine}{words} on {self.processes} process{'' if self.processes == 1 else 'es'}"
        if self.engine == "fsdp" and not self.reshard_after_forward:
            text += ", weights whole from forward to backward"
        return text + (", shards in the machine's memory" if self.cpu_offload else "")


ALONE = Sharing()
"""One process that holds all."""


def sharing_of(recipe: Recipe, gpus: int | None = None) -> Sharing:
    """How the processes of a recipe's run share its model; for `gpus` see `processes_of`.

    Its launch is taken at its word: of one with a `config`, what `launch_here` makes of it is to be given.
    """
    launch = recipe.launch
    accumulation = recipe.training.get("accelerator_config")
    kwargs = accumulation.get("gradient_accumulation_kwargs") if isinstance(accumulation, dict) else None
    return Sharing(
        engine=launch.engine,
        processes=processes_of(recipe, gpus),
        zero_stage=launch.zero_stage,
        reshard_after_forward=launch.reshard_after_forward,
        cpu_offload=launch.cpu_offload,
        sync_each_batch=bool((kwargs or {}).get("sync_each_batch")),
    )


def processes_of(recipe: Recipe, gpus: int | None = None) -> int:
    """Processes of a run on all machines: those that a launcher has started, or those that the recipe asks for.

    Args:
        recipe: of the run.
        gpus: GPUs that all machines together have, which `processes: auto` stands for; None: those found here.
    """
    started = os.environ.get("WORLD_SIZE", "")
    if started.isdecimal():
        return max(int(started), 1)
    asked, machines = recipe.launch.processes, recipe.launch.machines
    if isinstance(asked, int):
        return machines * asked
    here = torch.accelerator.is_available() and not recipe.training.get("use_cpu")
    return gpus or machines * (max(torch.accelerator.device_count(), 1) if here else 1)


@dataclass(frozen=True)
class Holding:
    """What one process holds on its device, in the terms of a trace of one that holds all."""

    shares: Mapping[str, float]
    """Of the trace's parts, how much of them is there."""
    accumulated: float
    """Of the gradients, how much is there where several micro-batches make a step, until the last one is through."""
    optimizer: int
    """Bytes of the optimizer's states."""
    steps_on: float
    """The share of the weights that the optimizer steps on."""
    constant: Mapping[str, int]
    """Bytes that are there besides, all the time."""
    passing: Mapping[str, int]
    """Bytes that are there besides while the model computes."""
    backward: Mapping[str, int]
    """Bytes that are there besides during backward."""
    host: Mapping[str, int]
    """Bytes that are in the machine's memory instead."""


@dataclass(frozen=True)
class _Shared:
    """A model and the processes that share it."""

    sharing: Sharing
    sizes: ModelBytes
    states: int
    """Bytes of the optimizer's states of all weights."""
    low_precision: bool
    reference_copy: bool
    part: float
    """Of the weights, what one process has where they are sharded."""
    trained_part: float
    """The same of those that are trained."""

    @property
    def stored(self) -> float:
        """Bytes of the weights as they are stored, for each byte of the trace's."""
        return self.sizes.weights / self.sizes.plain_weights

    @property
    def computed(self) -> float:
        """Bytes of the weights that are trained in the type that they are computed in, for each byte of the trace's."""
        return self.sizes.computed_trained / max(self.sizes.trained, 1)

    @property
    def casts(self) -> dict[str, float]:
        """An engine that brings weights to low precision itself leaves nothing for autocast to copy."""
        return {AllocationLog.CAST: 0.0} if self.low_precision else {}


def hold(
    model: Any,
    sharing: Sharing,
    *,
    states: int,
    low_precision: bool,
    reference_copy: bool,
    quantization: QuantizationSettings | None = None,
    offloads: bool = True,
) -> Holding:
    """What one process holds of a model.

    Args:
        model: a causal language model or a `PeftModel` around one, on any device.
        sharing: how it is shared.
        states: bytes of the optimizer's states of all weights that are trained.
        low_precision: whether it is computed in 2 bytes per number.
        reference_copy: whether a frozen copy of the model is run beside it.
        quantization: how its base is stored.
        offloads: whether the machine's memory is another one than the device's.
    """
    sizes = model_bytes(model, low_precision=low_precision, quantization=quantization)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shared = _Shared(
        sharing=sharing,
        sizes=sizes,
        states=states,
        low_precision=low_precision,
        reference_copy=reference_copy,
        part=shard_share(model.parameters(), sharing.processes) if _can_be_cut(quantization) else 1.0,
        trained_part=shard_share(trained, sharing.processes),
    )
    found = {"ddp": _ddp, "fsdp": _fsdp, "deepspeed": _deepspeed}[sharing.engine](shared)
    if sharing.cpu_offload and offloads:
        found = _offloaded(found, shared)
    if sizes.dequantised:
        found = replace(found, passing={**found.passing, DEQUANTISED: sizes.dequantised})
    return found


def _can_be_cut(quantization: QuantizationSettings | None) -> bool:
    """Only tensors of floating-point numbers are sharded; bits packed into bytes stay whole in every process."""
    return quantization is None or (quantization.bits == 4 and quantization.storage_dtype != "uint8")


def _ddp(shared: _Shared) -> Holding:
    buckets = shared.sizes.trained if shared.sharing.processes > 1 else 0
    return Holding(
        shares={"weights": shared.stored},
        accumulated=1.0,
        optimizer=shared.states,
        steps_on=1.0,
        constant={GRADIENT_BUCKETS: buckets},
        passing={},
        backward={},
        host={},
    )


def _fsdp(shared: _Shared) -> Holding:
    sharing, sizes = shared.sharing, shared.sizes
    gathered = sizes.gathered if sharing.reshard_after_forward else sizes.computed_weights
    if shared.reference_copy:  # whose end is never resharded, as no backward pass comes
        gathered += sizes.outside
    return Holding(
        shares={
            "weights": shared.stored * shared.part,
            "frozen policy": shared.stored * shared.part,
            "gradients": shared.trained_part,
            **shared.casts,
        },
        accumulated=shared.trained_part if sharing.sync_each_batch else shared.computed,
        optimizer=round(shared.states * shared.trained_part),
        steps_on=shared.trained_part,
        constant={},
        passing={GATHERED: gathered},
        backward={WHOLE_GRADIENTS: 2 * sizes.whole_gradients},
        host={},
    )


def _deepspeed(shared: _Shared) -> Holding:
    """All weights are brought to the type that they are computed in; the optimizer has a float32 copy of its own."""
    stage, sizes = shared.sharing.zero_stage, shared.sizes
    item = 2 if shared.low_precision else MASTER_BYTES
    weights = (
        shared.stored * sizes.computed_weights / sizes.plain_weights * (shared.part if stage == 3 else 1)
    )
    gradients = shared.computed * (shared.trained_part if stage >= 2 else 1)
    optimized = shared.trained_part if stage >= 1 else 1.0
    master = MASTER_BYTES * sizes.trained_numbers
    whole = min(sizes.computed_weights, LIVE_NUMBERS * item) if stage == 3 else 0
    return Holding(
        shares={"weights": weights, "frozen policy": weights, "gradients": gradients, **shared.casts},
        accumulated=gradients,
        optimizer=round((shared.states + master) * optimized),
        steps_on=optimized,
        constant={COMMUNICATION: BUCKET_NUMBERS * item},
        passing={GATHERED: whole},
        backward={},
        host={},
    )


def _offloaded(found: Holding, shared: _Shared) -> Holding:
    """Shards and the optimizer in the machine's memory, where the optimizer steps; ZeRO-1 has no other shards."""
    sharing, sizes = shared.sharing, shared.sizes
    shares, host = dict(found.shares), {"optimizer": found.optimizer}
    if sharing.shards_weights:
        copies = 2 if shared.reference_copy else 1
        host["weights"] = round(copies * shares["weights"] * sizes.plain_weights)
        shares |= {"weights": 0.0, "frozen policy": 0.0}
    accumulated = found.accumulated
    if sharing.engine == "fsdp" or sharing.zero_stage >= 2:
        host["gradients"] = round(shares["gradients"] * sizes.trained)
        shares["gradients"] = 0.0
        # FSDP's whole gradients are sent there only when the last micro-batch is through.
        whole = sharing.engine == "fsdp" and not sharing.sync_each_batch
        accumulated = accumulated if whole else 0.0
    return replace(found, shares=shares, accumulated=accumulated, optimizer=0, steps_on=0.0, host=host)
