"""What is to be scored, judged before anything heavy is imported, loaded or built."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import GPOSettings
from prefopt_cli.recipe.suggestions import nearest
from prefopt_cli.sandbox.names import DIMENSIONS, PreferencesName
from prefopt_cli.sandbox.origin import Origin, base_name, identity, origin, require_finished
from prefopt_cli.sandbox.settings import STANDARD as STANDARD_WORLD
from prefopt_cli.sandbox.targets import NamedTarget, closed_form, softmax_target
from prefopt_cli.sandbox.world import find_world

CLOSED_FORM = "closed-form"


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


STANDARD = ScoreSettings()


@dataclass(frozen=True)
class Plan:
    """Policies of one world, and what they are compared with and judged by."""

    policies: tuple[str, ...]
    opponent: str
    preferences: PreferencesName
    """The gold reward that matters, and how the held-out pairs are labelled."""
    target: NamedTarget | None
    target_note: str | None
    """Why there is no target."""
    settings: ScoreSettings

    @property
    def seed(self) -> int:
        """Of the world."""
        return self.preferences.seed


def plan_score(
    policies: Sequence[str],
    *,
    against: str | None = None,
    dimension: str | None = None,
    target: str = CLOSED_FORM,
    settings: ScoreSettings = STANDARD,
) -> Plan:
    """Find everything that is wrong with a wish to score, as far as names and recipes tell.

    Args:
        policies: run folders, or ``sandbox:base``.
        against: the opponent in win rates and differences; None: the base policy that they go back to.
        dimension: the gold reward that matters; None: the one that the first of the runs was trained on.
        target: ``closed-form`` of that run's method, or ``softmax:ALPHA``.
        settings: how much is looked at.

    Raises:
        UserError: a policy is none of the sandbox's, unfinished or named twice, they are of several worlds, the
            target or dimension does not exist, or there are not so many prompts.
    """
    if not policies:
        raise UserError("Name at least one run.")
    asked = _asked_target(target)
    if dimension is not None and dimension not in DIMENSIONS:
        raise UserError(_unknown("dimension", dimension, tuple(DIMENSIONS)))
    found = {name: origin(name) for name in (*policies, *([against] if against is not None else []))}
    for name in found:
        require_finished(name)
    _require_different(policies)
    world = found[policies[0]].seed
    for name, each in found.items():
        if each.seed != world:
            raise UserError(
                f"{policies[0]} and {name} are of different worlds (seeds {world} and {each.seed}): they cannot be "
                "compared."
            )
    _require_prompts(settings, world)
    trained = next((found[name] for name in policies if found[name].preferences), found[policies[0]])
    preferences = _preferences(trained, dimension)
    made, note = (asked, None) if asked else find_closed_form(trained, preferences)
    if settings.exact_prompts == 0:
        made, note = None, "no prompt's replies were enumerated"
    if made and not asked and len(policies) > 1:
        first = next(name for name in policies if found[name] is trained)
        made = replace(made, name=f"{made.name} (closed form of {first})")
    return Plan(tuple(policies), against or base_name(world), preferences, made, note, settings)


def find_closed_form(found: Origin, preferences: PreferencesName) -> tuple[NamedTarget | None, str | None]:
    """The optimum of a policy's method on these preferences, or why it is not known."""
    if found.recipe is None:
        return None, "the base policy was not trained by a method"
    if not found.from_base:
        return None, "the closed form is known for runs that start from the base policy"
    if [replace(each, temperature=0.0) for each in found.preferences] != [
        replace(preferences, temperature=0.0)
    ]:
        return None, f"the policy was not trained on this world's {preferences.dimension} alone"
    if any(source.where for source in found.recipe.dataset.train):
        return None, "the policy was trained on a selection of the pairs (where)"
    method = found.recipe.method
    made = closed_form(method, preferences.temperature)
    of_what = method.loss if isinstance(method, GPOSettings) else method.name
    return made, None if made else f"{of_what} has no closed form with these settings"


def require_prompts(settings: ScoreSettings, count: int) -> None:
    """Refuse to look at more prompts than the world holds out.

    Raises:
        UserError: there are only ``count``.
    """
    if settings.prompts > count:
        raise UserError(f"The sandbox has {count} held-out prompts, not {settings.prompts}.")


def _require_prompts(settings: ScoreSettings, seed: int) -> None:
    # A prompt to which the base policy kept saying the same is left out, so only the world itself knows for sure.
    world = find_world(seed)
    require_prompts(settings, len(world.pool("test")) if world else STANDARD_WORLD.test_prompts)
    if settings.exact_prompts > settings.prompts:
        raise UserError(
            f"The {settings.exact_prompts} prompts whose replies are enumerated must be among the {settings.prompts} "
            "that are sampled: lower --exact-prompts, or raise --prompts."
        )


def _require_different(policies: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for name in policies:
        if (same := identity(name)) in seen:
            also = "" if seen[same] == name else f", the second time as {name}"
            raise UserError(f"{seen[same]} is named twice{also}.")
        seen[same] = name


def _asked_target(text: str) -> NamedTarget | None:
    """The target that the text describes; None: the closed form."""
    if text == CLOSED_FORM:
        return None
    kind, colon, number = text.partition(":")
    if kind != "softmax" or not colon:
        raise UserError(_unknown("target", text, (CLOSED_FORM, "softmax:ALPHA")))
    try:
        alpha = float(number)
    except ValueError as error:
        raise UserError(f"--target {text}: softmax needs a number, such as softmax:1.0.") from error
    return softmax_target(alpha)


def _unknown(option: str, text: str, known: tuple[str, ...]) -> str:
    near = nearest(text, known)
    hint = f" Did you mean {near}?" if near else ""
    return f"--{option} {text}: there is no such {option}; there are {', '.join(known)}.{hint}"


def _preferences(trained: Origin, dimension: str | None) -> PreferencesName:
    """The trained preferences, or those of the dimension that was asked for, in the policy's own world."""
    by_dimension = {each.dimension: each for each in trained.preferences}
    if dimension is None and not by_dimension:
        raise UserError(
            f"No run was trained on the sandbox's preferences; choose what counts with --dimension: "
            f"{', '.join(DIMENSIONS)}."
        )
    dimension = dimension or next(iter(by_dimension))
    return replace(by_dimension.get(dimension, PreferencesName(dimension)), seed=trained.seed)
