"""What a run's policy went through, as its manifest tells, and what of it is still there. No weights are loaded."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.models.ancestry import as_ancestor
from prefopt_cli.models.ancestry_checks import ancestors_of
from prefopt_cli.models.policy import (
    MERGE_RECORD,
    PolicySource,
    has_fingerprint,
    merge_record,
    policy_of_run,
    recorded_quantization,
)
from prefopt_cli.recipe import load_recipe
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder

THERE, GONE = "there", "gone"


@dataclass(frozen=True)
class Step:
    """A run that the policy went through."""

    dimension: str
    run: str
    """Its folder, as it was written down."""
    run_id: str | None
    method: dict[str, Any]
    """Settings, and what was found out about them."""
    data: dict[str, str]
    """sha256 of the tokens of every set."""
    adapter: str | None
    """The folder of the adapter that it trained; None where it trained all weights."""
    merged_start: str | None
    """The merged model that it began with; None where it began with the policy before it as that was."""
    state: str
    """Whether it is still there, and still the same; of the last one, how its training stands."""

    @property
    def alignment(self) -> Mapping[str, Any]:
        """Settings of the alignment loss, which may stand inside another method's."""
        found: Mapping[str, Any] = self.method.get("align") or self.method
        return found

    @property
    def lambdas(self) -> dict[str, float]:
        """lambda of every earlier dimension, where the method has any."""
        return {each["dimension"]: each["lambda"] for each in self.method.get("previous_stages", [])}


@dataclass(frozen=True)
class Lineage:
    """The line of a run or of a merged model."""

    base: str
    """The policy that the first run began with."""
    base_state: str | None
    """Whether it is still there; None where that is not known, as of a model on the hub."""
    adapters: list[str]
    """Folders of the adapters that the line went through, the oldest first."""
    reference: str | None
    """Of the last run, in words."""
    steps: list[Step]
    """The oldest first."""
    merged: str | None = None
    """The folder that the last run's policy was merged to."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def find_lineage(place: str, runs: RunFinder) -> Lineage:
    """The line of the run, or of the merged model, in a folder.

    Args:
        place: the folder.
        runs: finds runs that were moved.

    Raises:
        UserError: it holds neither, or cannot be read.
    """
    if runs.folder is not None and not runs.folder.is_dir():
        raise UserError(f"--runs-dir: there is no folder {runs.folder}.")
    path = Path(place).expanduser()
    if RunFolder(path).is_run() or not path.is_dir():
        return _of_run(runs.find(place, key="RUN"), runs)
    record = merge_record(path)
    if record is None:
        kind = "a model folder, but no run" if (path / "config.json").is_file() else "no run folder"
        raise UserError(
            f"RUN: {place} is {kind} (it has neither manifest.json nor {MERGE_RECORD}), so nothing is known of what it "
            "went through. Name a folder that `prefopt train` or `prefopt merge` made."
        )
    ancestors, adapters = record["ancestors"], record["adapters"]
    base = _base(record["base"], adapters, ancestors)
    return Lineage(*base, adapters, None, _earlier(ancestors, adapters, runs), place)


def _of_run(run: RunFolder, runs: RunFinder) -> Lineage:
    run = RunFolder(run.path.absolute())  # as the others were written down
    manifest = run.read_manifest()
    lineage = manifest.get("lineage", {})
    ancestors, adapters = ancestors_of(manifest), [*lineage.get("adapters", [])]
    own = as_ancestor(run, manifest)
    words = lineage.get("base") or lineage.get("origin") or lineage.get("weights", "unknown")
    base = _base(words, adapters, [*ancestors, own])
    steps = _earlier(ancestors, adapters, runs)
    if _trains_adapter(run):
        adapters.append(str(run.model))
    steps.append(_step(own, adapters, manifest.get("status", "unknown"), own["dimension"]))
    return Lineage(*base, adapters, lineage.get("reference"), steps)


def _trains_adapter(run: RunFolder) -> bool:
    if run.model.is_dir():
        return (run.model / "adapter_config.json").is_file()
    with suppress(UserError):  # unfinished: only the recipe tells
        return load_recipe(run.recipe).adapter != "none"
    return False


def _earlier(ancestors: list[dict[str, Any]], adapters: list[str], runs: RunFinder) -> list[Step]:
    return [
        _step(each, adapters, _state(each, runs), each.get("dimension") or Path(each["run"]).name)
        for each in ancestors
    ]


def _step(entry: Mapping[str, Any], adapters: list[str], state: str, dimension: str) -> Step:
    model = str(RunFolder(Path(entry["run"])).model)
    return Step(
        dimension=dimension,
        run=entry["run"],
        run_id=entry.get("run_id"),
        method=entry.get("method") or {},
        data=entry.get("data") or {},
        adapter=model if model in adapters else None,
        merged_start=entry.get("merged_start"),
        state=state,
    )


def _state(entry: Mapping[str, Any], runs: RunFinder) -> str:
    """Whether an ancestor is still there, and still the run with the policy that the next one began with."""
    place = entry["run"]
    try:
        found = runs.find(place, entry.get("run_id"))
    except UserError:
        if RunFolder(Path(place)).is_run():
            return "another run lies there now"
        return GONE if runs.folder is None else f"{GONE}; not found, or found twice, below {runs.folder}"
    where = f"moved to {runs.moved[place]}" if place in runs.moved else THERE
    try:
        source = policy_of_run(found)
    except UserError:  # unfinished again, or without the weights below its adapter
        return f"{where}, but without its policy"
    ended_with = entry.get("ended_with")  # older manifests do not tell
    return f"{where}, but changed" if ended_with and not has_fingerprint(source, ended_with) else where


def _base(words: str, adapters: list[str], entries: list[dict[str, Any]]) -> tuple[str, str | None]:
    """The base in words, and whether it is still there."""
    trained = {str(RunFolder(Path(each["run"])).model) for each in entries}
    adapter = Path(adapters[0]) if adapters and adapters[0] not in trained else None
    source = PolicySource(words, adapter, quantization=recorded_quantization(entries[0]) if entries else None)
    began = entries[0].get("started_from") if entries else None
    if not source.is_local:
        return source.describe(), GONE if Path(words).is_absolute() else None
    if adapter is not None and not adapter.is_dir():
        return source.describe(), GONE
    return source.describe(), THERE if began is None or has_fingerprint(
        source, began
    ) else f"{THERE}, but changed"
