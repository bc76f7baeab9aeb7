"""`prefopt compare`: several policies on the same held-out pairs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.evaluation.divergence import Divergence, KLSettings, kl_to_reference, settings_for
from prefopt_cli.evaluation.evaluate import scores_of
from prefopt_cli.evaluation.gold import gold_rewards
from prefopt_cli.evaluation.held_out import HeldOutSet, held_out_sets, room
from prefopt_cli.evaluation.labels import labels
from prefopt_cli.evaluation.overlap import Trained, TrainingPrompts
from prefopt_cli.evaluation.paired import PairedSet, adjusted, paired_set
from prefopt_cli.evaluation.scored import ScoredSet, scored_set
from prefopt_cli.evaluation.statistics import Estimate
from prefopt_cli.evaluation.targets import Target, find_target, require_same_tokens
from prefopt_cli.models import loading
from prefopt_cli.models.policy import PolicySource
from prefopt_cli.recipe.schema import DatasetSettings
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.frozen_policies import SetScores
from prefopt_cli.training.record import now
from prefopt_cli.training.reporting import Reporter


@dataclass(frozen=True)
class Policy:
    """One of the policies that are compared."""

    target: Target
    label: str
    divergence: Divergence | None
    """KL to its reference; None where it has none, or none was asked for."""
    gold: dict[str, Estimate] | None
    """Mean gold rewards by dimension, where `prefopt sandbox score` found them out."""
    trained: Trained
    """Prompts that it was trained on."""

    @property
    def kl(self) -> Estimate | None:
        """In nats."""
        return self.divergence.kl if self.divergence else None


@dataclass(frozen=True)
class Skipped:
    """A name that is no policy."""

    name: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Everything that was found out."""

    policies: tuple[Policy, ...]
    """The baseline first."""
    skipped: tuple[Skipped, ...]
    sets: dict[str, PairedSet]
    kl: KLSettings | None
    made: str = field(default_factory=now)

    @property
    def baseline(self) -> Policy:
        """What the others are measured from."""
        return self.policies[0]


def find_targets(
    names: Sequence[str],
    reporter: Reporter,
    runs: RunFinder,
    *,
    reference: str | None,
    beta: float | None,
    overrides: Sequence[str],
) -> tuple[list[Target], list[Skipped]]:
    """The policies of these names. What lies beside runs (`runs/*`) and is none, and unfinished runs, are left out.

    Raises:
        UserError: a name is of nothing at all, or fewer than two policies are left.
    """
    found: list[Target] = []
    skipped: list[Skipped] = []
    for name in dict.fromkeys(each.rstrip("/") or each for each in names):
        if reason := _no_policy(Path(name).expanduser()):
            skipped.append(Skipped(name, reason))
        else:
            found.append(
                find_target(
                    name, reporter, runs, reference=reference, beta=beta, overrides=overrides, key="RUN"
                )
            )
    if len(found) < 2:
        reasons = "".join(f"\n  {each.name}: {each.reason}" for each in skipped)
        raise UserError(f"Two policies at least are compared, and there {_are(len(found))}.{reasons}")
    return found, skipped


def _are(count: int) -> str:
    return "is only one" if count else "is none"


def _no_policy(path: Path) -> str | None:
    """Why what lies there is not compared; None where it may be, or nothing lies there."""
    run = RunFolder(path)
    if run.is_run():
        status = run.read_manifest().get("status", "finished")
        return None if status == "finished" and run.model.is_dir() else f"not finished (status {status})"
    if path.is_file():
        return "a file"
    if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return "neither a run nor a model"
    return None


def compare(
    targets: Sequence[Target],
    settings: DatasetSettings,
    reporter: Reporter,
    runs: RunFinder,
    *,
    skipped: Sequence[Skipped] = (),
    kl_prompts: int = 0,
    stopping: Callable[[], bool] = lambda: False,
    seed: int = 0,
) -> Comparison:
    """Score the same pairs with every policy, and compare each with the first.

    Args:
        targets: the policies, the baseline first.
        settings: the held-out sets.
        reporter: told of progress.
        runs: finds runs that were moved.
        skipped: names that were left out, to be told.
        kl_prompts: held-out prompts to sample for the KL to the reference; 0 leaves it out.
        stopping: whether a signal has asked to stop.
        seed: of sampling and resampling.

    Raises:
        UserError: a policy or a set cannot be read, or no row is left that all policies can take.
        ScoringStopped: a signal came; what was scored until then is in the cache.
    """
    names = labels([target.name for target in targets])
    kl = settings_for(targets, kl_prompts, seed)
    scores = _Scores(reporter, stopping)
    reader = _Reader(settings, reporter)
    training = TrainingPrompts(runs, reporter)
    scored: dict[str, dict[str, ScoredSet]] = {}
    policies = []
    for number, target in enumerate(targets, 1):
        reporter.message(f"{number} of {len(targets)}: {target.name}")
        sets = reader.sets_of(target)
        scored[target.name] = scores.of(target, sets)
        divergence = kl_to_reference(target, list(sets.values()), kl, reporter, stopping) if kl else None
        trained = training.of(target.run)
        policies.append(Policy(target, names[target.name], divergence, gold_rewards(target.run), trained))
    compared = {}
    for done, name in enumerate(scored[targets[0].name]):
        reporter.progress("comparing", done, len(scored[targets[0].name]))
        by_policy = {names[each.name]: scored[each.name][name] for each in targets}
        compared[name] = paired_set(name, by_policy, seed=seed)
    reporter.progress("comparing", len(compared), len(compared))
    return Comparison(tuple(policies), tuple(skipped), adjusted(compared), kl)


class _Reader:
    """The held-out sets in the tokens of each policy, as far as its context holds; where both agree they are shared."""

    def __init__(self, settings: DatasetSettings, reporter: Reporter) -> None:
        self.settings = settings
        self.reporter = reporter
        self.known: list[tuple[Any, dict[str, HeldOutSet]]] = []

    def sets_of(self, target: Target) -> dict[str, HeldOutSet]:
        """By name.

        Raises:
            UserError: they cannot be read, or do not fit the model.
        """
        tokenizer = loading.load_tokenizer(target.source, target.recipe.model)
        config = loading.load_config(target.source, target.recipe.model)
        longest = room(config, self.settings.max_length)
        own = (tokenizer.get_vocab(), tokenizer.chat_template, tokenizer.eos_token_id, longest)
        for key, sets in self.known:
            if key == own:
                return sets
        settings = self.settings.model_copy(update={"max_length": longest})
        sets = held_out_sets(target, settings, self.reporter)
        self.known.append((own, sets))
        return sets


class _Scores:
    """Log-probabilities of policies; a reference that several runs began with is asked once."""

    def __init__(self, reporter: Reporter, stopping: Callable[[], bool]) -> None:
        self.reporter = reporter
        self.stopping = stopping
        self.known: list[tuple[Any, SetScores]] = []

    def of(self, target: Target, sets: Mapping[str, HeldOutSet]) -> dict[str, ScoredSet]:
        """By set, with the policy's scores and its reference's.

        Raises:
            UserError: a policy cannot be loaded, or the reference has another tokenizer.
        """
        own = self._asked(target.source, target, sets, "the policy")
        its = None
        if target.reference is not None:
            require_same_tokens(target.source, target.reference, target.recipe)
            its = self._asked(target.reference, target, sets, "the reference")
        return {
            name: scored_set(held_out, own.logps[name], its.logps[name] if its else None, target.reward)
            for name, held_out in sets.items()
        }

    def _asked(
        self, source: PolicySource, target: Target, sets: Mapping[str, HeldOutSet], what: str
    ) -> SetScores:
        recipe = target.recipe
        how = (source, recipe.model.model_copy(update={"name_or_path": ""}), recipe.adapter == "none")
        data = tuple(each.fingerprint for each in sets.values())
        key = (*how, recipe.training, data)
        for known, found in self.known:
            if known == key:
                return found
        tokens = {name: each.tokens for name, each in sets.items()}
        found = scores_of(source, target, tokens, self.reporter, what, self.stopping)
        self.known.append((key, found))
        return found
