"""The bench on which policies are measured: prompts, held-out pairs, base policy and target, the same for all."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from prefopt_cli.data.examples import Progress
from prefopt_cli.evaluation.statistics import Estimate, means_with_intervals
from prefopt_cli.sandbox import names
from prefopt_cli.sandbox.measure import Measured, exact_logps, measure, text_logps
from prefopt_cli.sandbox.names import DIMENSIONS, PreferencesName
from prefopt_cli.sandbox.policies import load_policy
from prefopt_cli.sandbox.preferences import Row, pairs
from prefopt_cli.sandbox.rewards import reward_table
from prefopt_cli.sandbox.targets import NamedTarget, total_variation
from prefopt_cli.sandbox.world import World

BASE = f"{names.SCHEME}:{names.BASE}"


@dataclass(frozen=True)
class ScoreSettings:
    """How much is looked at."""

    prompts: int = 300
    """Held-out prompts that are sampled."""
    per_prompt: int = 8
    """Samples of each."""
    exact_prompts: int = 24
    """Of these prompts, how many have all their replies enumerated; 0: none, and no total variation."""
    seed: int = 0
    """Of the sampling."""


@dataclass(frozen=True)
class Score:
    """The figures of one policy; all intervals are bootstrap over prompts, 95 %."""

    name: str
    figures: dict[str, Estimate]
    """By metric, the policy's own: ``reward/<dimension>``, ``kl``, ``entropy``, ``distinct``, ``well_formed``,
    ``heldout/logp_accuracy``, ``heldout/reward_accuracy``, ``total_variation``. In nats where that applies."""
    changes: dict[str, Estimate] = field(default_factory=dict)
    """By metric, this policy's minus the opponent's on the same prompts."""
    win_rates: dict[str, Estimate] = field(default_factory=dict)
    """By dimension, how often a sample's gold reward beats that of an opponent's sample to the same prompt; equal
    rewards count half."""
    samples: list[list[str]] = field(default_factory=list)
    """By prompt, its samples."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without the samples."""
        groups = {"figures": self.figures, "changes": self.changes, "win_rates": self.win_rates}
        return {name: {key: each.to_dict() for key, each in group.items()} for name, group in groups.items()}


class Bench:
    """Measures policies, all on the same prompts and pairs."""

    def __init__(
        self,
        world: World,
        preferences: PreferencesName,
        settings: ScoreSettings,
        target: NamedTarget | None,
        progress: Progress | None,
    ) -> None:
        pool = world.pool("test")
        self.settings = settings
        self.preferences = preferences
        self.progress = progress
        self.prompts = [row.prompt for row in pool[: settings.prompts]]
        self.heldout = list(pairs(pool, "test", preferences))
        self.base, self.tokenizer = load_policy(world.base)
        self._texts = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in self.heldout]
        self._base_margin = self._margin(self.base)
        self._enumerated = self.prompts[: settings.exact_prompts] if target else []
        self._targets = self._target_logps(target) if target else []

    def _target_logps(self, target: NamedTarget) -> list[np.ndarray]:
        """The target's log-probabilities of all replies to every enumerated prompt."""
        base = exact_logps(self.base, self.tokenizer, self._enumerated, self.progress, "base policy")
        return [
            target.distribution(logps, reward_table(prompt.problem, self.preferences.dimension))
            for logps, prompt in zip(base, self._enumerated, strict=True)
        ]

    def attainable(self) -> float:
        """How often a held-out label agrees with the gold reward; equal rewards count half."""
        return float(_wins(np.array([self._gold_margin(row) for row in self.heldout])).mean())

    def look_at(self, name: str) -> "Seen":
        """Everything about one policy."""
        model, tokenizer = load_policy(name)
        measured = measure(
            model,
            self.base,
            tokenizer,
            self.prompts,
            self.settings.per_prompt,
            seed=self.settings.seed,
            progress=self.progress,
            name=name,
        )
        logps = exact_logps(model, tokenizer, self._enumerated, self.progress, name)
        distances = [total_variation(each, target) for each, target in zip(logps, self._targets, strict=True)]
        return Seen(
            name,
            measured,
            self._margin(model),
            self._base_margin,
            [row["prompt"] for row in self.heldout],
            distances,
        )

    def _gold_margin(self, row: Row) -> float:
        dimension = self.preferences.dimension
        return float(row["chosen_gold"][dimension] - row["rejected_gold"][dimension])

    def _margin(self, model: PreTrainedModel) -> np.ndarray:
        chosen, rejected = np.split(text_logps(model, self.tokenizer, self._texts), 2)
        return chosen - rejected


@dataclass(frozen=True)
class Seen:
    """One policy, measured on N held-out pairs and E enumerated prompts."""

    name: str
    measured: Measured
    margin: np.ndarray
    """(N,) log-probability of the chosen reply minus that of the rejected one."""
    base_margin: np.ndarray
    """(N,) the same under the base policy."""
    pair_prompts: list[str]
    distances: list[float]
    """(E,) total variation to the target."""

    def score(self, opponent: "Seen | None" = None) -> Score:
        """Means, and differences to the opponent, with intervals."""
        own = self._by_prompt()
        figures = means_with_intervals(own)
        accuracies = {"heldout/logp_accuracy": _wins(self.margin)}
        if not np.array_equal(self.margin, self.base_margin):  # implicit rewards of the base are all zero
            accuracies["heldout/reward_accuracy"] = _wins(self.margin - self.base_margin)
        figures |= means_with_intervals(accuracies, self.pair_prompts)
        if self.distances:
            figures |= means_with_intervals({"total_variation": self.distances})
        samples = [[sample.text for sample in drawn] for drawn in self.measured.samples]
        if opponent is None:
            return Score(self.name, figures, samples=samples)
        other = opponent._by_prompt()
        changes = means_with_intervals({name: own[name] - other[name] for name in own})
        changes |= means_with_intervals(
            {"heldout/logp_accuracy": _wins(self.margin) - _wins(opponent.margin)}, self.pair_prompts
        )
        if self.distances:
            changes |= means_with_intervals(
                {"total_variation": np.subtract(self.distances, opponent.distances)}
            )
        return Score(self.name, figures, changes, self._win_rates(opponent), samples)

    def _by_prompt(self) -> dict[str, np.ndarray]:
        """(P,) means over a prompt's samples: samples of one prompt are not independent."""
        measured = self.measured
        rewards = {f"reward/{name}": values.mean(axis=1) for name, values in measured.rewards.items()}
        return {
            **rewards,
            "kl": measured.kl.mean(axis=1),
            "entropy": measured.entropy.mean(axis=1),
            "distinct": measured.distinct,
            "well_formed": measured.well_formed.mean(axis=1),
        }

    def _win_rates(self, opponent: "Seen") -> dict[str, Estimate]:
        def by_prompt(dimension: str) -> np.ndarray:
            own, other = self.measured.rewards[dimension], opponent.measured.rewards[dimension]
            return _wins(own[:, :, None] - other[:, None, :]).mean(axis=(1, 2))

        return means_with_intervals({dimension: by_prompt(dimension) for dimension in DIMENSIONS})


def _wins(differences: np.ndarray) -> np.ndarray:
    """1 where positive, 1/2 where zero, 0 where negative."""
    return 0.5 * (1.0 + np.sign(differences))
