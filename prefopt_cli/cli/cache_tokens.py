"""The tokenised sets in the cache, as files: the room that writes them is heavy to import."""

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from prefopt_cli.errors import PrefoptError
from prefopt_cli.runs.cache import cache_folder


@dataclass(frozen=True)
class KeptTokens:
    """Files of tokenised sets, with what writers that were stopped have left."""

    folder: Path
    files: dict[Path, os.stat_result]

    @property
    def sets(self) -> list[Path]:
        return [file for file in self.files if file.suffix == ".arrow"]

    @property
    def bytes(self) -> int:
        return sum(found.st_size for found in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"folder": str(self.folder), "bytes": self.bytes, "sets": len(self.sets)}

    def unused_for(self, days: int | None) -> "KeptTokens":
        """Those that no run has used for so many days: all for 0, none for None."""
        if days is None:
            return replace(self, files={})
        latest = date.today() - timedelta(days=days)
        old = {
            file: found
            for file, found in self.files.items()
            if days == 0 or date.fromtimestamp(found.st_mtime) <= latest
        }
        return replace(self, files=old)

    def remove(self) -> None:
        """Delete the files.

        Raises:
            PrefoptError: one of them cannot be deleted.
        """
        for file in self.files:
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise PrefoptError(f"{file} cannot be removed: {error.strerror or error}.") from error


def kept_tokens() -> KeptTokens:
    """Look at the folder."""
    folder = cache_folder() / "tokens"
    files = {}
    for file in folder.glob("*"):
        with suppress(FileNotFoundError):  # a run has just renamed it
            files[file] = file.stat()
    return KeptTokens(folder, files)
