"""Runs that a recipe or another run names, also where their folders were moved."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.runs.folder import RunFolder

DEEPEST = 4
"""How far below the given folder runs are looked for; a run's own folders are not searched."""


class RunFinder:
    """Finds runs where they were, or below a folder that the user names (`--runs-dir`).

    A run is known again by its id. Where none is known, by the name of its folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.moved: dict[str, str] = {}
        """Where runs were found that are not in their old place."""

    def find(self, place: str, run_id: str | None = None, key: str | None = None) -> RunFolder:
        """The run at `place`, or below the folder.

        Args:
            place: its folder, as it was written down.
            run_id: the run's id, where it is known.
            key: what names the run, for messages.

        Raises:
            UserError: there is none, another run lies there, or several runs could be meant.
        """
        begins = f"{key}: " if key else ""
        run = RunFolder(Path(place).expanduser())
        if run.is_run() and run_id in (None, run.read_manifest().get("run_id")):
            return run
        found = self._below(run.path.name, run_id)
        if len({each.path.resolve() for each in found}) > 1:
            places = ", ".join(str(each.path) for each in found)
            raise UserError(
                f"{begins}the run {place} is not there, and several below {self.folder} could be meant: {places}. "
                "Name one of them."
            )
        if found:
            self.moved[place] = str(found[0].path)
            return found[0]
        raise UserError(f"{begins}{self._missing(run, place, run_id)}")

    def _below(self, name: str, run_id: str | None) -> list[RunFolder]:
        if self.folder is None:
            return []
        if not self.folder.is_dir():
            raise UserError(f"--runs-dir: there is no folder {self.folder}.")
        runs = [RunFolder(path) for path in _run_folders(self.folder)]
        if run_id is None:
            return [run for run in runs if run.path.name == name]
        return [run for run in runs if _manifest(run).get("run_id") == run_id]

    def _missing(self, run: RunFolder, place: str, run_id: str | None) -> str:
        where = f"nor below {self.folder}" if self.folder else ""
        if run.is_run():
            gone = f"neither there {where}" if where else "not there"
            return (
                f"{place} holds another run than the one that is meant (run id {run_id}), which is {gone} any more. "
                "Name the folder it was moved to with --runs-dir, or train the later stages anew."
            )
        if not run.path.is_dir():
            told = f"there is no run in {place}" + (f", {where}" if where else "")
        else:
            told = f"{place} is no run folder (it has no {run.manifest.name})"
        return f"{told}. Train it first, or name the folder that it was moved to with --runs-dir."


def _run_folders(folder: Path) -> Iterator[Path]:
    for here, names, files in os.walk(folder):
        path = Path(here)
        if "manifest.json" in files:
            yield path
            names.clear()  # a run holds no runs
        elif len(path.relative_to(folder).parts) >= DEEPEST:
            names.clear()
        names[:] = sorted(name for name in names if not name.startswith("."))


def _manifest(run: RunFolder) -> dict[str, Any]:
    try:
        return run.read_manifest()
    except UserError:
        return {}  # a damaged one is not the run that is looked for
