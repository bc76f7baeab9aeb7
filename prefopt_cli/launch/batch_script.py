"""Pieces of scripts that start a recipe on machines elsewhere: words, names, files."""

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.launch_settings import LaunchSettings
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.runs import atomic

LONGEST_NAME = 40
HOME = re.compile(r"~([A-Za-z0-9._-]*)(?:/|$)")


@dataclass(frozen=True)
class Work:
    """What a script does: it trains a recipe, or a chain of them."""

    path: str
    """Of the file, as on a command line in the present folder."""
    overrides: Sequence[str]
    launch: LaunchSettings
    output_dir: str
    content: Any
    """What file and overrides make together, in plain data."""
    command: str = "train"
    """prefopt's."""
    record: str = "manifest.json"
    """The file in output_dir that is there once the work has begun."""
    going_on: Sequence[str] = ("--resume",)
    """Options with which begun work is gone on with."""


def training(recipe_path: str, overrides: Sequence[str], recipe: Recipe) -> Work:
    """`prefopt train` as a script's work."""
    content = recipe.model_dump(mode="json")
    return Work(recipe_path, overrides, recipe.launch, recipe.output_dir, content)


def words(arguments: Iterable[str]) -> str:
    """Arguments as a shell reads them again, whatever is in them."""
    return " ".join(map(shlex.quote, arguments))


def job_name(recipe_path: str) -> str:
    """The recipe's file name, as far as schedulers take it for a name."""
    name = re.sub(r"[^A-Za-z0-9-]+", "-", Path(recipe_path).stem).strip("-")[:LONGEST_NAME].strip("-")
    return name if name[:1].isalpha() else f"prefopt-{name}".strip("-")


def alone(recipe: Recipe | Work, nodes: int) -> list[str]:
    """Overrides for one machine, where the recipe says that there are several."""
    return ["launch.machines=1", "launch.machine_rank=0"] if nodes == 1 < recipe.launch.machines else []


def run_manifest(recipe: Recipe) -> str:
    """The file that is there once the recipe's run has begun, as a word of the shell's."""
    return in_folder(recipe.output_dir, "manifest.json")


def in_folder(folder: str, name: str) -> str:
    """A file's path as a word of the shell's.

    A ~ is left to the machine on which the script runs: the home there is another than here.
    """
    path = str(Path(folder) / name)
    home = HOME.match(path)
    if home is None:
        return shlex.quote(path)
    return (f"~{home[1]}/" if home[1] else '"$HOME"/') + shlex.quote(path[home.end() :])


def require_one_line(option: str, value: str) -> None:
    """Refuse what would end a line of a script.

    Raises:
        UserError: the value is empty or holds control characters.
    """
    if not value.strip() or not value.isprintable():
        raise UserError(f"{option}: expected one line of text, found {value!r}.")


def write_script(text: str, output: Path, *, overwrite: bool) -> None:
    """Write a script to a new file.

    Raises:
        UserError: the file is there already (and `overwrite` is false), or cannot be written.
    """
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists and is not overwritten; choose another name, or add --overwrite.")
    try:
        atomic.write_text(output, text)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}.") from error
