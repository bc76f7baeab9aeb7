"""Whether a folder could be made and written, found out early and without leaving anything behind."""

import os
import tempfile
from pathlib import Path

from prefopt_cli.errors import UserError

SHOWN = 200
"""Characters of a path in a message."""


def require_writable(folder: Path, *, key: str, choose: str = "folder") -> None:
    """Refuse a folder that could not be made or written.

    Args:
        folder: it need not be there yet.
        key: what names it, for messages.
        choose: what the user is to choose another of.

    Raises:
        UserError: a file is in the way, or the nearest existing folder cannot be written.
    """
    shown, remedy = str(folder)[:SHOWN], f"Choose another {choose}."
    try:
        existing = _nearest_existing(folder.absolute())
        if not existing.is_dir():
            raise UserError(f"{key} {shown}: {existing} is a file, not a folder. {remedy}")
        # Permissions do not tell all: file systems can be read-only or, as /proc, not real ones.
        tempfile.TemporaryDirectory(dir=existing, prefix=".prefopt-").cleanup()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{key} {shown} cannot be written ({reason}). {remedy}") from error


def _nearest_existing(path: Path) -> Path:
    """The path, or the nearest of its parents that is there (a dangling link is)."""
    while True:
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
        else:
            return path
