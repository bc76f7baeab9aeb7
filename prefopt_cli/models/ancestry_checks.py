"""What must hold between a sequential stage and the runs that it names as its earlier stages."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.models.policy import PolicySource, has_fingerprint
from prefopt_cli.runs.folder import RunFolder

WITH_REWARD = ("gpo", "sequential")
"""Methods whose policies have an implicit reward."""

Found = tuple[RunFolder, dict[str, Any]]
"""A run and its manifest."""


def ancestors_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The runs that a run's policy went through, the oldest first."""
    found = (manifest.get("lineage") or {}).get("ancestors")
    return found if isinstance(found, list) else []


def complete_manifest(run: RunFolder, key: str) -> dict[str, Any]:
    """The manifest of an earlier stage.

    Raises:
        UserError: something is missing in it that later stages need.
    """
    manifest = run.read_manifest()
    lineage, method = manifest.get("lineage"), manifest.get("method")
    settings = (method.get("align") or method) if isinstance(method, dict) else {}
    needed = {
        "run_id": manifest.get("run_id"),
        "lineage.weights": isinstance(lineage, dict) and lineage.get("weights"),
        "lineage.fingerprint": isinstance(lineage, dict) and lineage.get("fingerprint"),
        "method.name": settings.get("name"),
    }
    if settings.get("name") in WITH_REWARD:
        needed |= {f"method.{name}": name in settings for name in ("beta", "length_normalize")}
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise UserError(
            f"{key}: {run.manifest} is not whole ({', '.join(missing)} missing), so what the run was is not known. "
            "Restore it, or train the run anew."
        )
    return manifest


def require_new_dimension(dimension: str, earlier: Sequence[str]) -> None:
    """Refuse a stage that later ones could not tell from one before it.

    Raises:
        UserError: its dimension is that of an earlier stage.
    """
    if dimension in earlier:
        raise UserError(
            f"dimension: an earlier stage is about {dimension}, too, and later ones could not tell them apart. Set "
            "`dimension` to another name."
        )


def require_no_cycle(previous: Sequence[str], output_dir: str, key: str) -> None:
    """Refuse a stage that is to come after itself.

    Raises:
        UserError: its own folder is among the earlier ones or in one of them, or one of these stands there twice.
    """
    own = Path(output_dir).expanduser().resolve()
    seen: set[Path] = set()
    for name in previous:
        path = Path(name).expanduser().resolve()
        if path == own:
            raise UserError(
                f"{key}: {name} is this run's own output_dir, and a stage cannot come after itself. Choose another "
                "output_dir."
            )
        if own.is_relative_to(path):
            raise UserError(
                f"{key}: output_dir {output_dir} lies in {name}, the run of an earlier stage. Choose another one."
            )
        if path in seen:
            raise UserError(f"{key}: {name} is named twice; a stage cannot come after itself.")
        seen.add(path)


def require_consecutive(found: Sequence[Found], key: str) -> None:
    """Refuse runs that did not each start from the policy of the one before.

    Raises:
        UserError: which, and what it started from instead.
    """
    for (before, earlier), (run, manifest) in itertools.pairwise(found):
        ancestors = ancestors_of(manifest)
        parent = ancestors[-1] if ancestors else None
        if parent is not None and parent.get("run_id") == earlier.get("run_id"):
            continue
        if any(each.get("run_id") == manifest.get("run_id") for each in ancestors_of(earlier)):
            raise UserError(
                f"{key}: {before.path} came after {run.path}, and here stands before it. Name the runs in the order in "
                "which they were trained."
            )
        if parent is not None and Path(parent["run"]).resolve() == before.path.resolve():
            raise UserError(
                f"{key}: {before.path} holds another run than the one that {run.path} started from (run id "
                f"{parent.get('run_id')}): it was trained anew. Train {run.path} anew too, or name the folder that "
                "the old run was moved to with --runs-dir."
            )
        began = parent["run"] if parent else manifest.get("lineage", {}).get("policy", "another policy")
        raise UserError(
            f"{key}: {run.path} did not start from {before.path}, but from {began}. Every stage must have started from "
            "the policy of the stage before it."
        )


def require_unchanged(found: Sequence[Found], policies: Sequence[PolicySource]) -> None:
    """Refuse policies of the found runs that are others than those that the runs after them began with.

    Raises:
        UserError: which one.
    """
    for policy, (before, _), (run, manifest) in zip(policies[:-1], found[:-1], found[1:], strict=True):
        lineage = manifest["lineage"]
        began = lineage.get("merged_from") or lineage.get("fingerprint")
        if not has_fingerprint(policy, began):
            raise UserError(
                f"The policy of {before.path} has changed since {run.path} was trained from it. Restore it, or "
                f"train {run.path} anew."
            )


def resolved_lambdas(
    given: float | Mapping[str, float], dimensions: Sequence[str], place: str
) -> tuple[float, ...]:
    """lambda of every earlier dimension, in their order.

    Raises:
        UserError: one is not named, or is unknown.
    """
    if not isinstance(given, Mapping):
        return (float(given),) * len(dimensions)
    listed = ", ".join(dimensions)
    for name in given:
        if name not in dimensions:
            raise UserError(
                f"{place}.lambdas: no earlier stage is about {name!r}; the earlier dimensions are {listed}."
            )
    missing = [name for name in dimensions if name not in given]
    if missing:
        raise UserError(
            f"{place}.lambdas: nothing is said about {', '.join(missing)}; name every earlier dimension ({listed}), 0 "
            "leaves one out."
        )
    return tuple(float(given[name]) for name in dimensions)
