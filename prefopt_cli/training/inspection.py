"""What `prefopt check` finds out about a run without loading weights."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from prefopt_cli.models.policy import describe_reference
from prefopt_cli.recipe.schema import LoraAdapter, Recipe
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.arguments import training_arguments
from prefopt_cli.training.degree_inspection import DegradedResponse, first_degraded
from prefopt_cli.training.extent import prompt_lengths
from prefopt_cli.training.forecast import Forecast, Packing, checkpoints_layers, forecast
from prefopt_cli.training.memory import MemoryEstimate, Precision, Reference, Sampling, estimate_memory
from prefopt_cli.training.objectives import find_objective, require_sound
from prefopt_cli.training.preparation import (
    Prepared,
    degree_settings,
    prepare,
    sampling_settings,
    training_field,
)
from prefopt_cli.training.reporting import Reporter
from prefopt_cli.training.row_text import pieces, side_of

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class MaskedResponse:
    """One response as the model sees it, token by token."""

    row_id: str
    side: str
    """chosen, rejected, or in a list response 1, the best, response 2, ...; it is said where several tie."""
    rank: int
    """0 is best."""
    context: list[str]
    """Tokens that are only read."""
    trained: list[str]
    """Tokens whose log-probability enters the loss."""


@dataclass(frozen=True)
class SamplingPlan:
    """The policy's own responses during training."""

    prompts: int
    """Prompts there are to sample from."""
    per_draw: int
    """Samples of a draw, in every process."""
    every: int
    """Optimizer steps between two draws."""
    max_new_tokens: int
    extra_memory: int
    """Bytes that the KL on these samples adds to the peak, the reference included, at most."""


@dataclass(frozen=True)
class Inspection:
    """The findings of a check."""

    method: str
    reference: str | None
    """None where the method asks no reference policy."""
    receipt: dict[str, Any]
    masks: list[MaskedResponse]
    degrees: DegradedResponse | None
    """A response that takes part in the degree loss; None where the method has none, or nothing is to be shown."""
    packing: Packing
    memory: MemoryEstimate
    sampling: SamplingPlan | None
    device: Device
    rows_per_step: int
    steps: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def inspect(
    recipe: Recipe,
    *,
    recipe_folder: Path,
    reporter: Reporter,
    device: Device | None = None,
    pairs: int = 2,
    runs: RunFinder | None = None,
) -> Inspection:
    """Do all of a run but load its weights and train.

    Args:
        recipe: the validated recipe.
        recipe_folder: where a user's own f is looked for first.
        reporter: told what happens.
        device: where the run is to take place; None stands for this machine's.
        pairs: how many pairs (or lists) to show token by token.
        runs: finds the runs of earlier stages, also moved ones.

    Raises:
        UserError: what would stop `prefopt train`, with the same message.
    """
    run = RunFolder(Path(recipe.output_dir).expanduser())
    notes = _output_notes(run)
    require_sound(recipe.method, recipe_folder)
    prepared = prepare(recipe, reporter, runs)
    objective = find_objective(recipe.method, recipe_folder, prepared.ancestry)
    given = recipe.training
    here: Device = "cuda" if torch.cuda.is_available() and not given.get("use_cpu") else "cpu"
    device = device or here
    if device == here:  # what another machine can do is not known here
        training_arguments(recipe, run, evaluates=bool(prepared.tokens.eval))
    per_step = training_field(given, "per_device_train_batch_size") * training_field(
        given, "gradient_accumulation_steps"
    )
    ahead = forecast(recipe, objective, prepared, device)
    sampling = _sampling(recipe, prepared)
    memory = _memory(recipe, prepared, ahead, device, sampling)
    return Inspection(
        method=objective.description,
        reference=None
        if objective.reference == "none"
        else describe_reference(prepared.source, recipe.adapter, stacked=prepared.stacked),
        receipt=prepared.tokens.receipt.to_dict(),
        masks=_masks(prepared, pairs),
        degrees=first_degraded(prepared.tokens.train, prepared.tokenizer) if pairs else None,
        packing=ahead.packing,
        memory=memory,
        sampling=_sampling_plan(recipe, prepared, ahead, device, memory, sampling),
        device=device,
        rows_per_step=per_step,
        steps=_steps(given, len(prepared.tokens.train), per_step),
        notes=notes,
    )


def _output_notes(run: RunFolder) -> list[str]:
    run.require_writable()
    if run.is_run():
        return [
            f"{run.path} already holds a run: train with --resume or --overwrite, or choose another output_dir."
        ]
    run.require_free(overwrite=False)
    return []


def _masks(prepared: Prepared, count: int) -> list[MaskedResponse]:
    masks = []
    for row in prepared.tokens.train.select(range(min(count, len(prepared.tokens.train)))):
        prompt = row["prompt_ids"]
        for number, (response, rank) in enumerate(zip(row["response_ids"], row["ranks"], strict=True)):
            texts = pieces(prepared.tokenizer, prompt + response)
            side = side_of(row["ranks"], number)
            masks.append(
                MaskedResponse(row["row_id"], side, rank, texts[: len(prompt)], texts[len(prompt) :])
            )
    return masks


def _sampling(recipe: Recipe, prepared: Prepared) -> Sampling | None:
    """The heaviest draw: of the longest prompts, every sample running into the limit."""
    regularizer = sampling_settings(recipe)
    if regularizer is None or prepared.sampling is None:
        return None
    lengths = np.sort(prompt_lengths(prepared.sampling.rows))[::-1]
    return Sampling(
        tuple(np.resize(lengths[: regularizer.num_prompts], regularizer.num_prompts).tolist()),
        prepared.sampling.max_new_tokens,
    )


def _sampling_plan(
    recipe: Recipe,
    prepared: Prepared,
    ahead: Forecast,
    device: Device,
    memory: MemoryEstimate,
    sampling: Sampling | None,
) -> SamplingPlan | None:
    regularizer = sampling_settings(recipe)
    if sampling is None or regularizer is None or prepared.sampling is None:
        return None
    without = _memory(recipe, prepared, ahead, device, None)
    return SamplingPlan(
        prompts=len(prepared.sampling.rows),
        per_draw=regularizer.num_prompts,
        every=regularizer.sample_every,
        max_new_tokens=prepared.sampling.max_new_tokens,
        extra_memory=memory.total - without.total,
    )


def _memory(
    recipe: Recipe, prepared: Prepared, ahead: Forecast, device: Device, sampling: Sampling | None
) -> MemoryEstimate:
    """Of the heaviest batch of an epoch in random order: the run's peak is there or thereabouts."""
    given = recipe.training
    return estimate_memory(
        prepared.skeleton,
        ahead.heaviest,
        ahead.layout,
        reference=_reference_kind(recipe, ahead, sampling),
        optimizer=training_field(given, "optim"),
        mixed_precision=_precision(given, device),
        gradient_checkpointing=checkpoints_layers(given),
        gradient_accumulation_steps=training_field(given, "gradient_accumulation_steps"),
        device=device,
        sampling=sampling,
        degrees=degree_settings(recipe),
    )


def _reference_kind(recipe: Recipe, ahead: Forecast, sampling: Sampling | None) -> Reference:
    if ahead.packing.reference != "every step" and sampling is None:
        return "none"
    return "adapter_disabled" if isinstance(recipe.adapter, LoraAdapter) else "copy"


def _precision(given: dict[str, Any], device: Device) -> Precision:
    if given.get("fp16"):
        return "fp16"
    return "bf16" if given.get("bf16", device == "cuda") else "no"


def _steps(given: dict[str, Any], rows: int, per_step: int) -> int:
    if training_field(given, "max_steps") > 0:
        return int(given["max_steps"])
    batches = rows / training_field(given, "per_device_train_batch_size")
    batches = math.floor(batches) if given.get("dataloader_drop_last") else math.ceil(batches)
    per_epoch = max(math.ceil(batches / training_field(given, "gradient_accumulation_steps")), 1)
    return math.ceil(per_epoch * training_field(given, "num_train_epochs"))
