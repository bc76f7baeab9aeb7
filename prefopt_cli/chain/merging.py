"""The data of one stage: the chain's shared sections with the stage's own laid over them."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefopt_cli.recipe.problems import Path


@dataclass(frozen=True)
class Merged:
    """A stage's data, and where in the file each part of it stands."""

    index: int
    """Of the stage, from 0."""
    data: dict[str, Any]
    """A recipe's sections; this stage's alone, free to be changed."""
    own: frozenset[Path]
    """Where the stage's own values begin; all else is shared."""

    def place(self, path: Path) -> Path:
        """The path in the chain's file of what has this path in the stage's data."""
        for length in range(1, len(path) + 1):
            if path[:length] in self.own:
                return ("stages", self.index, *path)
        return path


def merge(shared: Mapping[str, Any], stage: Mapping[str, Any], index: int) -> Merged:
    """Lay a stage's sections over the shared ones: mappings are merged, everything else is replaced.

    Args:
        shared: the sections that all stages have.
        stage: the sections of this stage.
        index: of the stage, from 0.
    """
    own: set[Path] = set()
    data = _merged(shared, stage, (), own)
    return Merged(index, copy.deepcopy(data), frozenset(own))


def _merged(below: Mapping[str, Any], above: Mapping[str, Any], at: Path, own: set[Path]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = below.get(key)
        if isinstance(under, Mapping) and isinstance(value, Mapping):
            merged[key] = _merged(under, value, (*at, key), own)
        else:
            merged[key] = value
            own.add((*at, key))
    return merged
