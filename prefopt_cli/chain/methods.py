"""What the chain itself puts into a stage's recipe: its method, where it starts from, where its run lies."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prefopt_cli.chain.merging import Merged
from prefopt_cli.recipe.problems import Path, Problem, shown
from prefopt_cli.recipe.suggestions import nearest

FIRST, LATER = "gpo", "sequential"

BESIDE = "self_supervised"
"""Adds to the alignment loss, which stands in its `align`."""


@dataclass
class Filled:
    """What came of it."""

    place: Path
    """Where in the stage's data its alignment loss stands."""
    problems: list[Problem] = field(default_factory=list)
    """With their paths in the file."""


def fill_in(merged: Merged, lambdas: Any, dimensions: Sequence[str]) -> Filled:
    """Put into a stage's data what the chain decides.

    Args:
        merged: the stage; its data is changed.
        lambdas: as the stage has them.
        dimensions: of all stages.
    """
    data, index = merged.data, merged.index
    own = dimensions[index]
    data["dimension"] = own
    output = data.get("output_dir")
    folders = [f"{str(output).rstrip('/')}/{name}" for name in dimensions]
    if isinstance(output, str) and output:
        data["output_dir"] = folders[index]
    if index and isinstance(data.get("model"), dict):
        data["model"]["name_or_path"] = folders[index - 1]
    filled = Filled(("method",))
    _fill_method(merged, filled, folders[:index], 0.0 if lambdas is None else lambdas)
    return filled


def _fill_method(merged: Merged, filled: Filled, previous: list[str], lambdas: Any) -> None:
    data = merged.data
    settings = data["method"] = {} if data.get("method") is None else data["method"]
    if isinstance(settings, dict) and settings.get("name") == BESIDE:
        filled.place = ("method", "align")
        settings["align"] = {} if settings.get("align") is None else settings["align"]
        settings = settings["align"]
    if not isinstance(settings, dict):
        return  # which the recipe's own check says
    wanted = LATER if previous else FIRST
    problems = _name_problems(merged, filled.place, settings, wanted)
    filled.problems += problems
    if problems:  # what else stands there may be meant for another method
        settings.clear()
    filled.problems += _set_by_the_chain(merged, filled.place, settings)
    settings["name"] = wanted
    for key in ("previous", "lambdas"):
        settings.pop(key, None)
    if previous:
        settings.update(previous=previous, lambdas=lambdas)
    elif merged.place((*filled.place, "adapter_per_stage"))[:2] != ("stages", 0):
        settings.pop("adapter_per_stage", None)  # shared: it is for the later stages


def _name_problems(merged: Merged, place: Path, settings: dict[str, Any], wanted: str) -> list[Problem]:
    name, path = settings.get("name"), merged.place((*place, "name"))
    allowed = (wanted,) if path[0] == "stages" else (FIRST, LATER)
    if name is None or name in allowed:
        return []
    close = (
        nearest(name, [FIRST, LATER, *([BESIDE] if place == ("method",) else [])])
        if isinstance(name, str)
        else None
    )
    hint = f"; did you mean {close!r}?" if close and close != name else ""
    return [
        Problem(
            path,
            f"set by the chain: {FIRST} in the first stage, {LATER} in later ones"
            + (f" (or {BESIDE} with these in its align)" if place == ("method",) else "")
            + f"; found {shown(name)}, leave it out{hint}",
        )
    ]


def _set_by_the_chain(merged: Merged, place: Path, settings: dict[str, Any]) -> list[Problem]:
    reasons = {
        "previous": "set by the chain: the stages before, in their order",
        "lambdas": "stands beside the stage's dimension: write stages.1.lambdas",
    }
    return [
        Problem(merged.place((*place, key)), reason) for key, reason in reasons.items() if key in settings
    ]
