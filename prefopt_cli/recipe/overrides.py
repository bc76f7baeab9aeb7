"""``key.path=value`` from the command line, laid over the data of the file."""

import re
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.problems import Locations, Path, Problem, dotted, shown
from prefopt_cli.recipe.yaml_reader import parse_yaml


class _OverrideError(Exception):
    """The override cannot be laid over the data; the text says why."""


def apply_overrides(data: dict[str, Any], overrides: tuple[str, ...], locations: Locations) -> list[Problem]:
    """Set each override in ``data``, in order, so that a later one wins.

    A value is YAML, and replaces what was there, a mapping too. Mappings on the way that do not exist
    are made. Returns the overrides that make no sense, as problems.
    """
    problems = []
    for override in overrides:
        try:
            path, value = _parse(override)
            place = _set(data, path, value)
        except _OverrideError as error:
            problems.append(Problem((), str(error), override=override))
        else:
            locations.set_override(place, override)
    return problems


def _parse(override: str) -> tuple[Path, Any]:
    key, equals, text = override.partition("=")
    if not equals:
        raise _OverrideError("expected key.path=value, for example method.beta=0.05")
    parts = re.sub(r"\[(-?\d+)\]", r".\1", key.strip()).split(".")
    if not all(parts):
        raise _OverrideError(f"the key {shown(key)} has an empty part; expected key.path=value")
    try:
        document = parse_yaml(text, "value")
    except UserError as error:
        raise _OverrideError(f"the value is not YAML: {str(error).removeprefix('value:')}") from None
    if document.problems:
        raise _OverrideError(f"the value is not valid: {document.problems[0].message}")
    return tuple(int(part) if re.fullmatch(r"-?\d+", part) else part for part in parts), document.data


def _set(data: dict[str, Any], path: Path, value: Any) -> Path:
    """Put ``value`` at ``path``; returns the path at which it lies in the data."""
    parent: Any = data
    place: Path = ()
    for depth, step in enumerate(path):
        if step == 0 and _is_source(place) and isinstance(parent, dict):
            continue  # a lone source written without a list is its own first entry
        step = _check_step(parent, step, path[:depth])
        if depth == len(path) - 1:
            parent[step] = value
            return (*place, step)
        parent, place = _enter(parent, step, place, path[depth:]), (*place, step)
    raise _OverrideError(f"{dotted(path)} names the one source; set a key of it, as {dotted(path)}.limit")


def _check_step(parent: Any, step: str | int, at: Path) -> str | int:
    if isinstance(parent, dict):
        return str(step)
    entries = f"{dotted(at)} is a list of {len(parent)}"
    if not isinstance(step, int):
        raise _OverrideError(f"{entries}; say which entry, as {dotted(at)}.0.{step}")
    if not 0 <= step < len(parent):
        raise _OverrideError(f"{entries}; there is no entry {step}, they count from 0")
    return step


def _enter(parent: Any, step: str | int, place: Path, rest: Path) -> Any:
    """The container at ``parent[step]``, made where there is none."""
    child = parent.get(step) if isinstance(parent, dict) else parent[step]
    here = (*place, step)
    if child is None:
        child = parent[step] = {}
    elif isinstance(child, str) and (_is_source(here) or _is_source(place)):
        child = parent[step] = {"source": child}
    elif not isinstance(child, dict | list):
        raise _OverrideError(f"{dotted(here)} is {shown(child)}, not a mapping; {_replacement(here, rest)}")
    return child


def _is_source(path: Path) -> bool:
    """Whether sources stand here: a list of them, or one without the list."""
    return path == ("dataset", "train") or (len(path) == 3 and path[:2] == ("dataset", "eval"))


def _replacement(here: Path, rest: Path) -> str:
    inner = ".".join(str(part) for part in rest[1:])
    if here == ("adapter",):
        return f"replace it as a whole: adapter={{type: lora, {inner}: ...}}"
    if len(here) == 1:
        return f"replace it as a whole: {dotted(here)}={{{inner}: ...}}"
    return f"it takes one value: {dotted(here)}=..."
