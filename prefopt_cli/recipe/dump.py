"""A recipe -> YAML that reads back to an equal recipe; and how two recipes differ."""

from collections.abc import Iterator
from typing import Any

import yaml

from prefopt_cli.recipe.launch_settings import given
from prefopt_cli.recipe.problems import Path, dotted
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.recipe.yaml_loader import RecipeYamlLoader

_STRING = "tag:yaml.org,2002:str"


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or our YAML 1.2 reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_READER = RecipeYamlLoader("")


def _represent_string(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = _READER.resolve(yaml.ScalarNode, text, (True, False)) == _STRING
    return dumper.represent_scalar(_STRING, text, style=None if plain else "'")


_Dumper.add_representer(str, _represent_string)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, defaults included; ``load_recipe`` reads an equal recipe from it.

    Of ``launch`` it holds what was given: beside ``launch.config``, a default that is written down wins over the file.
    """
    launch = recipe.launch.model_dump(include=set(given(recipe.launch)))
    return dump_data({**recipe.model_dump(), "launch": launch})


def dump_data(data: Any) -> str:
    """Plain data as YAML that our reader reads back to equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def diff_recipes(a: Recipe, b: Recipe) -> list[str]:
    """The dotted key paths at which two recipes differ, sorted."""
    return sorted(dotted(path) for path in _differences(a.model_dump(), b.model_dump(), ()))


def _differences(a: Any, b: Any, path: Path) -> Iterator[Path]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            if key in a and key in b:
                yield from _differences(a[key], b[key], (*path, key))
            else:
                yield (*path, key)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            yield from _differences(left, right, (*path, index))
    elif a != b:
        yield path
