"""Judges trained policies by what only the sandbox knows: the true reward of every reply."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from prefopt_cli.recipe.schemes import Progress
from prefopt_cli.sandbox.bench import Bench, Score
from prefopt_cli.sandbox.grammar import Prompt, parse_reply
from prefopt_cli.sandbox.plan import CLOSED_FORM, STANDARD, Plan, ScoreSettings, plan_score
from prefopt_cli.sandbox.preferences import text_rewards
from prefopt_cli.sandbox.world import open_world


@dataclass(frozen=True)
class Shown:
    """One reply of one policy."""

    policy: str
    text: str
    well_formed: bool
    rewards: dict[str, float]


@dataclass(frozen=True)
class Report:
    """Scores of an opponent (the base policy unless another was named) and of the policies compared with it."""

    seed: int
    dimension: str
    """What the policies were trained on, or what was asked for."""
    temperature: float
    """Of the labels of the held-out pairs."""
    settings: ScoreSettings
    target: str | None
    target_note: str | None
    """Why there is no target."""
    attainable: float
    """Share of the held-out pairs whose label agrees with the gold reward: the accuracy of a perfect judge."""
    opponent: Score
    policies: list[Score]
    prompts: list[Prompt]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "world_seed": self.seed,
            "dimension": self.dimension,
            "temperature": self.temperature,
            "prompts": len(self.prompts),
            "samples_per_prompt": self.settings.per_prompt,
            "exact_prompts": self.settings.exact_prompts,
            "sampling_seed": self.settings.seed,
            "target": self.target,
            "target_note": self.target_note,
            "attainable_accuracy": self.attainable,
            "opponent": self.opponent.name,
            # A policy that is its own opponent is there once, with its differences to itself.
            "policies": {score.name: score.to_dict() for score in (self.opponent, *self.policies)},
        }

    def shown(self, count: int) -> list[tuple[Prompt, list[Shown]]]:
        """The first prompts, with every policy's first reply to each, the opponent's before the others."""
        return [
            (prompt, [_shown(prompt, score.name, score.samples[number][0]) for score in self._all()])
            for number, prompt in enumerate(self.prompts[:count])
        ]

    def samples_dict(self, count: int) -> list[dict[str, Any]]:
        """As `shown`, for JSON."""
        return [
            {"prompt": prompt.text, "replies": [asdict(each) for each in replies]}
            for prompt, replies in self.shown(count)
        ]

    def _all(self) -> list[Score]:
        return [self.opponent, *(each for each in self.policies if each.name != self.opponent.name)]


def score(
    policies: Sequence[str],
    *,
    against: str | None = None,
    dimension: str | None = None,
    target: str = CLOSED_FORM,
    settings: ScoreSettings = STANDARD,
    progress: Progress | None = None,
) -> Report:
    """Sample the policies on held-out prompts and compare them with ``against`` by gold reward.

    For the arguments and errors see `plan.plan_score`; ``progress`` is told of the work.
    """
    return carry_out(
        plan_score(policies, against=against, dimension=dimension, target=target, settings=settings), progress
    )


def carry_out(plan: Plan, progress: Progress | None = None) -> Report:
    """Do what was planned; a world that is not there (any more) is made.

    Raises:
        UserError: a policy cannot be loaded, or the world has fewer prompts than it was thought to have.
    """
    bench = Bench(open_world(plan.seed, progress=progress), plan, progress)
    opponent = bench.look_at(plan.opponent)
    return Report(
        seed=plan.seed,
        dimension=plan.preferences.dimension,
        temperature=plan.preferences.temperature,
        settings=plan.settings,
        target=plan.target.name if plan.target else None,
        target_note=plan.target_note,
        attainable=bench.attainable(),
        opponent=opponent.score(),
        policies=[bench.look_at(name).score(opponent) for name in plan.policies],
        prompts=bench.prompts,
    )


def _shown(prompt: Prompt, policy: str, text: str) -> Shown:
    return Shown(policy, text, parse_reply(prompt, text) is not None, text_rewards(prompt, text))
