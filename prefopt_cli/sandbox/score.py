"""Judges trained policies by what only the sandbox knows: the true reward of every reply."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefopt_cli.data.examples import Progress
from prefopt_cli.errors import UserError
from prefopt_cli.sandbox import names
from prefopt_cli.sandbox.bench import BASE, Bench, Score, ScoreSettings
from prefopt_cli.sandbox.names import DIMENSIONS, PreferencesName
from prefopt_cli.sandbox.origin import Origin, origin
from prefopt_cli.sandbox.targets import NamedTarget, closed_form, softmax_target
from prefopt_cli.sandbox.world import open_world

CLOSED_FORM = "closed-form"
STANDARD = ScoreSettings()


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
    prompts: list[str]

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
            "policies": {score.name: score.to_dict() for score in (self.opponent, *self.policies)},
        }


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

    Args:
        policies: run folders, or ``sandbox:base``.
        against: the opponent in win rates and differences; None: the base policy that they go back to.
        dimension: the gold reward that matters; None: the one that the first policy was trained on.
        target: ``closed-form`` of the first policy's method, or ``softmax:ALPHA``.
        settings: how much is looked at.
        progress: told of the work.

    Raises:
        UserError: a policy is none of the sandbox's, they are of several worlds, or the target does not exist.
    """
    first = origin(policies[0])
    against = against or (BASE if first.seed == 0 else f"{BASE}/seed={first.seed}")
    for name in (*policies, against):
        if origin(name).seed != first.seed:
            raise UserError(
                f"{policies[0]} and {name} are of different worlds (seeds {first.seed} and {origin(name).seed}): "
                "they cannot be compared."
            )
    preferences = _preferences(first, dimension)
    wanted, note = find_target(target, first, preferences)
    world = open_world(first.seed, progress=progress)
    bench = Bench(world, preferences, settings, wanted, progress)
    opponent = bench.look_at(against)
    return Report(
        seed=first.seed,
        dimension=preferences.dimension,
        temperature=preferences.temperature,
        settings=settings,
        target=wanted.name if wanted else None,
        target_note=note,
        attainable=bench.attainable(),
        opponent=opponent.score(),
        policies=[bench.look_at(name).score(opponent) for name in policies],
        prompts=[prompt.text for prompt in bench.prompts],
    )


def find_target(
    text: str, found: Origin, preferences: PreferencesName
) -> tuple[NamedTarget | None, str | None]:
    """The target that was asked for, or why there is none.

    Raises:
        UserError: the text names no target.
    """
    kind, _, number = text.partition(":")
    if kind == "softmax":
        try:
            return softmax_target(float(number)), None
        except ValueError as error:
            raise UserError(f"The target {text} needs a number: softmax:1.0.") from error
    if text != CLOSED_FORM:
        raise UserError(f"The target {text} is unknown; write {CLOSED_FORM} or softmax:ALPHA.")
    if found.recipe is None:
        return None, "the base policy was not trained by a method"
    if not found.from_base:
        return None, "the closed form is known for runs that start from the base policy"
    method = found.recipe.method
    if [each.dimension for each in found.preferences] != [preferences.dimension]:
        return None, f"the policy was not trained on {preferences.dimension} alone"
    made = closed_form(method, preferences.temperature)
    return made, None if made else f"{method.loss} has no closed form with these settings"


def _preferences(first: Origin, dimension: str | None) -> PreferencesName:
    """The trained preferences, or those of the dimension that was asked for."""
    if dimension is not None and dimension not in DIMENSIONS:
        names.parse_dataset(dimension)  # says what there is
    trained = {each.dimension: each for each in first.preferences}
    if dimension is None and not trained:
        raise UserError(
            f"The policy was not trained on the sandbox's preferences; choose what counts with --dimension: "
            f"{', '.join(DIMENSIONS)}."
        )
    dimension = dimension or next(iter(trained))
    return trained.get(dimension, PreferencesName(dimension, seed=first.seed))
