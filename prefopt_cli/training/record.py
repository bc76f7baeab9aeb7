"""The manifest: everything needed to say later what a run was."""

import datetime
import uuid
from pathlib import Path
from typing import Any

from prefopt_cli.models.policy import PolicySource, describe_reference
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs import environment
from prefopt_cli.runs.folder import RunFolder

MANIFEST_FORMAT = 1


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def first_manifest(
    recipe: Recipe,
    source: PolicySource,
    receipt: dict[str, Any],
    fingerprints: dict[str, str],
    f: dict[str, Any],
) -> dict[str, Any]:
    """The manifest of a run that is about to start.

    Args:
        recipe: the resolved recipe.
        source: the starting policy.
        receipt: what became of the data's rows.
        fingerprints: content hash of every tokenised set.
        f: figures of the method's function, as probed.
    """
    return {
        "format": MANIFEST_FORMAT,
        "run_id": uuid.uuid4().hex,
        "status": "running",
        "started": now(),
        "versions": environment.versions(),
        "machine": environment.machine(),
        "git": environment.git_revision(Path.cwd()),
        "seeds": {"training": recipe.training.get("seed", 42), "dataset": recipe.dataset.seed},
        "lineage": _lineage(recipe, source),
        "method": {**recipe.method.model_dump(), "f": f},
        "data": fingerprints,
        "receipt": receipt,
    }


def _lineage(recipe: Recipe, source: PolicySource) -> dict[str, Any]:
    lineage: dict[str, Any] = {
        "policy": source.describe(),
        "weights": source.weights,
        "adapter": str(source.adapter) if source.adapter else None,
        "reference": describe_reference(source, recipe.adapter),
        "ancestors": [],
    }
    if source.run is not None:
        parent = RunFolder(source.run).read_manifest()
        lineage["ancestors"] = [
            *parent.get("lineage", {}).get("ancestors", []),
            {"run": str(source.run), "run_id": parent.get("run_id"), "method": parent.get("method")},
        ]
    return lineage
