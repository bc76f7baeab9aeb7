"""Retention: what each stage of a sequential chain does to every dimension, the earlier ones included.

The policies are the base, which the first stage began with, and the one that each stage ended with. All are asked
about the held-out sets of the last stage's recipe.
"""

from collections.abc import Callable, Iterable

import numpy as np

from prefopt_cli.data.tokens import Lists
from prefopt_cli.errors import UserError
from prefopt_cli.evaluation.held_out import prompt_numbers, read_sets
from prefopt_cli.evaluation.retention_table import BASE, HeldOut, Retention, Stage, table
from prefopt_cli.evaluation.targets import require_effect, scoring_fields
from prefopt_cli.models import loading
from prefopt_cli.models.ancestry import line_of, run_dimension, start_of
from prefopt_cli.models.ancestry_checks import require_unchanged
from prefopt_cli.models.policy import PolicySource, policy_of_run
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.arguments import training_arguments
from prefopt_cli.training.batches import padding_id
from prefopt_cli.training.frozen_policies import score_policy
from prefopt_cli.training.reporting import Reporter

__all__ = ["Retention", "retention"]


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
    require_effect(overrides)
    recipe = load_recipe(run.recipe, overrides)
    _require_sets(recipe, run)
    chain, policies, revision = _policies(run, runs or RunFinder(), reporter)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": revision})})
    config = loading.load_config(policies[-1], recipe.model)
    tokenizer = loading.load_tokenizer(policies[-1], recipe.model)
    lists: Lists = "adjacent_pairs" if recipe.dataset.lists == "adjacent_pairs" else "all_pairs"
    _, tokens = read_sets(recipe.dataset, tokenizer, config, reporter, lists=lists)
    recipe = recipe.model_copy(update={"training": scoring_fields(recipe)})
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
    prompts = {name: prompt_numbers(rows).tolist() for name, rows in tokens.eval.items()}
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
    base = start_of(first, manifest, runs=runs, progress=reporter.progress)
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
    return [Stage(BASE), *stages], [base, *policies], load_recipe(first.recipe).model.revision


def _require_sets(recipe: Recipe, run: RunFolder) -> None:
    if not recipe.dataset.eval and recipe.dataset.holdout is None:
        raise UserError(
            f"The recipe of the run {run.path} has no held-out sets. Add one for each dimension: "
            "dataset.eval={helpful: FILE, harmless: FILE} after RUN, or `dataset: {eval: ...}` in the next recipe."
        )
