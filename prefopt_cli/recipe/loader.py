"""A recipe file and the overrides of a command line -> one ``Recipe``, or every mistake at once."""

import os
import pathlib
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.checks import check_combinations
from prefopt_cli.recipe.explain import explain
from prefopt_cli.recipe.files import read_recipe_text
from prefopt_cli.recipe.overrides import apply_overrides
from prefopt_cli.recipe.problems import Locations, Path, Problem, problems_error, shown
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.recipe.yaml_reader import parse_yaml


def load_recipe(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe, lay ``overrides`` (``key.path=value``) over it, and check everything.

    The command line wins over the file, the file over the defaults; of two overrides of one key the
    later wins. Nothing is downloaded and nothing heavy imported.

    Raises UserError whose text tells all mistakes, each with file and line (or its override), key path,
    what was expected, and the nearest valid name.
    """
    name = os.fspath(path)
    document = parse_yaml(read_recipe_text(pathlib.Path(name)), name)
    if document.data is None:
        raise UserError(f"{name} is empty; `prefopt recipe new gpo` prints a recipe to start from")
    if not isinstance(document.data, dict):
        line = document.lines[()]
        raise UserError(
            f"{name}:{line}  a recipe is a mapping of keys to values (model: ..., dataset: ...), "
            f"found {shown(document.data)}"
        )
    if "stages" in document.data:
        raise UserError(
            f"{name}:{document.lines[('stages',)]}  stages make it a chain, not a recipe; run `prefopt chain {name}`, "
            f"or write a job for Slurm with `prefopt launch slurm {name}`"
        )
    locations = Locations(name, document.lines)
    problems = document.problems + apply_overrides(document.data, tuple(overrides), locations)
    return _valid(document.data, problems, document.unreadable, locations)


def make_recipe(data: dict[str, Any], overrides: Iterable[str] = (), *, name: str) -> Recipe:
    """A recipe for which there is no file, with overrides laid over it.

    Args:
        data: what its file would say; it is changed.
        overrides: `key.path=value`.
        name: what it is called in messages.

    Raises:
        UserError: as of `load_recipe`.
    """
    locations = Locations(name, {(): 1})
    return _valid(data, apply_overrides(data, tuple(overrides), locations), set(), locations)


def _valid(
    data: dict[str, Any], problems: list[Problem], unreadable: set[Path], locations: Locations
) -> Recipe:
    recipe = validate(data, problems, unreadable)
    if recipe is None:
        raise problems_error(problems, locations)
    return recipe


def validate(data: dict[str, Any], problems: list[Problem], unreadable: set[Path]) -> Recipe | None:
    """The recipe in plain data, or None with what is wrong appended to ``problems``.

    Args:
        data: what a file says.
        problems: what is known to be wrong with it already.
        unreadable: paths about which enough is said already.
    """
    recipe = None
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        problems += [problem for problem in explain(error, data) if problem.path not in unreadable]
    problems += check_combinations(data, {problem.path for problem in problems})
    return None if problems else recipe
