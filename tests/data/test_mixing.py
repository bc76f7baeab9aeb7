"""Filters, limits, weights, shuffling and the holdout: reproducible, and every row accounted for."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from prefopt_cli import data
from prefopt_cli.data.receipt import BEYOND_LIMIT, DUPLICATE, FILTERED, HELD_OUT, LEFT_OUT
from tests.data.build import jsonl, row, settings


@pytest.fixture
def path(tmp_path: Path) -> str:
    return jsonl(tmp_path / "p.jsonl", [row(n, kind="ab"[n % 2], score=n / 10) for n in range(40)])


def _ids(loaded: data.PreferenceData) -> list[str]:
    return [row.occurrence_id for row in loaded.train]


def _numbers(loaded: data.PreferenceData) -> list[int]:
    return [int(pair.row_id.rpartition(":")[2]) for pair in loaded.train]


def _record(loaded: data.PreferenceData, source: int = 0, name: str = "train") -> Any:
    loaded.receipt.check()
    return loaded.receipt.sets[name].sources[source]


def test_where_and_limit(path: str) -> None:
    loaded = data.load(
        settings({"source": path, "where": {"kind": "a", "score": [0.0, 0.2, 0.3, 0.4, 0.6]}, "limit": 3})
    )
    assert _numbers(loaded) == [0, 2, 4]
    assert _record(loaded).dropped == {FILTERED: 36, BEYOND_LIMIT: 1}
    assert (_record(loaded).read, _record(loaded).kept) == (40, 3)


def test_limit_takes_a_seeded_sample_when_shuffling(path: str) -> None:
    def draw(seed: int) -> list[int]:
        return _numbers(data.load(settings({"source": path, "limit": 10}, shuffle=True, seed=seed)))

    assert draw(1) == draw(1)
    assert set(draw(1)) != set(draw(2))
    assert set(draw(1)) != set(range(10))


def test_shuffling_keeps_every_row_once(path: str) -> None:
    shuffled = _numbers(data.load(settings(path, shuffle=True)))
    assert shuffled != list(range(40))
    assert sorted(shuffled) == list(range(40))


@pytest.mark.parametrize(
    ("weight", "once", "twice", "thrice"),
    [(0.5, 20, 0, 0), (1.5, 20, 20, 0), (2.0, 0, 40, 0), (2.25, 0, 30, 10)],
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_weights(weight: float, once: int, twice: int, thrice: int, shuffle: bool, path: str) -> None:
    wanted = settings({"source": path, "weight": weight}, shuffle=shuffle)
    loaded = data.load(wanted)
    times = Counter(Counter(pair.row_id for pair in loaded.train).values())
    assert times == Counter({n: count for n, count in ((1, once), (2, twice), (3, thrice)) if count})
    assert len(set(_ids(loaded))) == len(loaded.train) == round(40 * weight)
    assert any(one.endswith("#2") for one in _ids(loaded)) == (weight > 1)
    assert _record(loaded).dropped == ({LEFT_OUT: 20} if weight < 1 else {})
    assert _record(loaded).rows == len(loaded.train)
    assert _ids(loaded) == _ids(data.load(wanted))


def test_sources_are_mixed_and_told_apart(path: str, tmp_path: Path) -> None:
    other = jsonl(tmp_path / "q.jsonl", [row(n) for n in range(100, 110)])
    wanted = [{"source": path, "limit": 5}, {"source": other, "weight": 2.0}]
    loaded = data.load(settings(wanted, shuffle=True))
    names = [pair.source for pair in loaded.train]
    assert Counter(names) == {"p.jsonl": 5, "q.jsonl": 20}
    assert names != sorted(names)
    assert _ids(loaded) != _ids(data.load(settings(wanted, shuffle=True, seed=1)))


def test_one_file_as_two_sources_has_two_names(path: str) -> None:
    listed = [{"source": path, "where": {"kind": kind}, "limit": 2} for kind in "ab"]
    assert _ids(data.load(settings(listed))) == ["p.jsonl:0", "p.jsonl:2", "p.jsonl~2:1", "p.jsonl~2:3"]


def test_duplicates_within_and_across_sources(path: str, tmp_path: Path) -> None:
    other = jsonl(tmp_path / "q.jsonl", [row(3), row(50), row(50), row(3, prompt="other")])
    loaded = data.load(settings([path, other]))
    assert _ids(loaded)[40:] == ["q.jsonl:1", "q.jsonl:3"]
    assert _record(loaded, 1).dropped == {DUPLICATE: 2}
    assert _record(loaded, 1).examples == {DUPLICATE: ["q.jsonl:0", "q.jsonl:2"]}


def test_what_an_earlier_source_left_out_is_no_duplicate(path: str) -> None:
    loaded = data.load(settings([{"source": path, "limit": 10}, path]))
    assert len(loaded.train) == 40
    assert _record(loaded, 1).dropped == {DUPLICATE: 10}


def _with_twins(numbers: range) -> list[dict[str, Any]]:
    return [row(n, rejected=f" No {twin}") for twin in range(2) for n in numbers]


def test_holdout_takes_whole_prompts_and_does_not_depend_on_order(tmp_path: Path) -> None:
    forward = jsonl(tmp_path / "f.jsonl", _with_twins(range(200)))
    backward = jsonl(tmp_path / "b.jsonl", _with_twins(range(200))[::-1])
    sets = [
        data.load(settings({"source": source, "weight": 2.0}, holdout=0.2)) for source in (forward, backward)
    ]
    held = [{pair.prompt for pair in loaded.eval["holdout"]} for loaded in sets]
    assert held[0] == held[1]
    assert 20 < len(held[0]) < 60
    for loaded in sets:
        assert not held[0] & {pair.prompt for pair in loaded.train}
        assert len(loaded.eval["holdout"]) == 2 * len(held[0]) == _record(loaded).dropped[HELD_OUT]
        assert len(loaded.train) == 2 * (400 - 2 * len(held[0]))
        assert loaded.receipt.sets["holdout"].leaked_prompts == 0
        assert _record(loaded, name="holdout").read == len(loaded.eval["holdout"])
    numbers = [int(pair.row_id.rpartition(":")[2]) for pair in sets[0].eval["holdout"]]
    assert numbers == sorted(numbers)
    more = data.load(
        settings([forward, jsonl(tmp_path / "m.jsonl", _with_twins(range(200, 300)))], holdout=0.2)
    )
    assert held[0] <= {pair.prompt for pair in more.eval["holdout"]}
    other = data.load(settings(forward, holdout=0.2, seed=1))
    assert {pair.prompt for pair in other.eval["holdout"]} != held[0]


def test_eval_sets_keep_their_order_and_count_leaks(path: str) -> None:
    test = {"source": path, "split": "train[30:]", "limit": 5}
    loaded = data.load(settings({"source": path, "split": "train[:32]"}, shuffle=True, eval={"mine": test}))
    assert [pair.prompt for pair in loaded.eval["mine"]] == [row(n)["prompt"] for n in range(30, 35)]
    assert loaded.receipt.sets["mine"].leaked_prompts == 2
    assert loaded.receipt.sets["train"].leaked_prompts is None
