"""Where a policy comes from: which world, which preferences, by which method. Light: no policy is loaded."""

from dataclasses import dataclass
from pathlib import Path

from prefopt_cli.errors import UserError
from prefopt_cli.models.policy import near_folder
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.sandbox import names
from prefopt_cli.sandbox.names import PreferencesName

PREFIX = f"{names.SCHEME}:"
BASE = f"{PREFIX}{names.BASE}"


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


def is_base(policy: str) -> bool:
    """Whether the name is one of a base policy."""
    return policy.startswith(PREFIX)


def base_name(seed: int) -> str:
    """What the base policy of a world is called."""
    return BASE if seed == 0 else f"{BASE}/seed={seed}"


def identity(policy: str) -> str:
    """The same for two names of one policy."""
    if is_base(policy):
        return base_name(names.parse_model(policy.removeprefix(PREFIX)).seed)
    return str(Path(policy).expanduser().resolve())


def origin(policy: str) -> Origin:
    """Look it up: a ``sandbox:`` name, or what a run's manifest has, or else the runs that it goes back to.

    Raises:
        UserError: it does not go back to the sandbox's base policy.
    """
    return _origin(policy, ())


def require_finished(policy: str) -> None:
    """Refuse a run that has no policy yet.

    Raises:
        UserError: training has not come to its end.
    """
    run = RunFolder(Path(policy).expanduser())
    if not is_base(policy) and not run.model.is_dir():
        raise UserError(
            f"The run {policy} has no finished policy (its status is "
            f"{run.read_manifest().get('status', 'unknown')!r}). Finish it with `prefopt train RECIPE --resume`."
        )


def _origin(policy: str, descendants: tuple[str, ...]) -> Origin:
    if not policy:
        raise UserError(f"The policy has no name; write {BASE} or a run folder.")
    if is_base(policy):
        return Origin(names.parse_model(policy.removeprefix(PREFIX)).seed)
    run = RunFolder(Path(policy).expanduser())
    if not run.is_run():
        raise UserError(_no_run(policy, descendants))
    if policy in descendants:
        raise UserError(
            f"{policy} was trained anew since {descendants[-1]} started from it: nothing tells how."
        )
    recipe = load_recipe(run.recipe)
    started_from = recipe.model.name_or_path
    recorded = run.read_manifest().get("lineage", {}).get("origin")
    before = _origin(recorded or started_from, (*descendants, policy))
    preferences = [
        names.parse_dataset(source.source.removeprefix(PREFIX), source.config)
        for source in recipe.dataset.train
        if source.source.startswith(PREFIX)
    ]
    return Origin(before.seed, tuple(preferences), recipe, from_base=is_base(started_from))


def _no_run(policy: str, descendants: tuple[str, ...]) -> str:
    """What is wrong with a name that was typed, or with one in the recipe of a run."""
    path = Path(policy).expanduser()
    if descendants:
        return (
            f"{descendants[-1]} was trained from {policy}, which is neither {BASE} nor a run folder in "
            f"{Path.cwd()}: the sandbox judges only what goes back to its base policy."
        )
    if RunFolder(path.parent).is_run():
        return f"{policy} is a part of a run; name the run itself: {path.parent}."
    if path.exists():
        return f"{policy} is no run folder; name one that was trained from {BASE}."
    return (
        f"There is no run {policy} in {Path.cwd()}.{near_folder(path)} Name one that was trained from {BASE}."
    )
