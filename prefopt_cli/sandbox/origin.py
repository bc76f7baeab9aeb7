"""Where a policy comes from: which world, which preferences, by which method."""

from dataclasses import dataclass
from pathlib import Path

from prefopt_cli.errors import UserError
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.sandbox import names
from prefopt_cli.sandbox.names import PreferencesName

PREFIX = f"{names.SCHEME}:"


@dataclass(frozen=True)
class Origin:
    """What a policy's recipe says, as far as it has one."""

    seed: int
    """Of the world."""
    preferences: tuple[PreferencesName, ...] = ()
    """That it was trained on."""
    recipe: Recipe | None = None
    from_base: bool = False
    """Whether training started from the base policy, and not from another run."""


def origin(policy: str) -> Origin:
    """Look it up: a ``sandbox:`` name, or a run folder and the runs it goes back to.

    Raises:
        UserError: it does not go back to the sandbox's base policy.
    """
    if policy.startswith(PREFIX):
        return Origin(names.parse_model(policy.removeprefix(PREFIX)).seed)
    run = RunFolder(Path(policy).expanduser())
    if not run.is_run():
        raise UserError(f"{policy} is no run folder; name one that was trained from {PREFIX}{names.BASE}.")
    recipe = load_recipe(run.recipe)
    started_from = recipe.model.name_or_path
    try:
        before = origin(started_from)
    except UserError as error:
        raise UserError(
            f"{policy} was trained from {started_from}, not from {PREFIX}{names.BASE}: the sandbox cannot judge it."
        ) from error
    preferences = [
        names.parse_dataset(source.source.removeprefix(PREFIX), source.config)
        for source in recipe.dataset.train
        if source.source.startswith(PREFIX)
    ]
    return Origin(before.seed, tuple(preferences), recipe, from_base=started_from.startswith(PREFIX))
