"""The stages that a sequential run comes after: found, and seen to follow one another. Nothing here loads weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.models.ancestry_checks import (
    WITH_REWARD,
    Found,
    ancestors_of,
    complete_manifest,
    require_consecutive,
    require_new_dimension,
    require_no_cycle,
    require_unchanged,
    resolved_lambdas,
)
from prefopt_cli.models.policy import (
    PolicySource,
    find_policy,
    has_fingerprint,
    merge_record,
    policy_of_run,
    recorded_quantization,
)
from prefopt_cli.recipe.schema import Recipe, SequentialSettings, dimension_of, place_of_alignment
from prefopt_cli.recipe.schemes import Progress, find_scheme
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder


@dataclass(frozen=True)
class Stage:
    """An earlier stage, with what its implicit reward is made of."""

    dimension: str
    run: RunFolder
    run_id: str
    source: PolicySource
    """The policy that it ended with."""
    beta: float
    lambdas: tuple[float, ...]
    """Of the stages before it, the first one first; 0 where it knew nothing of one."""
    length_normalize: bool


@dataclass(frozen=True)
class Ancestry:
    """What came before a sequential stage."""

    base: PolicySource
    """pi_0, the policy that the first stage began with."""
    stages: tuple[Stage, ...]
    lambdas: tuple[float, ...]
    """Of this stage, for those before it."""
    start: PolicySource
    """The policy that this stage begins with, which is its reference: the last stage's, or what was merged from it."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Of the earlier stages."""
        return tuple(stage.dimension for stage in self.stages)

    @property
    def earlier(self) -> tuple[tuple[str, PolicySource], ...]:
        """pi_0 ... pi_{n-2} by name: frozen policies that are needed besides the reference."""
        return (("base", self.base), *((stage.dimension, stage.source) for stage in self.stages[:-1]))

    def describe(self) -> str:
        """The stages and their weights in one line."""
        weights = zip(self.dimensions, self.lambdas, strict=True)
        told = ", ".join(f"{name} (lambda {value:g})" for name, value in weights)
        return f"after {told}" + (
            "" if any(self.lambdas) else "; every lambda is 0: naive sequential training"
        )

    def figures(self) -> list[dict[str, Any]]:
        """The stages for the manifest."""
        return [
            {
                "dimension": stage.dimension,
                "run": str(stage.run.path.absolute()),
                "run_id": stage.run_id,
                "beta": stage.beta,
                "lambda": value,
            }
            for stage, value in zip(self.stages, self.lambdas, strict=True)
        ]


def find_ancestry(recipe: Recipe, runs: RunFinder, progress: Progress | None = None) -> Ancestry | None:
    """The stages that the recipe's method comes after; None where it knows of none.

    Args:
        recipe: of the stage that is to be trained.
        runs: finds run folders, also moved ones.
        progress: told of a scheme's work on a model that it makes at its first use.

    Raises:
        UserError: a run is missing, unfinished or another than it was, its method has no implicit reward, the runs do
            not follow one another, lambdas do not fit them, or the recipe starts from another policy.
    """
    settings = recipe.method.alignment
    if not isinstance(settings, SequentialSettings):
        return None
    place = place_of_alignment(recipe.method)
    key = f"{place}.previous"
    require_no_cycle(settings.previous, recipe.output_dir, key)
    found = _find_runs(settings.previous, runs, key)
    require_consecutive(found, key)
    stages: list[Stage] = []
    for run, manifest in found:
        stages.append(_stage(run, manifest, stages, progress, key))
    require_unchanged(found, [stage.source for stage in stages])
    lambdas = resolved_lambdas(settings.lambdas, [stage.dimension for stage in stages], place)
    require_new_dimension(dimension_of(recipe), [stage.dimension for stage in stages])
    start = _start(recipe, stages[-1], settings.previous[-1], progress)
    base = start_of(*found[0], runs=runs, progress=progress)
    return Ancestry(base, tuple(stages), lambdas, start)


def run_dimension(run: RunFolder, manifest: Mapping[str, Any]) -> str:
    """What a run's preferences were about."""
    return str(manifest.get("dimension") or run.path.name)


def as_ancestor(run: RunFolder, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a later run writes down of this one, `ended_with` aside: its policy's fingerprint."""
    lineage = manifest.get("lineage", {})
    return {
        "run": str(run.path.absolute()),
        "run_id": manifest.get("run_id"),
        "dimension": run_dimension(run, manifest),
        "method": manifest.get("method"),
        "data": manifest.get("data"),
        "started_from": lineage.get("fingerprint"),
        "merged_start": lineage.get("weights") if lineage.get("merged_from") else None,
        "quantization": lineage.get("quantization"),
    }


def line_of(run: RunFolder, runs: RunFinder) -> list[RunFolder]:
    """The run with those that its policy went through, the oldest first.

    Raises:
        UserError: one of them is not there any more.
    """
    ancestors = run.read_manifest().get("lineage", {}).get("ancestors", [])
    return [
        *(runs.find(each["run"], each.get("run_id"), f"an ancestor of {run.path}") for each in ancestors),
        run,
    ]


def start_of(
    run: RunFolder, manifest: Mapping[str, Any], *, runs: RunFinder, progress: Progress | None
) -> PolicySource:
    """The policy that a run began with, which is its reference.

    Raises:
        UserError: it is not there any more, or has changed.
    """
    lineage = manifest["lineage"]
    name, adapter = lineage.get("name"), lineage.get("adapter")
    recorded = PolicySource(lineage["weights"], Path(adapter) if adapter else None, None, name)
    quantization = recorded_quantization(lineage)
    ancestors = ancestors_of(manifest)
    if ancestors and not lineage.get("merged_from"):  # another run's policy; its folder may have been moved
        parent = runs.find(ancestors[-1]["run"], ancestors[-1].get("run_id"), f"the start of {run.path}")
        recorded = policy_of_run(parent, progress, key=f"the start of {run.path}")
    elif name and not recorded.is_local and (named := find_scheme(name, "model")):
        recorded = replace(recorded, weights=str(named.scheme.model_folder(named.name, progress)))
    recorded = replace(recorded, quantization=quantization)
    if not has_fingerprint(recorded, lineage["fingerprint"]):
        raise UserError(
            f"The policy that {run.path} began with, {recorded.describe()}, is not there any more or has changed, and "
            "what the run learnt is measured from it. Restore it, or train the run anew."
        )
    return recorded


def _find_runs(previous: Sequence[str], runs: RunFinder, key: str) -> list[Found]:
    """The runs with their manifests. A run that is where it is named is the one that is meant."""
    last = runs.find(previous[-1], key=key)
    line = ancestors_of(last.read_manifest())
    earlier = len(previous) - 1
    line = [*[{}] * (earlier - len(line)), *line[max(len(line) - earlier, 0) :]]
    found = []
    for name, ancestor in zip(previous[:-1], line, strict=True):
        run, run_id = RunFolder(Path(name).expanduser()), ancestor.get("run_id")
        if run.is_run() and not (runs.folder and _lay_in(ancestor, run)):
            found.append(run)  # whether it is the right one is for `require_consecutive` to say
        else:  # it is gone, or another one lies there now
            found.append(runs.find(name, run_id, key))
    return [(run, complete_manifest(run, key)) for run in (*found, last)]


def _lay_in(ancestor: Mapping[str, Any], run: RunFolder) -> bool:
    return bool(ancestor) and Path(ancestor["run"]).resolve() == run.path.resolve()


def _stage(
    run: RunFolder, manifest: dict[str, Any], before: Sequence[Stage], progress: Progress | None, key: str
) -> Stage:
    method = manifest.get("method", {})
    settings = method.get("align") or method
    if settings.get("name") not in WITH_REWARD:
        raise UserError(
            f"{key}: the run {run.path} was trained by method {settings.get('name')}, which has no implicit reward "
            "beta log(pi / pi_ref). Earlier stages are trained by gpo or sequential, alone or under self_supervised."
        )
    known = {each["run_id"]: each["lambda"] for each in method.get("previous_stages", [])}
    missing = [
        each["dimension"]
        for each in method.get("previous_stages", [])
        if each["run_id"] not in [stage.run_id for stage in before] and each["lambda"]
    ]
    if missing:
        raise UserError(
            f"{key}: {run.path} was itself trained after {', '.join(missing)}, whose reward is a part of its own. Name "
            f"those runs before it: {', '.join(each['run'] for each in method['previous_stages'])}."
        )
    dimension = run_dimension(run, manifest)
    if dimension in [stage.dimension for stage in before]:
        raise UserError(
            f"{key}: two of the runs are about the dimension {dimension}, which lambdas could not tell apart. Set "
            "`dimension` in the recipe of one of them."
        )
    return Stage(
        dimension=dimension,
        run=run,
        run_id=str(manifest.get("run_id")),
        source=policy_of_run(run, progress, key=key),
        beta=float(settings["beta"]),
        lambdas=tuple(float(known.get(stage.run_id, 0.0)) for stage in before),
        length_normalize=bool(settings["length_normalize"]),
    )


def _start(recipe: Recipe, last: Stage, name: str, progress: Progress | None) -> PolicySource:
    """What the recipe starts from, which must be the policy of the last stage: its run, or what was merged from it."""
    wanted = recipe.model.name_or_path
    if Path(wanted).expanduser().resolve() == Path(name).expanduser().resolve():
        return last.source  # which may have moved
    source = find_policy(recipe.model, progress)
    record = merge_record(source.weights) if source.adapter is None else None
    same = source.run is not None and source.run.resolve() == last.run.path.resolve()
    if same or (record is not None and has_fingerprint(last.source, record.get("fingerprint"))):
        return source
    raise UserError(
        f"model.name_or_path: {wanted} is not the policy that the last of the earlier stages ended with. Write "
        f"{name}, which is also the reference."
    )
