"""Run folders made by hand: a manifest as training writes it, and weights of a few bytes."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt_cli.models.policy import MERGE_RECORD, PolicySource, find_policy, fingerprint, merge_record
from prefopt_cli.recipe.schema import ModelSettings, Recipe
from prefopt_cli.runs.folder import RunFolder

GPO = {"name": "gpo", "loss": "logistic", "beta": 0.1, "length_normalize": False}


def write_model(folder: Path, content: str) -> Path:
    """A model folder whose weights are `content`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text(content)
    return folder


def sequential(
    previous: Mapping[str, RunFolder], lambdas: Mapping[str, float], **changes: Any
) -> dict[str, Any]:
    """The method of a sequential stage's manifest, with the stages that it came after by their dimensions."""
    stages = [
        {"dimension": name, "run": str(run.path), "run_id": run_id(run), "beta": 0.1, "lambda": lambdas[name]}
        for name, run in previous.items()
    ]
    return {
        **GPO,
        "name": "sequential",
        "adapter_per_stage": "continue",
        **changes,
        "previous_stages": stages,
    }


def run_id(run: RunFolder) -> str:
    """The id that its manifest gives it."""
    found: str = run.read_manifest()["run_id"]
    return found


@dataclass(frozen=True)
class Place:
    """A folder with the base model in `base/` and runs in `runs/`."""

    path: Path

    @property
    def base(self) -> Path:
        return self.path / "base"

    def run(
        self,
        name: str,
        after: RunFolder | Path | None = None,
        *,
        method: Mapping[str, Any] = GPO,
        adapter: bool = False,
        run_id: str | None = None,
        **changes: Any,
    ) -> RunFolder:
        """Make the run in `runs/NAME`, which started from the base, a run or a merged model.

        Args:
            name: of its folder and, unless `changes` say otherwise, dimension.
            after: what it started from; None: the base.
            method: as its manifest has it.
            adapter: whether it trained one; else all weights.
            run_id: its id; None: made from the name.
            **changes: entries of the manifest.
        """
        started_from = after.path if isinstance(after, RunFolder) else after or self.base
        run = RunFolder(self.path / "runs" / name)
        own_id = run_id or f"id-{name}"
        manifest = {
            "run_id": own_id,
            "status": "finished",
            "dimension": name,
            "method": dict(method),
            "data": {"train": "0" * 64},
            "lineage": self._lineage(started_from),
        }
        run.create({key: value for key, value in (manifest | changes).items() if value is not None}, "")
        if adapter:
            run.model.mkdir()
            config = {"base_model_name_or_path": manifest["lineage"]["weights"]}
            (run.model / "adapter_config.json").write_text(json.dumps(config))
            (run.model / "adapter_model.safetensors").write_text(f"adapter of {own_id}")
        else:
            write_model(run.model, f"weights of {own_id}")
        return run

    def merged(self, name: str, run: RunFolder) -> Path:
        """The run's policy in a folder of its own, with the record that `prefopt merge` leaves there."""
        lineage = run.read_manifest()["lineage"]
        record = {
            "format": 1,
            "run": str(run.path),
            "run_id": run_id(run),
            "dimension": run.read_manifest()["dimension"],
            "fingerprint": policy_fingerprint(run.path),
            "base": lineage["base"],
            "adapters": lineage["adapters"],
            "ancestors": [*lineage["ancestors"], _ancestor(run)],
        }
        folder = write_model(self.path / name, f"merged from {run_id(run)}")
        (folder / MERGE_RECORD).write_text(json.dumps(record))
        return folder

    def recipe(
        self,
        previous: Sequence[RunFolder | str],
        lambdas: Any = 0.5,
        *,
        start: object = None,
        output: str = "runs/next",
        beside: bool = False,
    ) -> Recipe:
        """A stage after `previous`, which starts from the last of them; `beside` the loss of self_supervised."""
        names = [each if isinstance(each, str) else str(each.path) for each in previous]
        method = {"name": "sequential", "previous": names, "lambdas": lambdas}
        if beside:
            method = {"name": "self_supervised", "align": method}
        return Recipe.model_validate(
            {
                "model": {"name_or_path": str(start or names[-1])},
                "dataset": {"train": "pairs.jsonl", "max_length": 64},
                "method": method,
                "output_dir": str(self.path / output),
            }
        )

    def _lineage(self, started_from: Path) -> dict[str, Any]:
        source = find_policy(ModelSettings(name_or_path=str(started_from)))
        own = fingerprint(source, None)
        lineage: dict[str, Any] = {
            "policy": source.describe(),
            "name": None,
            "weights": source.weights,
            "adapter": str(source.adapter) if source.adapter else None,
            "quantization": source.quantization.model_dump() if source.quantization else None,
            "kept_modules": None,
            "fingerprint": own,
            "reference": f"{source.describe()}, as it is at the start",
            "weights_fingerprint": fingerprint(PolicySource(source.weights), None),
            "origin": None,
            "base": source.weights,
            "adapters": [],
            "ancestors": [],
            "merged_from": None,
        }
        if source.run is not None:
            parent = RunFolder(source.run)
            before = parent.read_manifest()["lineage"]
            adapters = [*before["adapters"], *([str(source.adapter)] if source.adapter else [])]
            ancestors = [*before["ancestors"], _ancestor(parent)]
            lineage |= {"base": before["base"], "adapters": adapters, "ancestors": ancestors}
        elif (record := merge_record(source.weights)) is not None:
            lineage |= {name: record[name] for name in ("base", "adapters", "ancestors")}
            lineage |= {"origin": record["base"], "merged_from": record["fingerprint"]}
        return lineage


def policy_fingerprint(place: Path) -> str:
    """Of the policy that a recipe would start from there."""
    return fingerprint(find_policy(ModelSettings(name_or_path=str(place))), None)


def _ancestor(run: RunFolder) -> dict[str, Any]:
    manifest = run.read_manifest()
    return {
        "run": str(run.path),
        **{name: manifest.get(name) for name in ("run_id", "dimension", "method", "data")},
        "started_from": manifest["lineage"]["fingerprint"],
        "merged_start": manifest["lineage"]["weights"] if manifest["lineage"]["merged_from"] else None,
        "quantization": manifest["lineage"]["quantization"],
        "ended_with": policy_fingerprint(run.path),
    }
