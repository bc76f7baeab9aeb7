"""The manifest: everything needed to say later what a run was."""

import datetime
import uuid
from pathlib import Path
from typing import Any

from prefopt_cli.models.policy import PolicySource, describe_reference, fingerprint
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs import environment
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.preparation import Prepared

MANIFEST_FORMAT = 1


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def first_manifest(
    recipe: Recipe, prepared: Prepared, *, figures: dict[str, Any], recipe_folder: Path, processes: int
) -> dict[str, Any]:
    """The manifest of a run that is about to start.

    Args:
        recipe: the resolved recipe.
        prepared: policy and data.
        figures: what was found out about the method; see `prefopt_cli.training.objectives`.
        recipe_folder: where the recipe lies; a user's own f is looked for there again on resume.
        processes: how many train together.
    """
    return {
        "format": MANIFEST_FORMAT,
        "run_id": uuid.uuid4().hex,
        "status": "running",
        "started": now(),
        "versions": environment.versions(),
        "machine": environment.machine(),
        "git": environment.git_revision(Path.cwd()),
        "recipe_folder": str(recipe_folder.resolve()),
        "processes": processes,
        "seeds": {"training": recipe.training.get("seed", 42), "dataset": recipe.dataset.seed},
        "lineage": _lineage(recipe, prepared),
        "method": {**recipe.method.model_dump(), **figures},
        "data": prepared.tokens.fingerprints,
        "receipt": prepared.tokens.receipt.to_dict(),
    }


def _lineage(recipe: Recipe, prepared: Prepared) -> dict[str, Any]:
    source, commit = prepared.source, getattr(prepared.config, "_commit_hash", None)
    lineage: dict[str, Any] = {
        "policy": source.describe(),
        "name": source.name,
        "weights": source.weights,
        "adapter": str(source.adapter) if source.adapter else None,
        "fingerprint": fingerprint(source, commit),
        "reference": describe_reference(source, recipe.adapter),
        "weights_fingerprint": fingerprint(PolicySource(source.weights), commit),
        "origin": source.name,
        "ancestors": [],
    }
    if source.run is not None:
        parent = RunFolder(source.run).read_manifest()
        # What the first ancestor started from stays known where the ancestors are moved or deleted.
        lineage["origin"] = source.name or parent.get("lineage", {}).get("origin")
        lineage["ancestors"] = [
            *parent.get("lineage", {}).get("ancestors", []),
            {"run": str(source.run), "run_id": parent.get("run_id"), "method": parent.get("method")},
        ]
    return lineage
