"""Which frozen policies score a stage's data before it trains, and how much of that the score cache holds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from datasets import Dataset
from trl import DPOConfig

from prefopt_cli.models.policy import PolicySource
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.training.frozen_policies import unscored
from prefopt_cli.training.preparation import training_field


@dataclass(frozen=True)
class NeededScores:
    """Of one policy."""

    policy: str
    responses: int | None = None
    """Different ones in the stage's data; None where the policy is not trained yet."""
    cached: int | None = None
    """Those whose score the cache holds; None where the policy is not trained yet."""

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)

    def describe(self) -> str:
        """In words."""
        if self.responses is None or self.cached is None:
            return f"{self.policy}: not trained yet"
        return f"{self.policy}: {self.cached:,} of {self.responses:,} responses are in the cache"


def needed_scores(
    policies: Sequence[tuple[str, PolicySource | None]],
    recipe: Recipe,
    sets: Mapping[str, Dataset],
    args: DPOConfig,
) -> list[NeededScores]:
    """What is needed of each policy; those that are there are loaded, one after the other.

    Args:
        policies: by name, the reference last; None: not trained yet.
        recipe: of the stage.
        sets: its tokenised data, by name.
        args: its training arguments.
    """
    if not training_field(recipe.training, "precompute_ref_log_probs"):
        policies = policies[:-1]  # the reference runs in every step
    found = []
    for name, source in policies:
        if source is None:
            found.append(NeededScores(name))
            continue
        responses, missing = unscored(source, recipe, sets, args)
        found.append(NeededScores(name, responses, responses - missing))
    return found
