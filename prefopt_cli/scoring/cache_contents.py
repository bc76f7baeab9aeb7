"""What lies in the score cache, and removing some of it."""

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.scoring.cache_database import transaction
from prefopt_cli.scoring.cache_file import (
    BESIDE,
    CacheFile,
    CacheUnusable,
    default_file,
    set_aside_files,
)

SHORT = 12
"""Digits of a digest that are shown; as a prefix they tell policies apart."""


@dataclass(frozen=True)
class KeptPolicy:
    """A policy and how many of its scores are kept."""

    number: int
    digest: str
    description: str
    created: str
    """Day of its first score, as an ISO date."""
    last_used: str
    """Last day on which its scores were read or written, as an ISO date."""
    responses: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in asdict(self).items() if name != "number"}


@dataclass(frozen=True)
class Contents:
    """The score cache as it is."""

    file: Path
    bytes: int
    """On disk, the files beside the database and those that were set aside included."""
    set_aside: list[Path]
    policies: list[KeptPolicy]
    """Those used last come first."""
    problem: str | None = None
    """Why the file cannot be read, if it cannot."""


@dataclass(frozen=True)
class Pruned:
    """What was removed, or would be."""

    policies: list[KeptPolicy]
    set_aside: list[Path]
    bytes: int
    """Returned to the disk; an estimate where nothing was removed."""


@dataclass(frozen=True)
class Choice:
    """Which policies' scores to remove: those unused for some days, or those of one policy."""

    unused_for: int | None = None
    """Days; 0 means every policy."""
    prefix: str | None = None
    """The first digits of a digest."""

    def among(self, policies: Sequence[KeptPolicy]) -> list[KeptPolicy]:
        """The chosen ones.

        Raises:
            UserError: no digest begins with the prefix, or several do.
        """
        if self.prefix is None:
            latest = (date.today() - timedelta(days=self.unused_for or 0)).isoformat()
            return [each for each in policies if self.unused_for == 0 or each.last_used <= latest]
        chosen = [each for each in policies if each.digest.startswith(self.prefix.lower())]
        if len(chosen) == 1 and self.prefix:
            return chosen
        found = f"{len(chosen)} policies" if chosen else "no policy"
        raise UserError(
            f"--policy {self.prefix}: the digest of {found} in the score cache begins so. "
            "`prefopt cache info` lists them."
        )


def describe(file: Path | None = None) -> Contents:
    """Look at the cache without changing anything."""
    path = file or default_file()
    policies: list[KeptPolicy] = []
    problem = None
    if path.exists():
        cache = CacheFile(path, _no_report)
        try:
            policies = cache.look(_policies)
            cache.close()
        except CacheUnusable as error:
            problem = str(error)
    return Contents(path, _size(path), set_aside_files(path), policies, problem)


def prune(
    choice: Choice, report: Callable[[str], None], *, dry_run: bool = False, file: Path | None = None
) -> Pruned:
    """Remove the chosen policies' scores and the damaged files that were set aside; give the space back.

    With `dry_run`, only say what would go.

    Raises:
        UserError: the choice names no policy, or several.
        CacheUnusable: another process holds the file, the disk is full, and the like.
        PrefoptError: the scores are removed, but another process holds on to the space.
    """
    path = file or default_file()
    if dry_run:
        return _foreseen(choice, path)
    before, chosen = _size(path), []
    if path.exists():
        cache = CacheFile(path, report)
        try:
            chosen = cache.use(lambda database: _remove(database, choice))
            has_returned = cache.use(_shrink)
        finally:
            cache.close()
        if not has_returned:
            raise PrefoptError(
                f"{_responses(chosen):,} responses are removed, but another process is reading {path}, so their "
                "space is not free yet. Run `prefopt cache prune` again when it has ended."
            )
    else:
        choice.among([])
    aside = set_aside_files(path)
    for each in aside:
        _delete(each)
    return Pruned(chosen, aside, max(before - _size(path), 0))


def _foreseen(choice: Choice, path: Path) -> Pruned:
    contents = describe(path)
    if contents.problem:
        raise CacheUnusable(contents.problem)
    chosen = choice.among(contents.policies)
    aside = sum(each.stat().st_size for each in contents.set_aside)
    share = _responses(chosen) / max(_responses(contents.policies), 1)
    return Pruned(chosen, contents.set_aside, aside + round((contents.bytes - aside) * share))


def _responses(policies: Sequence[KeptPolicy]) -> int:
    return sum(each.responses for each in policies)


def _policies(database: sqlite3.Connection) -> list[KeptPolicy]:
    if not database.execute("PRAGMA user_version").fetchone()[0]:
        return []  # somebody has just begun to make it
    rows = database.execute(
        "SELECT id, digest, description, created, last_used, "
        "(SELECT COUNT(*) FROM scores WHERE policy = policies.id) FROM policies ORDER BY last_used DESC, id DESC"
    )
    # A flipped bit may have made a number of a text.
    return [
        KeptPolicy(number, str(digest), str(description), str(created), str(last_used), responses)
        for number, digest, description, created, last_used, responses in rows
    ]


def _remove(database: sqlite3.Connection, choice: Choice) -> list[KeptPolicy]:
    with transaction(database):
        policies = _policies(database)
        chosen = choice.among(policies)
        if len(chosen) == len(policies):
            # Without a condition the pages are let go unread, for which there is room on a full disk too.
            database.execute("DELETE FROM scores")
            database.execute("DELETE FROM policies")
            return chosen
        database.executemany("DELETE FROM policies WHERE id = ?", [(each.number,) for each in chosen])
        database.execute("DELETE FROM scores WHERE policy NOT IN (SELECT id FROM policies)")
        return chosen


def _shrink(database: sqlite3.Connection) -> bool:
    """Give free pages back to the disk; whether no reader stood in the way."""
    if database.execute("PRAGMA freelist_count").fetchone()[0]:
        database.execute("VACUUM")
    is_held, *_ = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not is_held


def _size(path: Path) -> int:
    parts = [path, *(path.with_name(path.name + ending) for ending in BESIDE), *set_aside_files(path)]
    return sum(part.stat().st_size for part in parts if part.is_file())


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise PrefoptError(
            f"The damaged file {path} cannot be removed: {error.strerror or error}."
        ) from error


def _no_report(message: str) -> None:
    """Looking changes nothing, so there is nothing to report."""
