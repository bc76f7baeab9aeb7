"""A chain's file and the overrides of a command line -> one ``Chain``, or every mistake of every stage at once."""

import os
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from prefopt_cli.chain import checks
from prefopt_cli.chain.launch_checks import launch_problems
from prefopt_cli.chain.merging import Merged, merge
from prefopt_cli.chain.methods import fill_in
from prefopt_cli.chain.settings import Chain, ChainStage
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.files import read_recipe_text
from prefopt_cli.recipe.loader import validate
from prefopt_cli.recipe.overrides import apply_overrides
from prefopt_cli.recipe.problems import Locations, Path, Problem, problems_error, shown
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.recipe.yaml_reader import Document, parse_yaml

NOT_SHARED = {"stages", *checks.SHARED_KEYS}
"""Keys beside `stages` that no stage's recipe takes over."""

NOT_OF_A_STAGE = {*NOT_SHARED, *checks.STAGE_KEYS}
"""Keys of a stage that its recipe does not take over."""


def load_chain(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Chain:
    """Read a chain, lay ``overrides`` (``key.path=value``) over it, and check every stage.

    Nothing is downloaded and nothing heavy imported.

    Raises:
        UserError: its text tells all mistakes, each once, with file and line (or its override), key path, what was
            expected, and the nearest valid name.
    """
    name = os.fspath(path)
    document = parse_yaml(read_recipe_text(pathlib.Path(name)), name)
    if document.data is None:
        raise UserError(f"{name} is empty; `prefopt recipe show chain-sandbox` prints a chain to start from")
    if not isinstance(document.data, dict):
        raise UserError(
            f"{name}:{document.lines[()]}  a chain is a mapping of keys to values (model: ..., stages: ...), "
            f"found {shown(document.data)}"
        )
    locations = Locations(name, document.lines)
    problems = document.problems + apply_overrides(document.data, tuple(overrides), locations)
    stages = _stages(document, problems)
    if problems:
        raise problems_error(problems, locations)
    return Chain(name, document.data, document.data["output_dir"], stages)


def _stages(document: Document, problems: list[Problem]) -> tuple[ChainStage, ...]:
    """The stages; what is wrong with them is appended to ``problems``."""
    data = document.data
    problems += [*checks.shared_problems(data), *checks.start_problems(data)]
    entries = data.get("stages")
    entries = entries if isinstance(entries, list) else []
    problems += checks.dimension_problems(entries)
    dimensions = checks.dimensions_of(entries)
    stages: list[ChainStage] = []
    before: Recipe | None = None
    for index, entry in enumerate(entries):
        merged = merge(_sections(data, NOT_SHARED), _sections(entry, NOT_OF_A_STAGE), index)
        recipe = _recipe(document, merged, entry, dimensions, problems)
        if before is not None and recipe is not None:
            problems += _placed(checks.adapter_problems(before, recipe), merged, ())
            problems += _placed(launch_problems(before, recipe), merged, ())
        if recipe is not None and recipe.dimension is not None:
            stages.append(ChainStage(index + 1, recipe.dimension, recipe))
        before = recipe
    return tuple(stages)


def _sections(data: Any, without: Collection[str]) -> dict[str, Any]:
    """What a recipe takes of a mapping in the file."""
    if not isinstance(data, Mapping):
        return {}
    return {key: value for key, value in data.items() if key not in without}


def _recipe(
    document: Document,
    merged: Merged,
    entry: Any,
    dimensions: Sequence[str | None],
    problems: list[Problem],
) -> Recipe | None:
    """The stage's recipe, or None with what is wrong appended to ``problems``."""
    index, entry = merged.index, entry if isinstance(entry, dict) else {}
    told = [*checks.key_problems(entry, index), *checks.lambda_problems(entry, index, dimensions)]
    told += checks.data_problems(merged, dimensions)
    for key in entry.keys() & {problem.path[2] for problem in told if len(problem.path) == 3}:
        if key not in Recipe.model_fields:
            merged.data.pop(key, None)
    method = fill_in(merged, entry.get("lambdas"), [str(name) for name in dimensions])
    told += method.problems
    problems += told
    found: list[Problem] = []
    recipe = validate(merged.data, found, _unreadable(document, merged))
    problems += _placed(found, merged, method.place)
    return None if told else recipe


def _unreadable(document: Document, merged: Merged) -> set[Path]:
    """Paths of the stage's data about which enough is said already."""
    begins = ("stages", merged.index)
    known = {path[2:] if path[:2] == begins else path for path in document.unreadable}
    return known if _has_data(merged) else known | {("dataset",), ("dataset", "train")}


def _has_data(merged: Merged) -> bool:
    dataset = merged.data.get("dataset") or {}
    return not isinstance(dataset, dict) or dataset.get("train") is not None


def _placed(problems: Iterable[Problem], merged: Merged, method: Path) -> list[Problem]:
    """Problems of a stage's data, with the paths that they have in the file."""
    placed = []
    for problem in problems:
        path = merged.place(problem.path)
        if method and problem.path[: len(method) + 1] == (*method, "lambdas"):
            path = ("stages", merged.index, *problem.path[len(method) :])
        placed.append(Problem(path, problem.message, problem.line, problem.override))
    return placed
