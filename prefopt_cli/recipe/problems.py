"""Mistakes in a recipe, where they stand, and how they are told: all at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefopt_cli.errors import UserError

Path = tuple[str | int, ...]
"""A key path: ``("dataset", "train", 0, "limit")``."""


def through_align(path: Path) -> Path:
    """Of a setting of ``method.align`` the path it has where its method stands alone."""
    return ("method", *path[2:]) if path[:2] == ("method", "align") and len(path) > 2 else path


def dotted(path: Path) -> str:
    """``dataset.train.0.limit``; odd characters in a key are escaped."""
    return ".".join(part if isinstance(part, str) and part.isprintable() else repr(part) for part in path)


def shown(value: Any, limit: int = 60) -> str:
    """A value as it might stand in the file, cut to a readable length."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 4] + " ..." + text[-1]


def join_names(names: Iterable[str], word: str = "or") -> str:
    """``a, b or c``."""
    *front, last = list(names)
    return f"{', '.join(front)} {word} {last}" if front else last


def join_types(words: Iterable[str]) -> str:
    """Types in words, each once: ``true, false, a number or null``."""
    expanded = [part for word in words for part in word.replace("true or false", "true|false").split("|")]
    if "a number" in expanded:
        expanded = [word for word in expanded if word != "an integer"]
    return join_names(dict.fromkeys(expanded))


@dataclass(frozen=True)
class Problem:
    """One mistake. A problem without an explicit place is placed by its key path."""

    path: Path
    message: str
    line: int | None = None
    override: str | None = None


@dataclass
class Locations:
    """Which line of the file, or which override, each key path comes from."""

    file: str
    lines: dict[Path, int] = field(default_factory=dict)
    overrides: dict[Path, str] = field(default_factory=dict)

    def set_override(self, path: Path, override: str) -> None:
        """From now on ``path`` and all below it come from ``override``."""
        for table in (self.lines, self.overrides):
            for known in [known for known in table if known[: len(path)] == path]:
                del table[known]
        self.overrides[path] = override

    def place(self, problem: Problem) -> tuple[int, int, str]:
        """Sort key and text of a problem's place: the nearest known ancestor of its path."""
        if problem.override is not None:
            return (1, 0, f"override {problem.override!r}")
        if problem.line is not None:
            return (0, problem.line, f"{self.file}:{problem.line}")
        for length in range(len(problem.path), -1, -1):
            path = problem.path[:length]
            if length == len(problem.path) and path and (below := self._override_below(path)):
                return (1, 0, f"override {below!r}")
            if path in self.overrides:
                return (1, 0, f"override {self.overrides[path]!r}")
            if path in self.lines:
                return (0, self.lines[path], f"{self.file}:{self.lines[path]}")
        return (0, 0, self.file)

    def _override_below(self, path: Path) -> str | None:
        """The override that made a section which the file does not have."""
        if path in self.lines or path in self.overrides:
            return None
        return next((self.overrides[known] for known in self.overrides if known[: len(path)] == path), None)


def problems_error(problems: Sequence[Problem], locations: Locations) -> UserError:
    """One error that tells all mistakes, in the order of the file, overrides last."""
    placed = sorted(
        ((locations.place(problem), problem) for problem in problems), key=lambda item: item[0][:2]
    )
    lines = []
    for (_, _, place), problem in placed:
        subject = f"{dotted(problem.path)}: " if problem.path else ""
        line = f"  {place}  {subject}{problem.message}"
        if line not in lines:
            lines.append(line)
    count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    return UserError("\n".join([f"{locations.file}: {count}", *lines]))
