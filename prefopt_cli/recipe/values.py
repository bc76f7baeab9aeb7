"""The plain data of a recipe as the checks of combinations read it."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prefopt_cli.recipe.problems import Path, Problem
from prefopt_cli.recipe.training_fields import MISSING, training_fields


class Settings:
    """Values of a recipe by key path: as written if sound, else the default."""

    def __init__(self, data: Any, mistaken: Iterable[Path]) -> None:
        self._data = data
        self._mistaken = set(mistaken)

    def get(self, *path: str | int) -> Any:
        """The value at ``path``, or None."""
        value = self._data
        for depth, key in enumerate(path, start=1):
            listed = isinstance(value, list) and isinstance(key, int) and key < len(value)
            if not (listed or (isinstance(value, dict) and key in value)) or path[:depth] in self._mistaken:
                return None
            value = value[key]
        return value

    def training(self, name: str) -> Any:
        """A training field, with its default where it is not given."""
        value = self.get("training", name)
        if value is None and name == "eval_strategy":
            return "epoch" if self.has_eval_sets() else "no"  # prefopt's own default
        if value is None and name in training_fields() and training_fields()[name].default is not MISSING:
            return training_fields()[name].default
        return value

    def mistaken(self, *path: str | int) -> bool:
        """Whether a mistake was told at just this path."""
        return path in self._mistaken

    def alignment(self) -> Path:
        """Where the settings of the alignment loss stand: under method, or under its align."""
        return ("method", "align") if self.get("method", "name") == "self_supervised" else ("method",)

    def eval_sets(self) -> list[str]:
        """Names of the eval sets, the held-out share among them."""
        named = self.get("dataset", "eval")
        holdout = ["holdout"] if self.get("dataset", "holdout") is not None else []
        return [*(named if isinstance(named, dict) else ()), *holdout]

    def sources(self) -> Iterator[Path]:
        """Where the sources stand, each a mapping or its name alone."""
        named = self.get("dataset", "eval")
        sets: list[Path] = [("dataset", "train")]
        sets += [("dataset", "eval", name) for name in (named if isinstance(named, dict) else ())]
        prompts: Path = (*self.alignment(), "regularizer", "prompts")
        sets += [prompts] if self.get(*prompts) is not None else []
        for path in sets:
            value = self.get(*path)
            yield from [(*path, entry) for entry in range(len(value))] if isinstance(value, list) else [path]

    def has_eval_sets(self) -> bool:
        """Whether there is anything to evaluate on; a mistaken section gets the benefit of the doubt."""
        unsure = any(path[:1] in ((), ("dataset",)) for path in self._mistaken)
        return bool(unsure or self.eval_sets())


Check = Callable[[Settings], Iterator[Problem]]
