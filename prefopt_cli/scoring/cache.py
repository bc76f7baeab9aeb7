"""Log-probabilities of responses under frozen policies, kept on disk.

A row is addressed by what decides its value: the digest of the policy and the tokens of prompt and response. So it
does not matter which run, data set or batch a response is met in, and a row never has to be invalidated. What
cannot be kept or found again is computed again; nothing about the cache stops a run.
"""

import hashlib
import math
import sqlite3
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard, TypeVar

import numpy as np

from prefopt_cli.scoring.cache_database import suppress_held, transaction
from prefopt_cli.scoring.cache_file import CacheFile, CacheUnusable, default_file

CHUNK = 500
"""Keys asked for in one statement; SQLite takes 999 in all its versions."""

T = TypeVar("T")

_VALUE = struct.Struct("<d")
_CHECKSUM = struct.Struct("<I")


@dataclass(frozen=True)
class Policy:
    """A frozen policy as the cache knows it."""

    digest: str
    """Hexadecimal; addresses its rows (see `policy_digest`)."""
    description: str
    """For people."""


def response_key(
    prompt_ids: Sequence[int] | np.ndarray,
    response_ids: Sequence[int] | np.ndarray,
) -> bytes:
    """16 bytes that stand for a response to a prompt.

    They are the BLAKE2b digest of the number of prompt tokens and of the ids of both, so that the same tokens
    with another boundary have another key. Ids are those of one tokenizer: policies of different vocabularies
    have different digests.
    """
    digest = hashlib.blake2b(len(prompt_ids).to_bytes(8, "little"), digest_size=16)
    digest.update(np.ascontiguousarray(prompt_ids, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(response_ids, dtype="<i4").tobytes())
    return digest.digest()


def _to_standard_error(message: str) -> None:
    print(message, file=sys.stderr)


class ScoreCache:
    """The scores on disk; several processes may use them at once, each with an object of its own.

    Where the file cannot be used, one message says so and the cache is empty from then on. Use it from one thread.
    """

    def __init__(self, file: Path | None = None, report: Callable[[str], None] = _to_standard_error) -> None:
        """Nothing is opened or made before the first `read` or `write`.

        Args:
            file: the database; without it the user's own.
            report: gets one line for the user where something is wrong with the file.
        """
        self._file = CacheFile(file or default_file(), report)
        self._report = report
        self._is_usable = True

    def read(self, policy: Policy, keys: Sequence[bytes]) -> np.ndarray:
        """(n,) float64 log-probabilities in nats of n responses, by their keys; nan where one is unknown."""
        found: dict[bytes, float] = self._try(lambda database: self._read(database, policy, keys), {})
        return np.fromiter((found.get(key, math.nan) for key in keys), np.float64, len(keys))

    def write(self, policy: Policy, keys: Sequence[bytes], logps: Sequence[float] | np.ndarray) -> None:
        """Keep n log-probabilities (nats) under n keys, all of them or none; those that are not finite are left out.

        Raises:
            ValueError: there are not as many keys as log-probabilities.
        """
        values = np.asarray(logps, dtype=np.float64)
        seed = _seed(policy)
        rows = sorted(
            (key, _record(seed, key, value))
            for key, value in zip(keys, values.tolist(), strict=True)
            if math.isfinite(value)
        )
        if rows:
            self._try(lambda database: _write(database, policy, rows), None)

    def close(self) -> None:
        """Let go of the file; a later `read` or `write` opens it again."""
        with suppress(CacheUnusable):
            self._file.close()

    def __enter__(self) -> "ScoreCache":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _try(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """What the work on the file returns; when the file proves to be of no use, that is said, once."""
        if not self._is_usable:
            return otherwise
        try:
            return self._file.use(work)
        except CacheUnusable as error:
            self._is_usable = False
            self._report(f"{error} This run goes on without it.")
            self.close()
            return otherwise

    def _read(
        self, database: sqlite3.Connection, policy: Policy, keys: Sequence[bytes]
    ) -> dict[bytes, float]:
        """The sound rows; others are taken out of the file, and the policy is marked as used today."""
        seed = _seed(policy)
        found: dict[bytes, float] = {}
        damaged: list[tuple[Any, ...]] = []
        with transaction(database, "DEFERRED"):
            known = database.execute(
                "SELECT id, last_used FROM policies WHERE digest = ?", (policy.digest,)
            ).fetchone()
            if known is None:
                return found
            number, last_used = known
            for key, record in _rows(database, number, keys):
                if _is_sound(record, seed, key):
                    found[key] = _VALUE.unpack_from(record)[0]
                else:
                    damaged.append((number, key, record))
        if damaged:
            self._report(
                f"{len(damaged)} of the scores of {policy.description} in the score cache {self._file.path} were "
                "damaged; they count as unknown."
            )
        if damaged or str(last_used) < _today():
            with suppress_held(database), transaction(database):
                # Another process may have put a sound one in its place.
                database.executemany(
                    "DELETE FROM scores WHERE policy = ? AND key = ? AND record IS ?", damaged
                )
                database.execute("UPDATE policies SET last_used = ? WHERE id = ?", (_today(), number))
        return found


def _rows(database: sqlite3.Connection, policy: int, keys: Sequence[bytes]) -> Iterator[tuple[Any, Any]]:
    ordered = sorted(set(keys))
    for start in range(0, len(ordered), CHUNK):
        chunk = ordered[start : start + CHUNK]
        marks = ",".join("?" * len(chunk))
        yield from database.execute(
            f"SELECT key, record FROM scores WHERE policy = ? AND key IN ({marks})", (policy, *chunk)
        )


def _write(database: sqlite3.Connection, policy: Policy, rows: Iterable[tuple[bytes, bytes]]) -> None:
    with transaction(database):
        today = _today()
        # A path may hold what is no text.
        description = policy.description.encode("utf-8", "replace").decode("utf-8")
        known = database.execute("SELECT id FROM policies WHERE digest = ?", (policy.digest,)).fetchone()
        if known is None:
            number = database.execute(
                "INSERT INTO policies (digest, description, created, last_used) VALUES (?, ?, ?, ?)",
                (policy.digest, description, today, today),
            ).lastrowid
        else:
            (number,) = known
            database.execute(
                "UPDATE policies SET description = ?, last_used = ? WHERE id = ?",
                (description, today, number),
            )
        database.executemany(
            "INSERT OR REPLACE INTO scores (policy, key, record) VALUES (?, ?, ?)",
            ((number, key, record) for key, record in rows),
        )


def _today() -> str:
    return date.today().isoformat()


def _seed(policy: Policy) -> int:
    """Where the checksums of a policy's rows begin, so that a row under a wrong policy is noticed too."""
    return zlib.crc32(policy.digest.encode())


def _record(seed: int, key: bytes, logp: float) -> bytes:
    value = _VALUE.pack(logp)
    return value + _CHECKSUM.pack(zlib.crc32(key + value, seed))


def _is_sound(record: object, seed: int, key: object) -> TypeGuard[bytes]:
    # A flipped bit may also have changed the type.
    if not isinstance(key, bytes) or not isinstance(record, bytes):
        return False
    checksum = zlib.crc32(key + record[: _VALUE.size], seed)
    return _CHECKSUM.pack(checksum) == record[_VALUE.size :]
