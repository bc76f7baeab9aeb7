"""What `prefopt check` finds out about a run without loading weights."""

import math
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from prefopt_cli.models.policy import describe_reference
from prefopt_cli.recipe.schema import LoraAdapter, Recipe
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.arguments import training_arguments
from prefopt_cli.training.forecast import Forecast, Packing, checkpoints_layers, forecast
from prefopt_cli.training.functions import describe_probe, find_function, require_usable
from prefopt_cli.training.memory import MemoryEstimate, Precision, Reference, estimate_memory
from prefopt_cli.training.preparation import Prepared, prepare, training_field
from prefopt_cli.training.reporting import Reporter

Device = Literal["cpu", "cuda"]
Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")


@dataclass(frozen=True)
class MaskedPair:
    """One side of a pair as the model sees it, token by token."""

    pair_id: str
    side: Side
    context: list[str]
    """Tokens that are only read."""
    trained: list[str]
    """Tokens whose log-probability enters the loss."""


@dataclass(frozen=True)
class Inspection:
    """The findings of a check."""

    method: str
    reference: str
    receipt: dict[str, Any]
    masks: list[MaskedPair]
    packing: Packing
    memory: MemoryEstimate
    device: Device
    pairs_per_step: int
    steps: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def inspect(
    recipe: Recipe, *, recipe_folder: Path, reporter: Reporter, device: Device | None = None, pairs: int = 2
) -> Inspection:
    """Do all of a run but load its weights and train.

    Args:
        recipe: the validated recipe.
        recipe_folder: where a user's own f is looked for first.
        reporter: told what happens.
        device: where the run is to take place; None stands for this machine's.
        pairs: how many pairs to show token by token.

    Raises:
        UserError: what would stop `prefopt train`, with the same message.
    """
    run = RunFolder(Path(recipe.output_dir).expanduser())
    notes = _output_notes(run)
    loss = recipe.method.loss
    method = describe_probe(loss, require_usable(loss, find_function(loss, recipe_folder)))
    prepared = prepare(recipe, reporter)
    given = recipe.training
    here: Device = "cuda" if torch.cuda.is_available() and not given.get("use_cpu") else "cpu"
    device = device or here
    if device == here:  # what another machine can do is not known here
        training_arguments(recipe, run, evaluates=bool(prepared.tokens.eval))
    per_step = training_field(given, "per_device_train_batch_size") * training_field(
        given, "gradient_accumulation_steps"
    )
    ahead = forecast(recipe, prepared, device)
    return Inspection(
        method=method,
        reference=describe_reference(prepared.source, recipe.adapter),
        receipt=prepared.tokens.receipt.to_dict(),
        masks=_masks(prepared, pairs),
        packing=ahead.packing,
        memory=_memory(recipe, prepared, ahead, device),
        device=device,
        pairs_per_step=per_step,
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


def _masks(prepared: Prepared, count: int) -> list[MaskedPair]:
    masks = []
    for row in prepared.tokens.train.select(range(min(count, len(prepared.tokens.train)))):
        prompt = row["prompt_ids"]
        for side in SIDES:
            pieces = _pieces(prepared.tokenizer, prompt + row[f"{side}_ids"])
            masks.append(MaskedPair(row["pair_id"], side, pieces[: len(prompt)], pieces[len(prompt) :]))
    return masks


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Every token as the text that it adds to its predecessor: alone, some tokenizers drop its space."""
    alone = [tokenizer.decode([token]) for token in ids]
    pieces = alone[:1]
    for before, (first, second) in zip(alone, pairwise(ids), strict=False):
        added = tokenizer.decode([first, second]).removeprefix(before)
        pieces.append(added or tokenizer.convert_ids_to_tokens(second))
    return pieces


def _memory(recipe: Recipe, prepared: Prepared, ahead: Forecast, device: Device) -> MemoryEstimate:
    """Of the heaviest batch of an epoch in random order: the run's peak is there or thereabouts."""
    given = recipe.training
    return estimate_memory(
        prepared.skeleton,
        ahead.heaviest,
        ahead.layout,
        reference=_reference_kind(recipe),
        optimizer=training_field(given, "optim"),
        mixed_precision=_precision(given, device),
        gradient_checkpointing=checkpoints_layers(given),
        gradient_accumulation_steps=training_field(given, "gradient_accumulation_steps"),
        device=device,
    )


def _reference_kind(recipe: Recipe) -> Reference:
    if training_field(recipe.training, "precompute_ref_log_probs"):
        return "none"
    return "adapter_disabled" if isinstance(recipe.adapter, LoraAdapter) else "copy"


def _precision(given: dict[str, Any], device: Device) -> Precision:
    if given.get("fp16"):
        return "fp16"
    return "bf16" if given.get("bf16", device == "cuda") else "no"


def _steps(given: dict[str, Any], pairs: int, per_step: int) -> int:
    if training_field(given, "max_steps") > 0:
        return int(given["max_steps"])
    batches = pairs / training_field(given, "per_device_train_batch_size")
    batches = math.floor(batches) if given.get("dataloader_drop_last") else math.ceil(batches)
    per_epoch = max(math.ceil(batches / training_field(given, "gradient_accumulation_steps")), 1)
    return math.ceil(per_epoch * training_field(given, "num_train_epochs"))
