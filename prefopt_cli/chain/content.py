"""What a stage's weights come from, and how a run that is there differs from it. Names of folders do not count."""

from collections.abc import Mapping, Sequence
from typing import Any

from trl import DPOConfig

from prefopt_cli.chain.settings import ChainStage
from prefopt_cli.models.ancestry import run_dimension
from prefopt_cli.models.ancestry_checks import ancestors_of
from prefopt_cli.models.policy import PolicySource, has_fingerprint, policy_of_run
from prefopt_cli.recipe import diff_recipes, load_recipe
from prefopt_cli.recipe.problems import shown
from prefopt_cli.recipe.schema import Alignment, GPOSettings, Recipe, SequentialSettings
from prefopt_cli.recipe.schemes import Progress
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.preparation import training_field
from prefopt_cli.training.resume import MAY_CHANGE

Manifest = Mapping[str, Any]

OF_ITS_PLACE = ("name", "previous", "lambdas", "adapter_per_stage")
"""Settings of an alignment loss that say whether earlier stages are known, and which."""

EVALUATION = {
    f"training.{name}"
    for name in (
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "save_strategy",
        "save_steps",
        "save_total_limit",
    )
}
"""When a run evaluates and saves, which touches the policy only where it ends with its best checkpoint."""


def recipe_changes(
    run: RunFolder, manifest: Manifest, stage: ChainStage, earlier: Sequence[str]
) -> list[str]:
    """How the recipe that a run was trained by differs from the stage's, in words.

    Places and the section `dataset` are left out: fingerprints say what lies in them.

    Args:
        run: of this stage, as far as its place says.
        manifest: the run's.
        stage: as the chain has it now.
        earlier: the dimensions before it.

    Raises:
        UserError: the run's recipe cannot be read.
    """
    changes = []
    dimension = run_dimension(run, manifest)
    if dimension != stage.dimension:
        changes.append(f"it is about {dimension}")
    own, old = (_comparable(each, stage.recipe, earlier) for each in (stage.recipe, load_recipe(run.recipe)))
    now, then = own.model_dump(), old.model_dump()
    may_change = MAY_CHANGE - EVALUATION if ends_with_the_best(own) else MAY_CHANGE | EVALUATION
    another_place = own.method.alignment.name != old.method.alignment.name
    if another_place:
        changes.append(f"it was {'not ' if not earlier else ''}the first stage")
    another_kind = (own.method is own.method.alignment) != (old.method is old.method.alignment)
    if another_kind:
        changes.append(f"method.name is {shown(own.method.name)} and was {shown(old.method.name)}")
    for key in diff_recipes(own, old):
        section, _, rest = key.partition(".")
        setting = rest.removeprefix("align.").partition(".")[0]
        if section == "method" and (another_kind or (another_place and setting in OF_ITS_PLACE)):
            continue
        if key not in may_change and section != "launch" and not _only_written_out(section, rest, own, old):
            value, old_value = _at(now, key), _at(then, key)
            changes.append(
                f"{key} differs" if value == old_value else f"{key} is {value} and was {old_value}"
            )
    return changes


def ends_with_the_best(recipe: Recipe) -> bool:
    """Whether the held-out sets decide which checkpoint becomes the policy."""
    return bool(recipe.training.get("load_best_model_at_end"))


def _only_written_out(section: str, name: str, own: Recipe, old: Recipe) -> bool:
    """Whether a training field has its default in both recipes, though one of them leaves it out."""
    if section != "training" or name not in DPOConfig.__dataclass_fields__:
        return False
    return bool(training_field(own.training, name) == training_field(old.training, name))


def _at(data: Any, key: str) -> str:
    """The value at a dotted key, as a reader would write it."""
    if isinstance(data, Mapping) and key in data:
        return shown(data[key])
    head, _, rest = key.partition(".")
    if isinstance(data, Mapping) and head in data:
        return _at(data[head], rest)
    if isinstance(data, list) and head.isdigit():
        return _at(data[int(head)], rest) if rest else shown(data[int(head)])
    return "not set"


def data_changes(
    manifest: Manifest, fingerprints: Mapping[str, str], stage: ChainStage, *, finished: bool
) -> list[str]:
    """Whether the tokens that a run was trained on are others now.

    Held-out sets count where they choose the policy, and for a run that goes on, which keeps to its own.
    """
    known = manifest.get("data", {})
    trained_only = finished and not ends_with_the_best(stage.recipe)
    names = ["train"] if trained_only else sorted({*known, *fingerprints})
    changed = [name for name in names if known.get(name) != fingerprints.get(name)]
    return [f"the data of {', '.join(changed)} has changed"] if changed else []


def function_changes(manifest: Manifest, figures: Mapping[str, Any], stage: ChainStage) -> list[str]:
    """Whether a user's own f is another now."""
    changed = manifest.get("method", {}).get("f") != figures.get("f")
    return (
        [f"the function {getattr(stage.recipe.method.alignment, 'loss', 'f')} has changed"] if changed else []
    )


def start_changes(manifest: Manifest, start: PolicySource, before: tuple[str, RunFolder] | None) -> list[str]:
    """Whether a run began with another policy than the stage's.

    Args:
        manifest: of the run.
        start: the policy that the stage begins with.
        before: dimension and run of the stage before; None in the first one.
    """
    lineage = manifest.get("lineage", {})
    if before is None:
        if has_fingerprint(start, lineage.get("fingerprint")):
            return []
        return [f"it was trained from another policy than {start.describe()}"]
    dimension, run = before
    parent = (ancestors_of(manifest) or [{}])[-1]
    began = lineage.get("merged_from") or lineage.get("fingerprint")
    if parent.get("run_id") != run.read_manifest().get("run_id"):
        return [f"it was trained from another policy than that of stage {dimension} ({run.path})"]
    if not has_fingerprint(start, began):
        return [f"the policy of stage {dimension} ({run.path}) has changed since it was trained from it"]
    return []


def policy_changes(run: RunFolder, manifest: Manifest, progress: Progress) -> list[str]:
    """Whether a finished run's policy is another than the one that it exported."""
    recorded = manifest.get("policy")
    if recorded is None or has_fingerprint(policy_of_run(run, progress), recorded):
        return []
    return [f"its policy ({run.model}) has changed since it was trained"]


def with_alignment(recipe: Recipe, settings: Alignment) -> Recipe:
    """The recipe with another alignment loss."""
    method = recipe.method
    changed = settings if method is method.alignment else method.model_copy(update={"align": settings})
    return recipe.model_copy(update={"method": changed})


def with_places(recipe: Recipe, output_dir: str, previous: Sequence[str]) -> Recipe:
    """The recipe of a stage whose run, and those of the stages before it, lie in these folders."""
    changed = recipe.model_copy(update={"output_dir": output_dir})
    settings = recipe.method.alignment
    if not previous or not isinstance(settings, SequentialSettings):
        return changed
    model = recipe.model.model_copy(update={"name_or_path": previous[-1]})
    changed = changed.model_copy(update={"model": model})
    return with_alignment(changed, settings.model_copy(update={"previous": list(previous)}))


def as_first_stage(recipe: Recipe, first: Recipe, chat_template: str | None) -> Recipe:
    """A recipe that reads the same data without asking for earlier stages, which may not be trained yet.

    Args:
        recipe: of any stage.
        first: of the chain's first stage, whose start, quantisation and adapter it takes over.
        chat_template: what the stage's tokenizer will have from the stages before it.
    """
    settings = recipe.method.alignment
    if isinstance(settings, SequentialSettings):
        shared = {name: getattr(settings, name) for name in GPOSettings.model_fields if name != "name"}
        recipe = with_alignment(recipe, GPOSettings(name="gpo", **shared))
    template = recipe.model.chat_template or chat_template
    model = recipe.model.model_copy(
        update={"name_or_path": first.model.name_or_path, "chat_template": template}
    )
    start = {"model": model, "adapter": first.adapter, "quantization": first.quantization}
    return recipe.model_copy(update=start)


def _comparable(recipe: Recipe, places: Recipe, earlier: Sequence[str]) -> Recipe:
    """The recipe with all that does not count as `places` has it, and one lambda for each earlier dimension."""
    settings, other = recipe.method.alignment, places.method.alignment
    if isinstance(settings, SequentialSettings):
        lambdas = settings.lambdas
        changes: dict[str, Any] = {
            "lambdas": lambdas if isinstance(lambdas, Mapping) else dict.fromkeys(earlier, float(lambdas)),
        }
        if isinstance(other, SequentialSettings):
            changes["previous"] = other.previous
        recipe = with_alignment(recipe, settings.model_copy(update=changes))
    model = recipe.model.model_copy(update={"name_or_path": places.model.name_or_path})
    same = {name: getattr(places, name) for name in ("dataset", "output_dir", "dimension")}
    return recipe.model_copy(update={"model": model, **same})
