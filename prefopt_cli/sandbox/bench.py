"""The bench on which policies are measured: prompts, held-out pairs, base policy and target, the same for all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from prefopt_cli.data.examples import Progress
from prefopt_cli.evaluation.statistics import Estimate, means_with_intervals
from prefopt_cli.sandbox.measure import Measured, exact_logps, measure, text_logps
from prefopt_cli.sandbox.names import DIMENSIONS
from prefopt_cli.sandbox.origin import identity, is_base
from prefopt_cli.sandbox.plan import Plan, ScoreSettings, require_prompts
from prefopt_cli.sandbox.policies import load_policy
from prefopt_cli.sandbox.preferences import Row, pairs
from prefopt_cli.sandbox.rewards import reward_table
from prefopt_cli.sandbox.targets import total_variation
from prefopt_cli.sandbox.world import World

EVEN = 0.5
"""The win rate of a policy against one like it."""


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

        def compared(estimates: dict[str, Estimate], null: float) -> dict[str, Any]:
            return {
                name: {**each.to_dict(), "significant": each.excludes(null)}
                for name, each in estimates.items()
            }

        return {
            "figures": {name: each.to_dict() for name, each in self.figures.items()},
            "changes": compared(self.changes, 0.0),
            "win_rates": compared(self.win_rates, EVEN),
        }


class Bench:
    """Measures policies, all on the same prompts and pairs.

    Raises:
        UserError: the world does not hold out so many prompts.
    """

    def __init__(self, world: World, plan: Plan, progress: Progress | None = None) -> None:
        pool = world.pool("test")
        require_prompts(plan.settings, len(pool))
        self.settings: ScoreSettings = plan.settings
        self.dimension = plan.preferences.dimension
        self.prompts = [row.prompt for row in pool[: plan.settings.prompts]]
        self.heldout = list(pairs(pool, "test", plan.preferences))
        self._opponent = identity(plan.opponent)
        self._progress = progress
        self._seen: dict[str, Seen] = {}
        self._base, self._tokenizer = load_policy(world.base)
        self._texts = [(row["prompt"], row[side]) for side in ("chosen", "rejected") for row in self.heldout]
        self._base_margin = self._margin(self._base)
        self._enumerated = self.prompts[: plan.settings.exact_prompts] if plan.target else []
        self._base_logps = self._exact(self._base, "the base policy")
        self._targets = [
            plan.target.distribution(logps, reward_table(prompt.problem, self.dimension))
            for logps, prompt in zip(self._base_logps, self._enumerated, strict=True)
            if plan.target
        ]

    def attainable(self) -> float:
        """How often a held-out label agrees with the gold reward; equal rewards count half."""
        return float(wins(np.array([self._gold_margin(row) for row in self.heldout])).mean())

    def look_at(self, name: str) -> "Seen":
        """Everything about one policy; it is looked at once."""
        key = identity(name)
        if key not in self._seen:
            self._seen[key] = self._look_at(name)
        return self._seen[key]

    def _look_at(self, name: str) -> "Seen":
        # All policies of a bench are of one world, which has one base policy.
        model = self._base if is_base(name) else load_policy(name)[0]
        measured = measure(
            model,
            self._base,
            self._tokenizer,
            self.prompts,
            self.settings.per_prompt,
            # Of its own for the opponent: wins are counted between independent samples.
            seed=2 * self.settings.seed + (identity(name) == self._opponent),
            progress=self._progress,
            name=name,
        )
        logps = self._base_logps if is_base(name) else self._exact(model, name)
        return Seen(
            name=name,
            measured=measured,
            margin=self._base_margin if is_base(name) else self._margin(model),
            base_margin=self._base_margin,
            pair_prompts=[row["prompt"] for row in self.heldout],
            distances=[
                total_variation(each, target) for each, target in zip(logps, self._targets, strict=True)
            ],
        )

    def _exact(self, model: PreTrainedModel, name: str) -> np.ndarray:
        return exact_logps(model, self._tokenizer, self._enumerated, self._progress, name)

    def _gold_margin(self, row: Row) -> float:
        return float(row["chosen_gold"][self.dimension] - row["rejected_gold"][self.dimension])

    def _margin(self, model: PreTrainedModel) -> np.ndarray:
        chosen, rejected = np.split(text_logps(model, self._tokenizer, self._texts), 2)
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
        samples = [[sample.text for sample in drawn] for drawn in self.measured.samples]
        figures = self._means(self._quantities())
        if opponent is None:
            return Score(self.name, figures, samples=samples)
        own, other = self._quantities(), opponent._quantities()
        differences = [
            {name: values - others[name] for name, values in mine.items()}
            for mine, others in zip(own, other, strict=True)
        ]
        return Score(self.name, figures, self._means(differences), self._win_rates(opponent), samples)

    def _means(self, quantities: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Estimate]:
        """With intervals: prompts are drawn again with all that belongs to them."""
        by_prompt, by_pair, by_enumerated = quantities
        return {
            **means_with_intervals(by_prompt),
            **means_with_intervals(by_pair, self.pair_prompts),
            **means_with_intervals(by_enumerated),
        }

    def _quantities(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What there are means of: by sampled prompt, by held-out pair, by enumerated prompt."""
        accuracies = {
            "heldout/logp_accuracy": wins(self.margin),
            # The base policy's implicit rewards are all zero, so that it guesses.
            "heldout/reward_accuracy": wins(self.margin - self.base_margin),
        }
        distances = {"total_variation": np.array(self.distances)} if self.distances else {}
        return self._by_prompt(), accuracies, distances

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
            return wins(own[:, :, None] - other[:, None, :]).mean(axis=(1, 2))

        return means_with_intervals({dimension: by_prompt(dimension) for dimension in DIMENSIONS})


def wins(differences: np.ndarray) -> np.ndarray:
    """1 where positive, 1/2 where zero, 0 where negative."""
    return 0.5 * (1.0 + np.sign(differences))
