"""The score cache gives back what it was given, whatever happens to its file and whoever else uses it."""

import hashlib
import math
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from prefopt_cli.scoring import cache_database, cache_file
from prefopt_cli.scoring.cache import Policy, ScoreCache, response_key

POLICY = Policy("ab" * 16, "the base")
OTHER = Policy("cd" * 16, "another")
MANY = 20_000
SPAWN = multiprocessing.get_context("spawn")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "scores" / "scores.sqlite"


@pytest.fixture
def messages() -> list[str]:
    return []


def keys(count: int, begin: int = 0) -> list[bytes]:
    return [response_key([number], [1, 2]) for number in range(begin, begin + count)]


def fill(file: Path, count: int = MANY) -> tuple[list[bytes], np.ndarray]:
    """A closed file with so many scores."""
    logps = -np.random.default_rng(0).exponential(50.0, count)
    with ScoreCache(file) as cache:
        cache.write(POLICY, keys(count), logps)
    assert not Path(f"{file}-wal").exists()
    return keys(count), logps


def set_aside(file: Path) -> list[Path]:
    return [path for path in cache_file.set_aside_files(file) if not path.name.endswith(("-wal", "-shm"))]


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Bit by bit; nan is nan."""
    return found.dtype == np.float64 and np.array_equal(found, expected, equal_nan=True)


# What is kept


def test_key_by_hand() -> None:
    plain = (2).to_bytes(8, "little") + b"".join(token.to_bytes(4, "little") for token in (5, 70_000, 9))
    assert response_key([5, 70_000], [9]) == hashlib.blake2b(plain, digest_size=16).digest()
    assert response_key(np.array([5, 70_000]), np.array([9], dtype=np.int16)) == response_key(
        [5, 70_000], [9]
    )


def test_key_knows_the_boundary() -> None:
    splits = [([], [1, 2, 3]), ([1], [2, 3]), ([1, 2], [3]), ([1, 2, 3], [])]
    assert len({response_key(*split) for split in splits}) == 4


def test_values_come_back_bit_by_bit(file: Path) -> None:
    values = np.array([-1.5, -0.1, -1e-300, 0.0, -7.0, -123.456789012345678])
    with ScoreCache(file) as cache:
        cache.write(POLICY, keys(6), values)
        order = [keys(6)[number] for number in (5, 0, 0, 3)]
        assert same(cache.read(POLICY, [*order, keys(1, 99)[0]]), np.append(values[[5, 0, 0, 3]], math.nan))
        assert cache.read(POLICY, []).shape == (0,)
    with ScoreCache(file) as cache:
        assert same(cache.read(POLICY, keys(6)), values)
        assert np.isnan(cache.read(OTHER, keys(6))).all()


def test_later_value_replaces_the_earlier(file: Path) -> None:
    with ScoreCache(file) as cache:
        cache.write(POLICY, keys(2), [-1.0, -2.0])
        cache.write(POLICY, keys(1), [-3.0])
        cache.write(OTHER, keys(1), [-4.0])
        assert cache.read(POLICY, keys(2)).tolist() == [-3.0, -2.0]
        assert cache.read(OTHER, keys(1)).tolist() == [-4.0]


def test_what_is_not_finite_is_not_kept(file: Path) -> None:
    with ScoreCache(file) as cache:
        cache.write(POLICY, keys(4), [math.nan, -math.inf, math.inf, -1.0])
        assert same(cache.read(POLICY, keys(4)), np.array([math.nan] * 3 + [-1.0]))


def test_counts_must_match(file: Path) -> None:
    with ScoreCache(file) as cache, pytest.raises(ValueError, match="zip"):
        cache.write(POLICY, keys(2), [-1.0])


def test_nothing_is_made_before_it_is_needed(file: Path) -> None:
    with ScoreCache(file):
        pass
    assert not file.parent.exists()


def test_description_that_is_no_text(file: Path, messages: list[str]) -> None:
    with ScoreCache(file, messages.append) as cache:
        cache.write(Policy("ef" * 16, "runs/\udcff"), keys(1), [-1.0])
        assert cache.read(Policy("ef" * 16, "x"), keys(1)).tolist() == [-1.0]
    assert messages == []


def day_of_use(file: Path) -> str:
    with closing(sqlite3.connect(file)) as database:
        return database.execute("SELECT last_used FROM policies").fetchone()[0]


def test_reading_marks_the_day_once(file: Path) -> None:
    fill(file, 10)
    today = day_of_use(file)
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE policies SET last_used = '2020-01-31'")
    with ScoreCache(file) as cache, closing(sqlite3.connect(file)) as observer:
        cache.read(POLICY, keys(10))
        assert day_of_use(file) == today
        before = observer.execute("PRAGMA data_version").fetchone()
        cache.read(POLICY, keys(10))
        assert observer.execute("PRAGMA data_version").fetchone() == before


# Several processes


def write_and_read(file: Path, begin: int, count: int, batches: int) -> None:
    """One process: its keys overlap with its neighbours'; the value is the key's number."""
    messages: list[str] = []
    with ScoreCache(file, messages.append) as cache:
        for batch in range(batches):
            first = begin + batch * count
            cache.write(POLICY, keys(count, first), -np.arange(first, first + count))
            found = cache.read(POLICY, keys(count, begin))
            assert np.array_equal(found, -np.arange(begin, begin + count)), found
    assert messages == []


def run_all(processes: list[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(processes)


@pytest.mark.parametrize("has_log", [True, False], ids=["log", "no-log"])
def test_processes_write_and_read_at_once(file: Path, has_log: bool) -> None:
    if not has_log:
        Path(f"{file}-shm").mkdir(parents=True)
    run_all([SPAWN.Process(target=write_and_read, args=(file, 500 * each, 100, 20)) for each in range(4)])
    with ScoreCache(file) as cache:
        assert same(cache.read(POLICY, keys(3500)), -np.arange(3500.0))


def test_killed_writer_leaves_whole_batches(file: Path, messages: list[str]) -> None:
    victim = SPAWN.Process(target=write_and_read, args=(file, 0, 1000, 10_000))
    victim.start()
    while not Path(f"{file}-wal").exists():
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    with ScoreCache(file, messages.append) as cache:
        known = ~np.isnan(cache.read(POLICY, keys(100_000)))
        assert known.sum() % 1000 == 0
        assert known[: known.sum()].all()
        cache.write(OTHER, keys(1), [-1.0])
        assert cache.read(OTHER, keys(1)).tolist() == [-1.0]
    assert messages == []


HOLD = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute(sys.argv[2])
database.execute("UPDATE policies SET description = 'held'")
print("held", flush=True)
input()
"""


@pytest.fixture
def held(file: Path) -> Iterator[list[str]]:
    """A file that another process is writing to, in a transaction that does not end."""
    fill(file, 10)
    command = [sys.executable, "-c", HOLD, str(file), "BEGIN IMMEDIATE"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield command
        process.communicate("\n")


@pytest.mark.usefixtures("held")
def test_readers_do_not_wait_for_a_writer(file: Path, messages: list[str]) -> None:
    begun = time.monotonic()
    with ScoreCache(file, messages.append) as cache:
        assert not np.isnan(cache.read(POLICY, keys(10))).any()
    assert time.monotonic() - begun < 5
    assert messages == []


@pytest.mark.usefixtures("held")
def test_locked_for_too_long(file: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_database, "WAIT", 0.2)
    with ScoreCache(file, messages.append) as cache:
        cache.write(POLICY, keys(1), [-1.0])
        cache.write(POLICY, keys(1), [-1.0])
        assert np.isnan(cache.read(POLICY, keys(1))).all()
    (message,) = messages
    assert "another process has held it" in message
    assert str(file) in message


# Damage


def garbage_header(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.write(os.urandom(100))


def garbage_everywhere(file: Path) -> None:
    file.write_bytes(os.urandom(file.stat().st_size))


def garbage_pages(file: Path) -> None:
    """All but the first page, which says what tables there are."""
    with file.open("r+b") as opened:
        opened.seek(4096)
        opened.write(b"\xa5" * (file.stat().st_size - 4096))


def garbage_schema(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content.replace(b"CREATE TABLE scores", b"CREATE TABLE scoresX", 1))


def truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2 + 1000)


def truncated_header(file: Path) -> None:
    os.truncate(file, 50)


DAMAGES = [garbage_header, garbage_everywhere, garbage_pages, garbage_schema, truncated, truncated_header]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_set_aside(file: Path, messages: list[str], damage, tmp_path: Path) -> None:
    names, logps = fill(file)
    damage(file)
    with ScoreCache(file, messages.append) as cache:
        found = cache.read(POLICY, names)
        assert (np.isnan(found) | (found == logps)).all()
        assert np.isnan(found).any()
        cache.write(POLICY, names, logps)
        assert same(cache.read(POLICY, names), logps)
    (message,) = messages
    (aside,) = set_aside(file)
    assert aside.name in message
    assert str(file) in message


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_set_aside_in_a_write(file: Path, messages: list[str], damage) -> None:
    names, logps = fill(file)
    damage(file)
    with ScoreCache(file, messages.append) as cache:
        cache.write(POLICY, names, logps)
        assert same(cache.read(POLICY, names), logps)
    assert len(messages) == len(set_aside(file)) == 1


@pytest.mark.parametrize("damage", [garbage_pages, truncated])
def test_damage_in_mid_work(file: Path, messages: list[str], damage) -> None:
    names, logps = fill(file, 100_000)
    with ScoreCache(file, messages.append) as cache:
        assert same(cache.read(POLICY, names[:100]), logps[:100])
        damage(file)
        assert np.isnan(cache.read(POLICY, names)).any()
        cache.write(POLICY, names, logps)
        assert same(cache.read(POLICY, names), logps)
    assert len(messages) == len(set_aside(file)) == 1


def test_any_flipped_bit(file: Path) -> None:
    """Whichever byte is wrong, no score is and nothing fails; and nearly always the cache can be filled again.

    A row whose key stands out of order may be lost for good, and so are they all in a file that seems newer.
    """
    names, logps = fill(file, 30)
    content = file.read_bytes()
    places = [place for place, byte in enumerate(content) if byte][::20]
    filled = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with ScoreCache(file, lambda message: None) as cache:
            for _ in range(2):
                found = cache.read(POLICY, names)
                assert (np.isnan(found) | (found == logps)).all(), place
                cache.write(POLICY, names, logps)
            filled += same(cache.read(POLICY, names), logps)
    assert filled > 0.95 * len(places)


def test_flipped_bit_of_a_value(file: Path, messages: list[str]) -> None:
    names, logps = fill(file, 1000)
    content = bytearray(file.read_bytes())
    for row in (3, 700):
        content[content.index(names[row]) + 16 + 2] ^= 4
    file.write_bytes(content)
    expected = logps.copy()
    expected[[3, 700]] = math.nan
    with ScoreCache(file, messages.append) as cache:
        assert same(cache.read(POLICY, names), expected)
        (message,) = messages
        assert "2 of the scores of the base" in message
        assert same(cache.read(POLICY, names), expected)
        assert len(messages) == 1  # they are gone
        cache.write(POLICY, names, logps)
        assert same(cache.read(POLICY, names), logps)
    assert set_aside(file) == []


def meet_damage(file: Path, begin: int, told: Path) -> None:
    """One process of several that find a damaged file."""
    messages: list[str] = []
    with ScoreCache(file, messages.append) as cache:
        for first in range(begin, begin + 100, 10):
            cache.write(POLICY, keys(10, first), -np.arange(first, first + 10))
        assert same(cache.read(POLICY, keys(100, begin)), -np.arange(begin, begin + 100.0))
    told.write_text("\n".join(messages))


@pytest.mark.parametrize("damage", [garbage_header, garbage_pages])
def test_processes_notice_damage_at_once(file: Path, damage, tmp_path: Path) -> None:
    fill(file)
    damage(file)
    told = [tmp_path / f"told-{each}" for each in range(4)]
    run_all(
        [SPAWN.Process(target=meet_damage, args=(file, 100 * each, path)) for each, path in enumerate(told)]
    )
    assert len(set_aside(file)) == 1
    assert sum(len(path.read_text().splitlines()) for path in told) == 1
    with ScoreCache(file) as cache:
        assert same(cache.read(POLICY, keys(400)), -np.arange(400.0))


def test_file_that_another_process_replaced(file: Path, messages: list[str]) -> None:
    names, logps = fill(file)
    with ScoreCache(file, messages.append) as old:
        old.read(POLICY, names[:1])
        garbage_pages(file)
        with ScoreCache(file, messages.append) as new:
            new.write(POLICY, names, logps)
            old.write(OTHER, names, logps)
            assert same(new.read(OTHER, names), logps)
        old.close()
        assert same(old.read(POLICY, names), logps)
    assert len(messages) == len(set_aside(file)) == 1


# Out of use


def assert_out_of_use(file: Path, messages: list[str], reason: str) -> None:
    with ScoreCache(file, messages.append) as cache:
        for _ in range(2):
            cache.write(POLICY, keys(3), [-1.0, -2.0, -3.0])
            assert np.isnan(cache.read(POLICY, keys(3))).all()
    (message,) = messages
    assert reason in message
    assert str(file) in message
    assert "PREFOPT_CACHE" in message
    assert "\n" not in message


def test_file_in_the_way(tmp_path: Path, messages: list[str]) -> None:
    (tmp_path / "taken").write_text("")
    assert_out_of_use(tmp_path / "taken" / "scores.sqlite", messages, "File exists")
    (tmp_path / "scores.sqlite").mkdir()
    assert_out_of_use(tmp_path / "scores.sqlite", [], "unable to open")


def test_newer_version_is_left_alone(file: Path, messages: list[str]) -> None:
    fill(file, 10)
    with closing(sqlite3.connect(file)) as database:
        database.execute("PRAGMA user_version = 99")
    before = file.read_bytes()
    assert_out_of_use(file, messages, "newer version of prefopt")
    assert file.read_bytes() == before
    assert set_aside(file) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_full_disk(small_disk: Path, messages: list[str]) -> None:
    file = small_disk / "scores.sqlite"
    with ScoreCache(file, messages.append) as cache:
        cache.write(POLICY, keys(1000), -np.arange(1000.0))
        assert messages == []
        cache.write(POLICY, keys(100_000, 1000), -np.arange(100_000.0))
        assert np.isnan(cache.read(POLICY, keys(1))).all()
    (message,) = messages
    assert "disk is full" in message
    # What was there before still is, and nothing of the batch that did not fit.
    with ScoreCache(file, messages.append) as cache:
        found = cache.read(POLICY, keys(2000))
        assert same(found[:1000], -np.arange(1000.0))
        assert np.isnan(found[1000:]).all()
    assert len(messages) == 1


def test_disk_that_is_full_from_the_start(small_disk: Path, messages: list[str]) -> None:
    with pytest.raises(OSError, match="space"):
        (small_disk / "filler").write_bytes(bytes(2**21))
    assert_out_of_use(small_disk / "scores.sqlite", messages, "")


def test_disk_that_cannot_be_written(small_disk: Path, messages: list[str]) -> None:
    file = small_disk / "scores.sqlite"
    fill(file, 10)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert_out_of_use(file, messages, "")


def test_without_a_write_ahead_log(file: Path, messages: list[str]) -> None:
    """Its shared memory cannot be made, as on some network file systems."""
    Path(f"{file}-shm").mkdir(parents=True)
    with ScoreCache(file, messages.append) as cache:
        cache.write(POLICY, keys(100), -np.arange(100.0))
        assert same(cache.read(POLICY, keys(100)), -np.arange(100.0))
        # It is not kept from others, either.
        with ScoreCache(file, messages.append) as another:
            another.write(POLICY, keys(1), [-5.0])
        assert cache.read(POLICY, keys(1)).tolist() == [-5.0]
    assert messages == []


def test_shared_disk_has_no_write_ahead_log(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of several machines, which the test takes its own for; a file made elsewhere gives up its log."""
    fill(file, 10)
    monkeypatch.setattr(cache_database, "NETWORK", {kind for _, kind in cache_database.mounts()})
    with ScoreCache(file) as cache:
        assert not np.isnan(cache.read(POLICY, keys(10))).any()
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("delete",)
