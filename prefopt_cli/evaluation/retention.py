"""Retention: what each stage of a sequential chain does to every dimension, the earlier ones included.

The policies are the base, which the first stage began with, and the one that each stage ended with. All are asked
about the held-out sets of the last stage's recipe.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from prefopt_cli import data
from prefopt_cli.errors import UserError
from prefopt_cli.evaluation.retention_table import BASE, HeldOut, Retention, Stage, table
from prefopt_cli.models import loading
from prefopt_cli.models.ancestry import line_of, run_dimension
from prefopt_cli.models.ancestry_checks import require_unchanged
from prefopt_cli.models.policy import PolicySource, find_policy, has_fingerprint, policy_of_run
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import ModelSettings, Recipe
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.scoring.choice import scores_depend_on_batch
from prefopt_cli.training.arguments import training_arguments
from prefopt_cli.training.batches import padding_id
from prefopt_cli.training.extent import longest_row
from prefopt_cli.training.frozen_policies import score_policy
from prefopt_cli.training.preparation import require_fit
from prefopt_cli.training.reporting import Reporter

__all__ = ["Retention", "retention"]

SCORING_FIELDS = (
    "use_cpu",
    "bf16",
    "fp16",
    "tf32",
    "per_device_train_batch_size",
    "precompute_ref_batch_size",
    "attention_layout",
)
"""Training fields that scores depend on. The others, such as an optimizer's package, need not work here."""

WITHOUT_EFFECT = ("adapter", "dimension", "method", "model.name_or_path", "model.revision", "output_dir")
"""Fields that the runs have settled: to set them over here would change nothing."""


def retention(
    run: RunFolder,
    reporter: Reporter,
    runs: RunFinder | None = None,
    *,
    overrides: Iterable[str] = (),
    stopping: Callable[[], bool] = lambda: False,
) -> Retention:
    """Ask every policy of a run's line about the held-out sets of its recipe; known scores come from the cache.

    Args:
        run: the last stage.
        reporter: told of progress.
        runs: finds earlier stages that were moved.
        overrides: fields to set over the run's recipe, `key.path=value`, such as other held-out sets.
        stopping: whether a signal has asked to stop.

    Raises:
        UserError: a run is gone, unfinished or another than it was, there is no held-out set to read, or an override
            is about what the runs have settled.
        ScoringStopped: a signal came; what was scored until then is in the cache.
    """
    overrides = tuple(overrides)
    _require_effect(overrides)
    recipe = load_recipe(run.recipe, overrides)
    _require_sets(recipe, run)
    chain, policies, revision = _policies(run, runs or RunFinder(), reporter)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": revision})})
    config = loading.load_config(policies[-1], recipe.model)
    tokenizer = loading.load_tokenizer(policies[-1], recipe.model)
    tokens = _read(recipe, tokenizer, config, reporter)
    training = {name: recipe.training[name] for name in SCORING_FIELDS if name in recipe.training}
    recipe = recipe.model_copy(update={"training": training})
    args = training_arguments(recipe, run, evaluates=False)
    deltas: dict[str, list[np.ndarray]] = {name: [] for name in tokens.eval}
    computed = 0
    for stage, source in zip(chain, policies, strict=True):
        found = score_policy(
            source,
            recipe,
            tokens.eval,
            args=args,
            padding_id=padding_id(tokenizer, config),
            reporter=reporter,
            task=f"scoring with the policy {stage.name}",
            stopping=stopping,
        )
        reporter.message(f"Log-probabilities under the policy {stage.name}: {found.found.describe()}.")
        computed += found.found.computed
        for name, logps in found.logps.items():
            deltas[name].append(-np.diff(np.array(logps)).ravel())
    prompts = {name: _prompts(rows) for name, rows in tokens.eval.items()}
    held_out = {
        name: HeldOut(len(ids), len(set(ids)), tokens.fingerprints[name]) for name, ids in prompts.items()
    }
    return Retention(tuple(chain), held_out, *table(chain, deltas, prompts), computed)


def _policies(
    run: RunFolder, runs: RunFinder, reporter: Reporter
) -> tuple[list[Stage], list[PolicySource], str | None]:
    """The base and every stage, with their policies; and the revision of the base, if it is pinned on the hub.

    Raises:
        UserError: one is not there any more, or is another than the next stage began with.
    """
    line = [(each, each.read_manifest()) for each in line_of(run, runs)]
    policies = [policy_of_run(each, reporter.progress, key="RUN") for each, _ in line]
    require_unchanged(line, policies)
    first, manifest = line[0]
    start = load_recipe(first.recipe).model
    base = _base(manifest.get("lineage", {}), start, reporter)
    if not has_fingerprint(base, manifest.get("lineage", {}).get("fingerprint")):
        raise UserError(
            f"The policy that {first.path} began with, {base.describe()}, has changed since, and all stages are "
            "measured from it. Restore it, or train the stages anew."
        )
    dimensions = [run_dimension(each, found) for each, found in line]
    stages = [
        Stage(
            f"{name} ({number})" if [BASE, *dimensions].count(name) > 1 else name,
            name,
            str(each.path),
            found.get("run_id"),
        )
        for number, (name, (each, found)) in enumerate(zip(dimensions, line, strict=True), 1)
    ]
    return [Stage(BASE), *stages], [base, *policies], start.revision


def _base(lineage: Mapping[str, Any], start: ModelSettings, reporter: Reporter) -> PolicySource:
    """What the first run began with: the folder that was written down, which other working directories have, too."""
    adapter = Path(lineage["adapter"]) if lineage.get("adapter") else None
    recorded = PolicySource(lineage.get("weights", ""), adapter, None, lineage.get("name"))
    return recorded if recorded.is_local else find_policy(start, reporter.progress)


def _require_effect(overrides: Sequence[str]) -> None:
    for each in overrides:
        key = each.partition("=")[0].strip()
        if any(key == name or key.startswith(f"{name}.") for name in WITHOUT_EFFECT):
            raise UserError(
                f"override {each!r}: the runs have settled {key}, and the table is of them as they are. Held-out sets "
                "may be set (dataset.eval), and how the policies are computed (training, model.dtype)."
            )


def _require_sets(recipe: Recipe, run: RunFolder) -> None:
    if not recipe.dataset.eval and recipe.dataset.holdout is None:
        raise UserError(
            f"The recipe of the run {run.path} has no held-out sets. Add one for each dimension: "
            "dataset.eval={helpful: FILE, harmless: FILE} after RUN, or `dataset: {eval: ...}` in the next recipe."
        )


def _read(recipe: Recipe, tokenizer: Any, config: Any, reporter: Reporter) -> data.TokenizedData:
    """The held-out sets as pairs, in tokens.

    Raises:
        UserError: they cannot be read, or do not fit the model.
    """
    settings = recipe.dataset
    if settings.holdout is None:  # the training data need not be there any more
        settings = settings.model_copy(update={"train": next(iter(settings.eval.values()))})
    tokens = data.tokenize(
        data.load(settings, progress=reporter.progress),
        tokenizer,
        settings,
        progress=reporter.progress,
        lists="adjacent_pairs" if settings.lists == "adjacent_pairs" else "all_pairs",
        report=reporter.message,
    )
    require_fit(config, tokens)
    if scores_depend_on_batch(config, max(map(longest_row, tokens.eval.values()))):
        raise UserError(
            "With this model's rotary embeddings a score depends on the longest sequence of its batch, so that "
            "policies cannot be compared. Set dataset.max_length to original_max_position_embeddings of its "
            "config.json or less."
        )
    return tokens


def _prompts(rows: Dataset) -> list[int]:
    """For every row the number of its prompt, the same where the prompts are."""
    numbers: dict[tuple[int, ...], int] = {}
    return [numbers.setdefault(tuple(ids), len(numbers)) for ids in rows["prompt_ids"]]
