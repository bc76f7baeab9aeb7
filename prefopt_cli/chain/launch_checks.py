"""All stages of a chain are trained by the same processes, which are started once."""

from collections.abc import Iterator

from prefopt_cli.recipe.problems import Problem, shown
from prefopt_cli.recipe.schema import Recipe


def launch_problems(before: Recipe, after: Recipe) -> Iterator[Problem]:
    """Where a stage asks for another launch than the stage before; paths are those of the later stage's data."""
    wanted, earlier = after.launch.model_dump(), before.launch.model_dump()
    for key, value in wanted.items():
        if value != earlier[key]:
            yield Problem(
                ("launch", key),
                f"{shown(value)}, but {shown(earlier[key])} for the stage before, and all stages are trained by the "
                "same processes; write launch once, beside stages",
            )
