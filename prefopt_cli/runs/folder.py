"""The run folder: what one training run leaves behind.

::

    recipe.yaml   manifest.json   metrics.jsonl   samples.jsonl   checkpoints/   model/   eval/<name>/
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prefopt_cli.errors import UserError
from prefopt_cli.runs import atomic
from prefopt_cli.runs.writable import require_writable

CHECKPOINT_MARK = "prefopt.json"
"""Written into a checkpoint once all of it is on disk; a checkpoint without it is not resumed from."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and the few questions asked of them."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def evaluation(self, name: str) -> Path:
        """The folder of one evaluation."""
        return self.path / "eval" / name

    def is_run(self) -> bool:
        """Whether the folder is one that `prefopt train` made."""
        return self.manifest.is_file()

    def read_manifest(self) -> dict[str, Any]:
        """The manifest as it stands.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            manifest = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.manifest} cannot be read as a run's manifest: {error}") from error
        if not isinstance(manifest, dict):
            raise UserError(f"{self.manifest} is not a run's manifest (it holds no mapping).")
        return manifest

    def update_manifest(self, **changes: Any) -> None:
        """Set top-level entries of the manifest, atomically; None removes one."""
        changed = {**self.read_manifest(), **changes}
        atomic.write_json(
            self.manifest, {name: value for name, value in changed.items() if value is not None}
        )

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        complete = [
            (int(folder.name.removeprefix("checkpoint-")), folder)
            for folder in self.checkpoints.glob("checkpoint-*")
            if folder.name.removeprefix("checkpoint-").isdigit() and (folder / CHECKPOINT_MARK).is_file()
        ]
        return max(complete)[1] if complete else None

    def require_writable(self) -> None:
        """Fail early where the folder could not be made, without leaving anything behind.

        Raises:
            UserError: a file is in the way, or the nearest existing folder cannot be written.
        """
        require_writable(self.path, key="output_dir", choose="output_dir")

    def require_free(self, *, overwrite: bool) -> None:
        """Refuse to write over anything that is already there.

        Raises:
            UserError: the folder holds something; with `overwrite`, something that is not a run.
        """
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return
        if not self.is_run():
            raise UserError(
                f"output_dir {self.path} exists and is not a run folder, so it is never deleted. "
                "Choose another output_dir."
            )
        if not overwrite:
            raise UserError(
                f"output_dir {self.path} already holds a run. Continue it with --resume, replace it with "
                "--overwrite, or choose another output_dir."
            )

    def create(self, manifest: dict[str, Any], recipe: str, *, overwrite: bool = False) -> None:
        """Make the folder with its manifest and recipe in one go; with `overwrite`, in place of the run there.

        Raises:
            UserError: see `require_free`.
            OSError: the disk is full; what was there before still is.
        """
        self.require_free(overwrite=overwrite)
        with atomic.folder(self.path.resolve()) as made:
            (made / self.checkpoints.name).mkdir()
            atomic.write_text(made / self.recipe.name, recipe)
            atomic.write_json(made / self.manifest.name, manifest)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from making or changing the run within the block; a killed process lets go.

        The lock lies beside the folder, because the folder itself may be replaced.

        Raises:
            UserError: another process is at it.
        """
        path = self.path.resolve()  # a link to a larger disk stays one
        beside = path.with_name(f".{path.name}.lock")
        beside.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(beside)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"Another process is training in {self.path}. Wait for it, stop it, or choose another output_dir."
            ) from error
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)
            lock.release()
