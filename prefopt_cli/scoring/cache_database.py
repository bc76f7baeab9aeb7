"""The database of the score cache: its tables, its ways of failing, and how it is opened and changed."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

VERSION = 1
"""Of the tables below; a file of a higher one is left alone."""

TABLES = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS policies (
    id INTEGER PRIMARY KEY, digest TEXT NOT NULL, description TEXT NOT NULL,
    created TEXT NOT NULL, last_used TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS scores (
    policy INTEGER NOT NULL, key BLOB NOT NULL, record BLOB NOT NULL, PRIMARY KEY (policy, key)
) WITHOUT ROWID;
PRAGMA user_version = {VERSION};
COMMIT;
"""
"""Days are ISO dates. Digests are few and have no index, which might come to disagree with the table. A record is a
log-probability (float64) and a checksum; see `scoring.cache`."""

WAIT = 60.0
"""Seconds to wait for other processes before the cache counts as out of use."""

NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gpfs", "beegfs", "glusterfs",
}  # fmt: skip
"""File systems that machines share; a write-ahead log needs memory that all users of the file share."""

DAMAGE = {
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
    sqlite3.SQLITE_ERROR,  # a table is missing
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_FORMAT,
}
HELD = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL}
_NO_SHARED_MEMORY = {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY}
FAILURES = (sqlite3.Error, UnicodeDecodeError)
"""What working on the database may raise; the latter where SQLite's message quotes a damaged text."""


def is_damage(error: Exception) -> bool:
    """Whether the error speaks of the file's content, not of the disk or of other processes."""
    return isinstance(error, UnicodeDecodeError) or error_code(error) in DAMAGE


def error_code(error: Exception) -> int:
    """SQLite's own code, without its finer distinctions; 0 where it is not SQLite's."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def open_database(path: Path) -> sqlite3.Connection:
    """A connection to a file that has our tables; the file is made where there is none.

    It has a write-ahead log where there can be one: with it, readers wait for no writer.

    Raises:
        NotImplementedError: a newer version of prefopt made the file.
    """
    if not _on_network(path):
        try:
            return _prepared(path, "WAL")
        except sqlite3.OperationalError as error:
            if error_code(error) not in _NO_SHARED_MEMORY:
                raise
    _prepared(path, "DELETE").close()
    return connect(path)


def _prepared(path: Path, journal: str) -> sqlite3.Connection:
    # Who has the file alone needs no shared memory to give up a write-ahead log.
    connection = connect(path, locking="NORMAL" if journal == "WAL" else "EXCLUSIVE")
    try:
        is_new = connection.execute("PRAGMA user_version").fetchone()[0] < VERSION
        if is_new or journal != "WAL":
            connection.execute(f"PRAGMA journal_mode = {journal}")
        if is_new:
            connection.executescript(TABLES)
        return connection
    except BaseException:
        connection.close()
        raise


def connect(path: Path, *, locking: str = "NORMAL") -> sqlite3.Connection:
    """A connection that commits by itself outside of `transaction`.

    Raises:
        NotImplementedError: a newer version of prefopt made the file.
    """
    connection = sqlite3.connect(path, timeout=WAIT, isolation_level=None)
    try:
        # Whatever a flipped bit has made of a description, it can be read.
        connection.text_factory = lambda text: text.decode("utf-8", "replace")
        connection.execute(f"PRAGMA locking_mode = {locking}")
        # What a power cut may take away can be computed again.
        connection.execute("PRAGMA synchronous = NORMAL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > VERSION:
            raise NotImplementedError(f"a newer version of prefopt made it (format {version})")
        return connection
    except BaseException:
        connection.close()
        raise


@contextmanager
def transaction(database: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    """All that the block does, or none of it; IMMEDIATE waits for other writers at the start."""
    database.execute(f"BEGIN {kind}")
    try:
        yield
        database.execute("COMMIT")
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


@contextmanager
def suppress_held(database: sqlite3.Connection) -> Iterator[None]:
    """For small changes that can wait for another time: when the file is held or the disk is full, leave them."""
    (patience,) = database.execute("PRAGMA busy_timeout").fetchone()
    database.execute("PRAGMA busy_timeout = 50")
    try:
        yield
    except sqlite3.OperationalError as error:
        if is_damage(error):
            raise
    finally:
        database.execute(f"PRAGMA busy_timeout = {patience}")


def mounts() -> Iterator[tuple[str, str]]:
    """(mount point, kind of file system), where Linux tells; nothing elsewhere."""
    with suppress(OSError):
        for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            point, kind = line.split()[1:3]
            yield point.replace("\\040", " "), kind


def _on_network(path: Path) -> bool:
    """Whether the file is known to lie on a file system of several machines."""
    resolved = path.resolve()
    holding = [(len(point), kind) for point, kind in mounts() if resolved.is_relative_to(point)]
    kind = max(holding, default=(0, ""), key=lambda each: each[0])[1]
    return kind in NETWORK or kind.startswith("fuse.")
