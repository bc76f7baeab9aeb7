"""What `prefopt check` finds out about a run without loading weights."""

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from prefopt_cli.errors import UserError
from prefopt_cli.launch.resolving import ONE_PROCESS, ResolvedLaunch, launch_here
from prefopt_cli.models.policy import describe_reference
from prefopt_cli.models.quantising import require_quantisation
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.arguments import training_arguments
from prefopt_cli.training.degree_inspection import DegradedResponse, first_degraded
from prefopt_cli.training.forecast import Packing, forecast
from prefopt_cli.training.memory import MemoryEstimate
from prefopt_cli.training.memory_engines import processes_of
from prefopt_cli.training.memory_fit import Budget, Fit, fit
from prefopt_cli.training.memory_recipe import RecipeMemory
from prefopt_cli.training.objectives import find_objective, require_sound
from prefopt_cli.training.preparation import Prepared, prepare, sampling_settings, training_field
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
    processes: int
    rows_per_step: int
    """In each process."""
    steps: int
    notes: list[str]
    fit: Fit | None = None
    """Whether the run fits a budget of memory, and how it would; None where none was given."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        fits = self.fit.to_dict() if self.fit else None
        return {**asdict(self), "memory": self.memory.to_dict(), "fit": fits}


def inspect(
    recipe: Recipe,
    *,
    recipe_folder: Path,
    reporter: Reporter,
    device: Device | None = None,
    pairs: int = 2,
    runs: RunFinder | None = None,
    budget: Budget | None = None,
) -> Inspection:
    """Do all of a run but load its weights and train.

    Args:
        recipe: the validated recipe.
        recipe_folder: where a user's own f is looked for first.
        reporter: told what happens.
        device: where the run is to take place; None stands for this machine's.
        pairs: how many pairs (or lists) to show token by token.
        runs: finds the runs of earlier stages, also moved ones.
        budget: memory that the run is to fit.

    Raises:
        UserError: what would stop `prefopt train`, with the same message.
    """
    launch = launch_here(recipe.launch)
    recipe = _with_launch(recipe, launch)
    run = RunFolder(Path(recipe.output_dir).expanduser())
    notes = [*_output_notes(run), *_engine_notes(launch)]
    require_sound(recipe.method, recipe_folder)
    prepared = prepare(recipe, reporter, runs)
    objective = find_objective(recipe.method, recipe_folder, prepared.ancestry)
    given = recipe.training
    on_cpu = given.get("use_cpu") or launch.on_cpu
    here: Device = "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
    device = device or here
    if device == here:  # what another machine can do is not known here
        require_quantisation(recipe)
        training_arguments(recipe, run, evaluates=bool(prepared.tokens.eval))
    per_step = training_field(given, "per_device_train_batch_size") * training_field(
        given, "gradient_accumulation_steps"
    )
    ahead = forecast(recipe, objective, prepared, device)
    gpus = budget.gpus if budget else None
    if budget:
        budget = _resolving(budget)
    memory = RecipeMemory(recipe, prepared, objective, ahead.layout, device, gpus)
    estimate = memory.estimate(recipe)
    processes = processes_of(recipe, gpus)
    return Inspection(
        method=objective.description,
        reference=None
        if objective.reference == "none"
        else describe_reference(prepared.source, recipe.adapter, stacked=prepared.stacked),
        receipt=prepared.tokens.receipt.to_dict(),
        masks=_masks(prepared, pairs),
        degrees=first_degraded(prepared.tokens.train, prepared.tokenizer) if pairs else None,
        packing=ahead.packing,
        memory=estimate,
        sampling=_sampling_plan(recipe, prepared, memory, estimate),
        device=device,
        processes=processes,
        rows_per_step=per_step,
        steps=_steps(given, len(prepared.tokens.train), processes),
        notes=notes,
        fit=fit(recipe, memory, budget) if budget else None,
    )


def _output_notes(run: RunFolder) -> list[str]:
    run.require_writable()
    if run.is_run():
        return [
            f"{run.path} already holds a run: train with --resume or --overwrite, or choose another output_dir."
        ]
    run.require_free(overwrite=False)
    return []


def _with_launch(recipe: Recipe, launch: ResolvedLaunch) -> Recipe:
    return recipe.model_copy(update={"launch": launch.settings})


def _resolving(budget: Budget) -> Budget:
    """With a launch that is resolved in every changed recipe."""

    def change(overrides: Sequence[str]) -> Recipe:
        changed = budget.change(overrides)
        return _with_launch(changed, launch_here(changed.launch))

    return replace(budget, change=change)


def _engine_notes(launch: ResolvedLaunch) -> list[str]:
    """What the memory of shared models is not known to be.

    Raises:
        UserError: the engine shards, and there is one process for certain.
    """
    settings, notes = launch.settings, []
    if settings.engine == "fsdp" and launch.one_process and "WORLD_SIZE" not in os.environ:
        raise UserError(ONE_PROCESS)
    if launch.besides:
        notes.append(f"launch.config asks for {', '.join(launch.besides)}, which the estimate leaves out.")
    if settings.engine == "deepspeed":
        notes.append(
            "The memory of DeepSpeed is reckoned with its default buckets, and has not been measured."
        )
    return notes


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


def _sampling_plan(
    recipe: Recipe, prepared: Prepared, memory: RecipeMemory, estimate: MemoryEstimate
) -> SamplingPlan | None:
    regularizer = sampling_settings(recipe)
    if regularizer is None or prepared.sampling is None:
        return None
    return SamplingPlan(
        prompts=len(prepared.sampling.rows),
        per_draw=regularizer.num_prompts,
        every=regularizer.sample_every,
        max_new_tokens=prepared.sampling.max_new_tokens,
        extra_memory=estimate.total - memory.estimate(recipe, samples=False).total,
    )


def _steps(given: dict[str, Any], rows: int, processes: int) -> int:
    """As many as training takes; every process has its share of the batches."""
    if training_field(given, "max_steps") > 0:
        return int(given["max_steps"])
    down = given.get("dataloader_drop_last")
    batches: float = rows / training_field(given, "per_device_train_batch_size")
    for parts in (1, processes):
        batches = math.floor(batches / parts) if down else math.ceil(batches / parts)
    per_epoch = max(math.ceil(batches / training_field(given, "gradient_accumulation_steps")), 1)
    return math.ceil(per_epoch * training_field(given, "num_train_epochs"))
