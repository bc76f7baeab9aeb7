"""The file behind the score cache: an SQLite database that several processes use at once.

It may lie on any disk, be damaged, be full or be held by somebody, and none of this may stop a run. Whoever
notices that it is damaged renames it and goes on with an empty one. A lock beside it keeps others from opening
it in that moment: SQLite finds the write-ahead log by its name, and a log of one file must not meet the other.
"""

import errno
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from prefopt_cli.errors import PrefoptError
from prefopt_cli.runs import cache
from prefopt_cli.scoring.cache_database import (
    FAILURES,
    HELD,
    WAIT,
    connect,
    error_code,
    is_damage,
    open_database,
)

BESIDE = ("-wal", "-shm", "-journal")
"""Endings of the files that SQLite keeps beside a database."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

T = TypeVar("T")


class CacheUnusable(PrefoptError):
    """The score cache cannot be read or written; the message says why, where, and what to do."""


def default_file() -> Path:
    """Where the user's scores lie; it may not exist yet."""
    return cache.cache_folder() / "scores" / "scores.sqlite"


def set_aside_files(file: Path) -> list[Path]:
    """Damaged files that were renamed, the parts beside them included."""
    return sorted(file.parent.glob(f"{file.name}.damaged-*"))


class CacheFile:
    """An open connection to the file, made when it is first needed and anew when the file was replaced."""

    def __init__(self, path: Path, report: Callable[[str], None]) -> None:
        self.path = path
        self._report = report
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None

    def use(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What `work` returns; it is done once more, on an empty file, where the file turns out to be damaged.

        Raises:
            CacheUnusable: the disk, the permissions, another process or a newer version are in the way.
        """
        with self._explained():
            try:
                return work(self._current())
            except FAILURES as error:
                if not is_damage(error):
                    raise
                damaged = self._opened
                self.close()
                with self._alone():
                    self._set_aside(damaged)
                return work(self._current())

    def look(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """As `use`, of a file that is there, for those who only read: a damaged file is left as it is.

        Raises:
            CacheUnusable: as in `use`, or the file is damaged.
        """
        with self._explained(), self._alone():
            self._connection = connect(self.path)
            return work(self._connection)

    def close(self) -> None:
        """Let go of the file; the next use opens it again."""
        connection, self._connection, self._opened = self._connection, None, None
        if connection is not None:
            with self._explained(), self._alone():
                connection.close()

    def _current(self) -> sqlite3.Connection:
        if self._connection is not None and self._opened != _identity(self.path):
            self.close()  # another process has set the file aside, or somebody has deleted it
        if self._connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._alone():
                self._connection = self._open()
                self._opened = _identity(self.path)
        return self._connection

    def _open(self) -> sqlite3.Connection:
        try:
            return open_database(self.path)
        except FAILURES as error:
            if not is_damage(error):
                raise
            self._set_aside(_identity(self.path))
            return open_database(self.path)

    def _set_aside(self, damaged: tuple[int, int] | None) -> None:
        """Rename the damaged file and what lies beside it, unless another process already has."""
        if damaged is None or _identity(self.path) != damaged:
            return
        new = self.path.with_name(f"{self.path.name}.damaged-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}")
        # The file itself goes last: an old log must not lie beside a new file.
        for ending in (*BESIDE, ""):
            part = self.path.with_name(self.path.name + ending)
            if part.exists():
                part.rename(new.with_name(new.name + ending))
        self._report(
            f"The score cache {self.path} was damaged. It is now {new.name}, and a new one is filled; "
            "`prefopt cache prune` removes the damaged one."
        )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        lock = FileLock(f"{self.path}.lock")
        lock.acquire(timeout=WAIT)
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (*FAILURES, OSError, NotImplementedError) as error:
            raise CacheUnusable(
                f"The score cache {self.path} cannot be used: {_reason(error)}, or set {cache.VARIABLE} to another "
                "folder."
            ) from error


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file lies there now."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _reason(error: Exception) -> str:
    """Why, and the first half of what to do about it."""
    code = error_code(error)
    if isinstance(error, Timeout) or code in HELD:
        return f"another process has held it for {WAIT:.0f} seconds. Wait for that to end"
    if code == sqlite3.SQLITE_FULL or (isinstance(error, OSError) and error.errno in _NO_ROOM):
        return "the disk is full. Make room there"
    if is_damage(error):
        return "it is damaged. Remove it"
    if isinstance(error, NotImplementedError):
        return f"{error}. Use that version"
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror} ({error.filename}). See that its folder can be written"
    return f"{error}. See that its folder can be written"
