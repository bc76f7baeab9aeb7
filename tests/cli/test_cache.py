"""`prefopt cache`: what it says about the cache, and what it removes."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import closing
from datetime import date, datetime, timedelta
from pathlib import Path

import pytest

from prefopt_cli.scoring import cache_database, cache_file
from prefopt_cli.scoring.cache import Policy, ScoreCache, response_key
from tests.cli.conftest import Prefopt, environment

BASE = Policy("1234" * 8, "the base model")
TUNED = Policy("12ff" * 8, "the run runs/gpo")
OLD = Policy("abcd" * 8, "a model of last year")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder, not made yet."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def keys(count: int) -> list[bytes]:
    return [response_key([number], [1]) for number in range(count)]


def days_ago(days: int) -> str:
    return (date.today() - timedelta(days=days)).isoformat()


@pytest.fixture
def file(folder: Path) -> Path:
    """Three policies with 2,000, 1,000 and 4,000 responses, of which the last was used 100 days ago."""
    with ScoreCache() as cache:
        for policy, count in ((BASE, 2000), (TUNED, 1000), (OLD, 4000)):
            cache.write(policy, keys(count), [-1.5] * count)
    file = cache_file.default_file()
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE policies SET last_used = ? WHERE digest = ?", (days_ago(100), OLD.digest))
    assert file.is_relative_to(folder)
    return file


def left(prefopt: Prefopt) -> dict[str, int]:
    listed = json.loads(prefopt("cache", "info", "--json").out)["scores"]["policies"]
    return {policy["description"]: policy["responses"] for policy in listed}


def test_no_cache_yet(prefopt: Prefopt, folder: Path) -> None:
    result = prefopt("cache", "info")
    assert (result.code, result.err) == (0, "")
    assert str(folder) in result.out
    assert "No scores are kept yet" in result.out
    for options in ([], ["--all"], ["--dry-run"]):
        assert "nothing to remove" in prefopt("cache", "prune", *options).out
    assert json.loads(prefopt("cache", "info", "--json").out)["scores"]["policies"] == []
    assert not folder.exists()


@pytest.mark.usefixtures("file")
def test_info(prefopt: Prefopt, folder: Path) -> None:
    (folder / "sandbox" / "world").mkdir(parents=True)
    (folder / "sandbox" / "world" / "base").write_bytes(bytes(3_000_000))
    lines = prefopt("cache", "info").out.splitlines()
    assert next(line for line in lines if "sandbox" in line).split()[1:3] == ["3.0", "MB"]
    row = next(line for line in lines if OLD.description in line)
    assert row.removeprefix(OLD.description).split() == [OLD.digest[:12], "4,000", days_ago(100)]
    assert lines[-1] == row  # those used last come first


def test_info_as_json(prefopt: Prefopt, file: Path, folder: Path) -> None:
    found = json.loads(prefopt("cache", "info", "--json").out)
    assert found["folder"] == str(folder)
    assert found["sandbox"] == {"folder": str(folder / "sandbox"), "bytes": 0}
    assert found["judge"] == {"folder": str(folder / "judge"), "bytes": 0}
    scores = found["scores"]
    assert (scores["file"], scores["bytes"]) == (str(file), file.stat().st_size)
    assert scores["problem"] is None
    assert scores["policies"][-1] == {
        "digest": OLD.digest,
        "description": OLD.description,
        "created": days_ago(0),
        "last_used": days_ago(100),
        "responses": 4000,
    }


def test_info_changes_nothing(prefopt: Prefopt, file: Path) -> None:
    before = file.read_bytes()
    prefopt("cache", "info")
    assert file.read_bytes() == before
    file.write_bytes(b"garbage" * 1000)
    result = prefopt("cache", "info")
    assert result.code == 0
    assert "damaged" in result.out
    assert "damaged" in json.loads(prefopt("cache", "info", "--json").out)["scores"]["problem"]
    assert file.read_bytes() == b"garbage" * 1000


def words(given: Collection[str]) -> str:
    """The name of a case; the same in every process, whatever the order of a set."""
    return " ".join(sorted(given) if isinstance(given, set) else given)


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ([], {OLD.description}),
        (["--unused-for", "101"], set()),
        (["--unused-for", "100"], {OLD.description}),
        (["--unused-for", "0"], {BASE.description, TUNED.description, OLD.description}),
        (["--policy", "12FF"], {TUNED.description}),
        (["--policy", BASE.digest], {BASE.description}),
        (["--all"], {BASE.description, TUNED.description, OLD.description}),
    ],
    ids=words,
)
def test_prune(prefopt: Prefopt, options: list[str], gone: set[str]) -> None:
    before = left(prefopt)
    foreseen = json.loads(prefopt("cache", "prune", *options, "--dry-run", "--json").out)
    assert left(prefopt) == before
    done = json.loads(prefopt("cache", "prune", *options, "--json").out)
    assert left(prefopt) == {name: count for name, count in before.items() if name not in gone}
    for said in (foreseen, done):
        assert {policy["description"] for policy in said["policies"]} == gone
        assert said["responses"] == sum(before[name] for name in gone)
    assert (foreseen["dry_run"], done["dry_run"]) == (True, False)


def test_space_returns_while_others_have_the_file_open(prefopt: Prefopt, file: Path) -> None:
    with ScoreCache() as cache:
        cache.read(BASE, keys(10))
        before = sum(part.stat().st_size for part in file.parent.iterdir())
        result = prefopt("cache", "prune")
        after = sum(part.stat().st_size for part in file.parent.iterdir())
        assert result.out.startswith(
            f"Removed: 4,000 responses of 1 policy, {(before - after) / 1e6:.1f} MB."
        )
        assert OLD.description in result.out
        assert before - after > 100_000
        assert cache.read(BASE, keys(1)).tolist() == [-1.5]
        cache.write(OLD, keys(2), [-2.0, -3.0])
        assert cache.read(OLD, keys(2)).tolist() == [-2.0, -3.0]


def test_the_other_rows_are_as_they_were(prefopt: Prefopt, file: Path) -> None:
    prefopt("cache", "prune", "--policy", "1234")
    messages: list[str] = []
    with ScoreCache(file, messages.append) as cache:
        assert set(cache.read(TUNED, keys(1000)).tolist()) == {-1.5}
    assert messages == []


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policy", "77"], ["--policy 77", "no policy", "prefopt cache info"]),
        (["--policy", "12"], ["--policy 12", "2 policies", "prefopt cache info"]),
        (["--policy", ""], ["3 policies"]),
        (["--policy", "12ff", "--all"], ["one of them"]),
        (["--unused-for", "9", "--all"], ["one of them"]),
        (["--unused-for", "-1"], ["--unused-for"]),
    ],
)
def test_mistakes(prefopt: Prefopt, options: list[str], words: list[str]) -> None:
    before = left(prefopt)
    for dry in ([], ["--dry-run"]):
        result = prefopt("cache", "prune", *options, *dry)
        assert result.code == 2
        assert all(word in result.err for word in words), result.err
    assert left(prefopt) == before


def test_unknown_policy_of_no_cache(prefopt: Prefopt, folder: Path) -> None:
    assert prefopt("cache", "prune", "--policy", "12").code == 2
    assert not folder.exists()


@pytest.fixture
def tokens(folder: Path) -> Path:
    """The folder of two sets, of which one was last used 100 days ago, and what a writer has left 95 days ago."""
    place = folder / "tokens"
    place.mkdir(parents=True)
    for name, size, days in (
        ("new.arrow", 1_000_000, 0),
        ("old.arrow", 2_000_000, 100),
        (".a.arrow.x", 500_000, 95),
    ):
        (place / name).write_bytes(bytes(size))
        then = (datetime.now() - timedelta(days=days)).timestamp()
        os.utime(place / name, (then, then))
    return place


def test_info_of_tokenised_data(prefopt: Prefopt, tokens: Path) -> None:
    line = next(line for line in prefopt("cache", "info").out.splitlines() if "tokens" in line)
    assert line.split(maxsplit=3) == ["tokens", "3.5", "MB", f"{tokens} (2 tokenised sets)"]
    found = json.loads(prefopt("cache", "info", "--json").out)["tokens"]
    assert found == {"folder": str(tokens), "bytes": 3_500_000, "sets": 2}


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ([], {"old.arrow", ".a.arrow.x"}),
        (["--unused-for", "101"], set()),
        (["--unused-for", "100"], {"old.arrow"}),
        (["--policy", "12FF"], set()),
        (["--all"], {"new.arrow", "old.arrow", ".a.arrow.x"}),
        (["--unused-for", "0"], {"new.arrow", "old.arrow", ".a.arrow.x"}),
    ],
    ids=words,
)
def test_prune_tokenised_data(prefopt: Prefopt, tokens: Path, options: list[str], gone: set[str]) -> None:
    before = {file.name: file.stat().st_size for file in tokens.iterdir()}
    foreseen = json.loads(prefopt("cache", "prune", *options, "--dry-run", "--json").out)
    assert {file.name for file in tokens.iterdir()} == set(before)
    done = json.loads(prefopt("cache", "prune", *options, "--json").out)
    assert {file.name for file in tokens.iterdir()} == set(before) - gone
    for said in (foreseen, done):
        assert said["tokens"]["bytes"] == sum(before[name] for name in gone) <= said["bytes"]
        assert said["tokens"]["sets"] == len(gone - {".a.arrow.x"})


def test_prune_says_what_tokenised_data_goes(prefopt: Prefopt, tokens: Path) -> None:
    assert "To be removed: 1 tokenised set, about 2.5 MB." in prefopt("cache", "prune", "--dry-run").out
    assert "Removed: 1 tokenised set, 2.5 MB." in prefopt("cache", "prune").out
    assert "nothing to remove" in prefopt("cache", "prune").out
    (tokens / "stuck.arrow").mkdir()
    result = prefopt("cache", "prune", "--all")
    assert result.code == 1
    assert "stuck.arrow cannot be removed" in result.err


def test_damaged_files_go(prefopt: Prefopt, file: Path) -> None:
    file.write_bytes(b"garbage" * 1000)
    with ScoreCache(file, lambda message: None) as cache:
        cache.write(BASE, keys(1), [-1.0])
    assert "1 file set aside as damaged" in prefopt("cache", "info").out
    assert "1 file" in prefopt("cache", "prune", "--dry-run").out
    assert cache_file.set_aside_files(file)
    result = prefopt("cache", "prune")
    assert "1 file that had been set aside as damaged" in result.out
    assert cache_file.set_aside_files(file) == []
    assert left(prefopt) == {BASE.description: 1}


def test_pruning_a_damaged_file(prefopt: Prefopt, file: Path) -> None:
    file.write_bytes(b"garbage" * 1000)
    result = prefopt("cache", "prune")
    assert result.code == 0
    assert "was damaged" in result.err
    assert cache_file.set_aside_files(file) == []
    assert left(prefopt) == {}


HOLD = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute(sys.argv[2])
database.execute(sys.argv[3]).fetchone()
print("held", flush=True)
input()
"""


@pytest.fixture
def hold(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[str]]]:
    """Append a process that keeps the file in a transaction; the wait for it is short."""
    for module in (cache_database, cache_file):
        monkeypatch.setattr(module, "WAIT", 0.2)
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.communicate("\n")


def holder(file: Path, *statements: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(file), *statements],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    return process


def test_another_process_writes_for_long(prefopt: Prefopt, file: Path, hold: list) -> None:
    hold.append(holder(file, "BEGIN IMMEDIATE", "UPDATE policies SET description = 'x'"))
    before = left(prefopt)  # looking needs nobody's leave
    result = prefopt("cache", "prune", "--all")
    assert result.code == 1
    assert "another process has held it" in result.err
    assert str(file) in result.err
    assert left(prefopt) == before


def test_another_process_reads_for_long(prefopt: Prefopt, file: Path, hold: list) -> None:
    hold.append(holder(file, "BEGIN", "SELECT COUNT(*) FROM scores"))
    result = prefopt("cache", "prune")
    assert result.code == 1
    assert "4,000 responses are removed" in result.err
    assert "another process" in result.err
    hold.pop().communicate("\n")
    assert prefopt("cache", "prune").code == 0
    assert file.stat().st_size < 200_000


@pytest.mark.usefixtures("file")
@pytest.mark.parametrize("command", [("info",), ("prune", "--dry-run")], ids=" ".join)
def test_nothing_heavy_is_imported(command: tuple[str, ...]) -> None:
    program = (
        f"import sys; sys.argv = ['prefopt', 'cache', *{command!r}]\n"
        "from prefopt_cli.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.stderr.strip() == "[]"
