"""Settings with which a recipe takes less memory, in the order in which one would try them.

What keeps the result comes first: another number of processes and smaller micro-batches with the same global batch,
checkpointing, the reference's scores computed before training, sharding, the machine's memory. What trains another
thing, an adapter and a base of 4 bits, comes last.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from prefopt_cli.recipe.schema import (
    LoraAdapter,
    QuantizationSettings,
    Recipe,
    SoftSettings,
    place_of_alignment,
)
from prefopt_cli.training.forecast import checkpoints_layers
from prefopt_cli.training.preparation import sampling_settings, training_field

BATCH, ACCUMULATION = "training.per_device_train_batch_size", "training.gradient_accumulation_steps"
SYNC = "training.accelerator_config={gradient_accumulation_kwargs: {sync_each_batch: true}}"


@dataclass(frozen=True)
class Setting:
    """One override of a command line, and what it is for."""

    override: str
    does: str
    keeps_result: bool = True
    """Whether the same thing is trained, up to rounding."""


@dataclass(frozen=True)
class Rung:
    """Settings that go together; the micro-batch is still open."""

    settings: tuple[Setting, ...] = ()
    accumulates: bool = False
    """Whether it is of use only where a step has several micro-batches."""

    def __add__(self, other: Setting) -> "Rung":
        return replace(self, settings=(*self.settings, other))


@dataclass(frozen=True)
class Base:
    """The weights that a recipe starts from, as far as they decide what can be proposed."""

    quantization: QuantizationSettings | None
    """How they are quantised, by the recipe or in their folder."""
    may_be_quantised: bool
    """Whether the recipe may say how: not of a folder that is quantised, nor under an adapter that they have."""
    dtype: str
    """Of the model under an adapter, as torch names it."""


@dataclass(frozen=True)
class Batches:
    """How the rows of a step are shared out."""

    processes: int
    """On all machines."""
    rows: int
    """Of a step, in each process."""
    micro: int
    """Rows of a micro-batch as the recipe has it, at most as many."""

    def micro_batches(self) -> list[int]:
        """The sizes that divide a step evenly, the largest first."""
        return [size for size in range(min(self.micro, self.rows), 0, -1) if self.rows % size == 0]


def share_out(recipe: Recipe, processes: int, gpus: int) -> Batches:
    """Share the rows of a step out to as many processes as there are GPUs, or as they divide into.

    Args:
        recipe: as it is.
        processes: that it is meant for.
        gpus: there are, on all machines.
    """
    size = training_field(recipe.training, "per_device_train_batch_size")
    rows = size * training_field(recipe.training, "gradient_accumulation_steps") * processes
    machines = recipe.launch.machines
    usable = [count for count in range(gpus, 0, -1) if count % machines == 0 and rows % count == 0]
    # One process on each machine is the least; where not even that divides, the recipe stays as it is.
    chosen = usable[0] if usable else processes
    return Batches(chosen, rows // chosen, size)


def batch_settings(recipe: Recipe, batches: Batches, processes: int, micro: int) -> list[Setting]:
    """The settings that share a step's rows out like this, as far as the recipe differs.

    Args:
        recipe: as it is.
        batches: how rows are shared out.
        processes: that the recipe is meant for.
        micro: rows of a micro-batch.
    """
    found = []
    method = recipe.method.alignment
    weighted = isinstance(method, SoftSettings) and method.mu != "none"
    if batches.processes != processes or recipe.launch.processes == "auto":
        each = batches.processes // recipe.launch.machines
        found.append(
            Setting(f"launch.processes={each}", f"the step's rows are shared by {batches.processes} GPUs")
        )
        found += _samples(recipe, processes, batches.processes)
    if micro != training_field(recipe.training, "per_device_train_batch_size"):
        does = "smaller micro-batches"
        if weighted:
            does += ", within which method mu weighs its pairs"
        found.append(Setting(f"{BATCH}={micro}", does, keeps_result=not weighted))
    accumulation = batches.rows // micro
    if accumulation != training_field(recipe.training, "gradient_accumulation_steps"):
        found.append(Setting(f"{ACCUMULATION}={accumulation}", "the same rows in a step"))
    return found


def evaluation_settings(recipe: Recipe, micro: int) -> list[Setting]:
    """Evaluation in batches no larger than those of training."""
    if training_field(recipe.training, "per_device_eval_batch_size") <= micro:
        return []
    return [Setting(f"training.per_device_eval_batch_size={micro}", "evaluation in smaller batches")]


def _samples(recipe: Recipe, before: int, after: int) -> Iterator[Setting]:
    """The policy's samples are counted by process."""
    regularizer = sampling_settings(recipe)
    if regularizer is None or before == after:
        return
    each = max(regularizer.num_prompts * before // after, 1)
    place = f"{place_of_alignment(recipe.method)}.regularizer.num_prompts"
    same = each * after == regularizer.num_prompts * before
    yield Setting(f"{place}={each}", "samples of the policy in each process", keeps_result=same)


def rungs(
    recipe: Recipe, *, processes: int, on_gpu: bool, reference_on_data: bool, base: Base
) -> Iterator[Rung]:
    """Sets of settings, each of which is to be tried with all micro-batches.

    Args:
        recipe: as it is.
        processes: that there will be.
        on_gpu: whether the run is on GPUs, whose memory is not the machine's.
        reference_on_data: whether the method asks its reference about the data.
        base: the weights that it starts from.
    """
    here = Rung()
    yield here
    for lighter in _lighter(recipe, reference_on_data):
        here += lighter
        yield here
    if processes > 1 and base.quantization is None:  # few bits are left as they are shared
        yield from _sharded(recipe, here, on_gpu=on_gpu)
    for smaller in _other_training(recipe, base):
        here = replace(here, settings=(*here.settings, *smaller))
        yield here


def _lighter(recipe: Recipe, reference_on_data: bool) -> Iterator[Setting]:
    given = recipe.training
    if not checkpoints_layers(given):
        name = "activation_checkpointing" if "activation_checkpointing" in given else "gradient_checkpointing"
        yield Setting(f"training.{name}=true", "layers are computed again in backward: about a third slower")
    if reference_on_data and not training_field(given, "precompute_ref_log_probs"):
        yield Setting("training.precompute_ref_log_probs=true", "no frozen policy while training")


def _sharded(recipe: Recipe, here: Rung, *, on_gpu: bool) -> Iterator[Rung]:
    """Weights, gradients and optimizer in parts; of DeepSpeed the stages that the recipe does not have yet."""
    launch = recipe.launch
    if launch.engine == "deepspeed":
        for stage in range(launch.zero_stage + 1, 4):
            here = Rung(tuple(each for each in here.settings if "zero_stage" not in each.override))
            here += Setting(
                f"launch.zero_stage={stage}", f"{'weights' if stage == 3 else 'gradients'} sharded too"
            )
            yield here
    else:
        if launch.engine == "ddp":
            here += Setting("launch.engine=fsdp", "weights, gradients and optimizer sharded")
            yield here
        elif not launch.reshard_after_forward:
            here += Setting("launch.reshard_after_forward=true", "gathered weights given back after forward")
            yield here
        if "accelerator_config" not in recipe.training:
            yield replace(here + Setting(SYNC, "gradients sharded after every micro-batch"), accumulates=True)
    if on_gpu and not launch.cpu_offload:
        here += Setting("launch.cpu_offload=true", "shards and optimizer in the machine's memory: slow")
        yield here
        if launch.engine != "deepspeed" and "accelerator_config" not in recipe.training:
            yield replace(here + Setting(SYNC, "gradients sharded after every micro-batch"), accumulates=True)


def _other_training(recipe: Recipe, base: Base) -> Iterator[tuple[Setting, ...]]:
    if not isinstance(recipe.adapter, LoraAdapter):
        does = "an adapter is trained instead of all weights, mostly at a higher learning rate"
        yield (Setting("adapter={type: lora, r: 16}", does, keeps_result=False),)
    if base.may_be_quantised and (base.quantization is None or base.quantization.bits == 8):
        yield tuple(_four_bits(recipe, base))


def _four_bits(recipe: Recipe, base: Base) -> Iterator[Setting]:
    """A base of 4 bits, as the engine can share it."""
    launch, storage = recipe.launch, ""
    if launch.engine == "deepspeed" and launch.zero_stage == 3:
        yield Setting("launch.zero_stage=2", "weights of few bits stay whole in each process")
    if launch.engine == "fsdp":
        storage = f", storage_dtype: {base.dtype}"  # of tensors that it can take apart
    does = "the base in 4 bits (NF4), which rounds it"
    yield Setting(f"quantization={{bits: 4{storage}}}", does, keeps_result=False)
