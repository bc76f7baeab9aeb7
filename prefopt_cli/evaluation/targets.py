"""What is evaluated: a run or a model, how it is loaded, what it is compared with, and what its reward is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefopt_cli.errors import UserError
from prefopt_cli.models import loading
from prefopt_cli.models.ancestry import start_of
from prefopt_cli.models.policy import PolicySource, find_policy, policy_of_run
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.loader import make_recipe
from prefopt_cli.recipe.schema import GPOSettings, ModelSettings, Recipe, SoftSettings
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.reporting import Reporter

NO_REFERENCE = "none"

BETA = 0.1
"""Scale of the implicit reward of a model that no run tells the beta of; TRL's default."""

SETTLED = (
    "adapter",
    "dimension",
    "method",
    "model.name_or_path",
    "model.revision",
    "output_dir",
    "quantization",
)
"""Fields that a finished run has settled: to set them over would change nothing."""

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


@dataclass(frozen=True)
class Reward:
    """The implicit reward of a response."""

    scale: float
    """beta of gpo and sequential, alpha of soft."""
    scale_name: str
    relative: bool
    """Whether it is a log-ratio to the reference; that of soft preference optimization is not."""
    per_token: bool
    is_log_odds: bool = True
    """Whether the method takes sigma(margin) for the probability that chosen is preferred: losses other than the
    logistic one do not, and a sequential stage adds the earlier rewards first."""

    @property
    def is_log_ratio(self) -> bool:
        """Whether it orders responses as log pi - log pi_ref does."""
        return self.relative and not self.per_token

    @property
    def formula(self) -> str:
        """In words and signs."""
        inner = "(logp - reference's logp)" if self.relative else "logp"
        return f"{self.scale_name} * {inner}{' / tokens' if self.per_token else ''}"

    def of(self, logps: np.ndarray, reference: np.ndarray | None, tokens: np.ndarray) -> np.ndarray:
        """(K,) rewards from log-probabilities in nats (K,) and lengths in tokens (K,).

        Raises:
            ValueError: the reward is relative, and there is no reference.
        """
        if self.relative:
            if reference is None:
                raise ValueError("a relative reward needs a reference")
            logps = logps - reference
        rewards: np.ndarray = self.scale * (logps / tokens if self.per_token else logps)
        return rewards

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "formula": self.formula,
            "scale": self.scale,
            "scale_name": self.scale_name,
            "per_token": self.per_token,
        }


@dataclass(frozen=True)
class Target:
    """A policy to evaluate."""

    name: str
    """As the user wrote it."""
    source: PolicySource
    recipe: Recipe
    """Of the run; of a model one that only says how it is loaded and what data there is."""
    run: RunFolder | None
    run_id: str | None
    reference: PolicySource | None
    reward: Reward | None
    """None where there is none: a model without a reference."""

    def to_dict(self) -> dict[str, Any]:
        """The policy for JSON."""
        return {
            "name": self.name,
            "description": self.source.describe(),
            "run": str(self.run.path) if self.run else None,
            "run_id": self.run_id,
            "method": self.recipe.method.model_dump() if self.run else None,
        }


def find_target(
    name: str,
    reporter: Reporter,
    runs: RunFinder,
    *,
    reference: str | None = None,
    beta: float | None = None,
    overrides: Sequence[str] = (),
    key: str = "RUN_OR_MODEL",
) -> Target:
    """A run folder's policy with the policy that it began with, or a model with the reference that is asked for.

    Args:
        name: run folder, folder of a model or an adapter, hub id, or a scheme's name.
        reporter: told of long work.
        runs: finds runs that were moved.
        reference: another policy to compare with, in place of a run's own; `NO_REFERENCE` for none.
        beta: scale of the reward, in place of the run's own beta or alpha.
        overrides: `key.path=value` over the run's recipe.
        key: what names the policy, for messages.

    Raises:
        UserError: there is no such policy, or no such reference.
    """
    run = _find_run(name, runs, key)
    require_effect(overrides, trained=run is not None)
    if run is None:
        recipe = _model_recipe(name, overrides)
        source = find_policy(recipe.model, reporter.progress, key=key)
        own, run_id = None, None
    else:
        recipe = load_recipe(run.recipe, overrides)
        source = policy_of_run(run, reporter.progress, key=key)
        run_id = run.read_manifest().get("run_id")
        own = None if reference else _start(run, runs, reporter)
    if reference and reference != NO_REFERENCE:
        own = _other(reference, recipe, reporter, runs)
    loading.load_config(source, recipe.model)  # a misspelt path may look like a hub id: told first of all
    recipe = recipe.model_copy(update={"training": scoring_fields(recipe)})
    reward = reward_of(recipe, own, beta, trained=run is not None)
    return Target(name, source, recipe, run, run_id, own, reward)


def _start(run: RunFolder, runs: RunFinder, reporter: Reporter) -> PolicySource:
    """The policy that the run began with.

    Raises:
        UserError: it is not there any more.
    """
    try:
        return start_of(run, run.read_manifest(), runs=runs, progress=reporter.progress)
    except UserError as error:
        raise UserError(
            f"{error} Or measure from another policy with --reference RUN_OR_MODEL, from none with --reference "
            f"{NO_REFERENCE}."
        ) from error


def reward_of(
    recipe: Recipe, reference: PolicySource | None, beta: float | None, *, trained: bool
) -> Reward | None:
    """The reward that a recipe's method is about; of a model that no run trained, gpo's."""
    method = recipe.method.alignment
    if trained and isinstance(method, SoftSettings):
        return Reward(beta or method.alpha, "alpha", relative=False, per_token=method.length_normalize)
    if reference is None:
        return None
    if not trained or isinstance(method, SoftSettings):
        return Reward(beta or BETA, "beta", relative=True, per_token=False)
    logistic = isinstance(method, GPOSettings) and method.loss == "logistic"
    return Reward(
        beta or method.beta,
        "beta",
        relative=True,
        per_token=method.length_normalize,
        is_log_odds=logistic,
    )


def scoring_fields(recipe: Recipe) -> dict[str, Any]:
    """The recipe's training fields that log-probabilities depend on."""
    return {name: recipe.training[name] for name in SCORING_FIELDS if name in recipe.training}


def require_effect(overrides: Sequence[str], *, trained: bool = True) -> None:
    """Refuse overrides that would change nothing.

    Raises:
        UserError: one is about what finished runs have settled, or what a model alone does not have.
    """
    for each in overrides:
        key = each.partition("=")[0].strip()
        settled = (name for name in SETTLED if trained or name != "model.revision")
        if any(key == name or key.startswith(f"{name}.") for name in settled):
            why = (
                "the run has settled {}, and is evaluated as it is"
                if trained
                else "{} says nothing of a model"
            )
            raise UserError(
                f"override {each!r}: {why.format(key)}. Held-out sets may be set (dataset.eval), and how the policies "
                "are computed (training, model.dtype)."
            )


def require_same_tokens(policy: PolicySource, other: PolicySource, recipe: Recipe) -> None:
    """Refuse a reference that would take the policy's tokens for others.

    Raises:
        UserError: the tokenizers differ.
    """
    own, its = (loading.load_tokenizer(each, recipe.model).get_vocab() for each in (policy, other))
    if own != its:
        raise UserError(
            f"The reference {other.describe()} has another tokenizer ({len(its):,} entries) than {policy.describe()} "
            f"({len(own):,} entries), so it cannot score the same tokens. Name another with --reference, or "
            f"--reference {NO_REFERENCE} for log-probabilities alone."
        )


def _find_run(name: str, runs: RunFinder, key: str) -> RunFolder | None:
    """The run folder of this name; None where it can only be a model."""
    path = Path(name).expanduser()
    if RunFolder(path).is_run():
        return RunFolder(path)
    if path.exists() or runs.folder is None:
        return None
    return runs.find(name, key=key)


def _model_recipe(name: str, overrides: Sequence[str]) -> Recipe:
    """Says how a model is loaded. It has no data yet, except as overrides say."""
    data = {
        "model": {"name_or_path": name},
        "dataset": {"train": "unused"},
        "method": {"name": "gpo"},
        "output_dir": "unused",
    }
    return make_recipe(data, overrides, name="overrides")


def _other(reference: str, recipe: Recipe, reporter: Reporter, runs: RunFinder) -> PolicySource:
    """A policy that the user names as the reference."""
    run = _find_run(reference, runs, "--reference")
    if run is not None:
        return policy_of_run(run, reporter.progress, key="--reference")
    settings = ModelSettings(name_or_path=reference, trust_remote_code=recipe.model.trust_remote_code)
    found = find_policy(settings, reporter.progress, key="--reference")
    try:
        loading.load_config(found, settings)
    except UserError as error:
        raise UserError(f"--reference {reference}: {error}") from error
    return found
