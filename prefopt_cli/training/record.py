"""The manifest: everything needed to say later what a run was."""

import datetime
import uuid
from pathlib import Path
from typing import Any

from trl import DPOConfig

from prefopt_cli.models import loading
from prefopt_cli.models.ancestry import as_ancestor
from prefopt_cli.models.policy import PolicySource, describe_reference, fingerprint, merge_record
from prefopt_cli.models.quantised import kept_modules
from prefopt_cli.recipe.schema import Recipe, dimension_of
from prefopt_cli.runs import environment
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.engines import engine
from prefopt_cli.training.preparation import Prepared

MANIFEST_FORMAT = 1


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def first_manifest(
    recipe: Recipe, prepared: Prepared, *, figures: dict[str, Any], recipe_folder: Path, args: DPOConfig
) -> dict[str, Any]:
    """The manifest of a run that is about to start.

    Args:
        recipe: the resolved recipe.
        prepared: policy and data.
        figures: what was found out about the method; see `prefopt_cli.training.objectives`.
        recipe_folder: where the recipe lies; a user's own f is looked for there again on resume.
        args: the training arguments, which know how many processes train together.
    """
    return {
        "format": MANIFEST_FORMAT,
        "run_id": uuid.uuid4().hex,
        "status": "running",
        "dimension": dimension_of(recipe),
        "started": now(),
        "versions": environment.versions(),
        "machine": environment.machine(),
        "git": environment.git_revision(Path.cwd()),
        "recipe_folder": str(recipe_folder.resolve()),
        "processes": args.world_size,
        "engine": engine(),
        "rows_per_step": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "seeds": {"training": recipe.training.get("seed", 42), "dataset": recipe.dataset.seed},
        "lineage": _lineage(recipe, prepared),
        "method": {**recipe.method.model_dump(), **figures},
        "data": prepared.tokens.fingerprints,
        "receipt": prepared.tokens.receipt.to_dict(),
    }


def exported_fingerprint(run: RunFolder, prepared: Prepared) -> str:
    """The fingerprint of the policy that a run has just exported."""
    is_adapter = (run.model / "adapter_config.json").is_file()
    source = PolicySource(str(run.model))
    if is_adapter:
        below = prepared.source
        source = PolicySource(below.weights, run.model, quantization=below.quantization)
    return fingerprint(source, getattr(prepared.config, "_commit_hash", None))


def _lineage(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    source, commit = prepared.source, getattr(prepared.config, "_commit_hash", None)
    own = fingerprint(source, commit)
    lineage: dict[str, Any] = {
        "policy": source.describe(),
        "name": source.name,
        "weights": _absolute(source.weights) if source.is_local else source.weights,
        "adapter": _absolute(source.adapter) if source.adapter else None,
        "quantization": source.quantization.model_dump() if source.quantization else None,
        "kept_modules": _kept_modules(recipe, source),
        "fingerprint": own,
        "reference": describe_reference(source, recipe.adapter, stacked=prepared.stacked),
        "weights_fingerprint": fingerprint(PolicySource(source.weights), commit),
        "origin": source.name,
        "base": source.name or (_absolute(source.weights) if source.is_local else source.weights),
        "adapters": [],
        "ancestors": [],
        "merged_from": None,
    }
    if source.run is not None:
        lineage.update(_after(source, RunFolder(source.run), own))
    elif source.adapter is not None:
        lineage["adapters"] = [_absolute(source.adapter)]
    elif (record := merge_record(source.weights)) is not None:
        # What the merged policy went through stays known, and so does what it began with.
        lineage.update(
            {name: record[name] for name in ("base", "adapters", "ancestors")},
            origin=record["base"],
            merged_from=record["fingerprint"],
        )
    return lineage


def _kept_modules(recipe: Recipe, source: PolicySource) -> list[str] | None:
    """What stays as it is of weights that are quantised, in the library's words; None: what it leaves alone anyway."""
    if source.quantization is None or not source.quantization.skip_modules:
        return None
    bare = loading.on_meta_device(source, recipe.model, "none")  # an adapter has modules of its own
    return kept_modules(bare, source.quantization)


def _after(source: PolicySource, run: RunFolder, own: str) -> dict[str, Any]:
    """The line of a policy that a run trained. It stays known where the earlier runs are moved or deleted."""
    parent = run.read_manifest()
    before = parent.get("lineage", {})
    return {
        "origin": source.name or before.get("origin"),
        "base": before.get("base") or before.get("name") or before.get("weights"),
        "adapters": [*before.get("adapters", []), *([_absolute(source.adapter)] if source.adapter else [])],
        "ancestors": [*before.get("ancestors", []), {**as_ancestor(run, parent), "ended_with": own}],
    }


def _absolute(place: str | Path) -> str:
    """As it can be found from any working directory."""
    return str(Path(place).absolute())
