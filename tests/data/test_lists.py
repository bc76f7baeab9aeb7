"""Lists of responses as text: read, sorted, cleaned, and told apart from pairs."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from prefopt_cli import data
from prefopt_cli.data.receipt import (
    ALL_TIED,
    DUPLICATE,
    EMPTY_LEFT_OUT,
    FEW,
    IDENTICAL,
    REPEATED_LEFT_OUT,
)
from prefopt_cli.errors import UserError
from tests.data.build import jsonl, row, rows, settings

USER = {"role": "user", "content": "Why?"}


def _says(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _list(**columns: Any) -> dict[str, Any]:
    return {"prompt": "Why?", "responses": [" a", " b", " c", " d"], **columns}


def _load(folder: Path, listed: list[Any], **source: Any) -> data.PreferenceData:
    loaded = data.load(settings({"source": jsonl(folder / "p.jsonl", listed), **source}))
    loaded.receipt.check()
    return loaded


def _record(loaded: data.PreferenceData) -> Any:
    return loaded.receipt.sets["train"].sources[0]


CASES: list[tuple[str, dict[str, Any], str, tuple[int, ...]]] = [
    ("ranked", {"ranking": [2, 0, 3, 1]}, "bdac", (0, 1, 2, 3)),
    ("ranked", {"ranking": [3, 1, 4, 2]}, "bdac", (0, 1, 2, 3)),
    ("ranked", {"ranking": [7, -1, 90, 3]}, "bdac", (0, 1, 2, 3)),
    ("ranked", {"ranking": [1, 0, 1, 0]}, "bdac", (0, 0, 1, 1)),
    ("ranked", {"ranking": [1.5, 1.5, 1.0, 3.0]}, "cabd", (0, 1, 1, 2)),
    ("scored", {"scores": [0.1, 0.9, -3, 0.4]}, "bdac", (0, 1, 2, 3)),
    ("scored", {"scores": [0.5, 1.0, 0.0, 0.5]}, "badc", (0, 1, 1, 2)),
    ("scored", {"scores": [0, 0, 0, 1]}, "dabc", (0, 1, 1, 1)),
    ("best_of_n", {"best": 2}, "cabd", (0, 1, 1, 1)),
    ("best_of_n", {"best": 0}, "abcd", (0, 1, 1, 1)),
    ("ranked", {"ranking": [2, 0, 3, 1], "scores": [2.0, 9.0, 1.0, 3.0], "best": 0}, "bdac", (0, 1, 2, 3)),
    ("scored", {"scores": [2.0, 9.0, 1.0, 3.0], "best": 0}, "bdac", (0, 1, 2, 3)),
]


@pytest.mark.parametrize(("format", "labels", "order", "ranks"), CASES)
@pytest.mark.parametrize("chat", [False, True])
def test_formats(
    format: str, labels: dict[str, Any], order: str, ranks: tuple[int, ...], chat: bool, tmp_path: Path
) -> None:
    columns = _list(**labels)
    if chat:
        columns |= {"prompt": [USER], "responses": [[_says(text)] for text in columns["responses"]]}
    for asked in ("auto", format):
        loaded = _load(tmp_path, [columns], format=asked)
        expected = [[_says(f" {one}")] if chat else f" {one}" for one in order]
        assert loaded.train[0].prompt == columns["prompt"]
        assert list(loaded.train[0].responses) == expected
        assert loaded.train[0].ranks == ranks
        assert (_record(loaded).format, _record(loaded).changed) == (format, {})
        assert (loaded.receipt.sets["train"].responses, loaded.receipt.sets["train"].list_sizes) == (
            4,
            [4, 4],
        )


@pytest.mark.parametrize(
    "responses",
    [
        [[USER, _says("a")], [USER, _says("b")]],  # each repeats the prompt in front
        [[_says("a")], [USER, _says("b")]],
        [_says("a"), _says("b")],  # single messages
    ],
    ids=["repeated", "one repeated", "single"],
)
def test_shapes_of_chat_responses(responses: list[Any], tmp_path: Path) -> None:
    loaded = _load(tmp_path, [{"prompt": [USER], "responses": responses, "best": 1}])
    assert loaded.train[0].responses == ([_says("b")], [_says("a")])


def test_pairs_come_first_and_a_list_of_two_is_one(tmp_path: Path) -> None:
    both = row(0, responses=[" x", " y", " z"], scores=[1, 2, 3])
    assert _record(_load(tmp_path, [both])).format == "standard"
    loaded = _load(tmp_path, [{"prompt": "p", "responses": [" a", " b"], "scores": [1, 2]}])
    assert (loaded.train[0].responses, loaded.train[0].ranks) == ((" b", " a"), (0, 1))
    assert loaded.receipt.sets["train"].responses is None


def test_a_ranking_that_is_an_order_is_noticed_by_the_scores_beside_it(tmp_path: Path) -> None:
    """Best to worst these are c, a, b: as numbers of the responses [2, 0, 1], as ranks [1, 2, 0]."""
    columns = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [2, 1, 3]}
    good = {**columns, "prompt": "q", "scores": [3, 2, 1], "ranking": [0, 1, 2]}
    loaded = _load(tmp_path, [good, {**columns, "ranking": [2, 0, 1]}])
    assert _record(loaded).format == "scored"
    assert loaded.train[1].responses == ("c", "a", "b")
    assert _record(_load(tmp_path, [good, {**columns, "ranking": [1, 2, 0]}])).format == "ranked"
    # A finer ranking does not contradict scores that tie, and who names the format gets it.
    tied = {**columns, "scores": [1, 1, 1], "ranking": [2, 0, 1]}
    assert _load(tmp_path, [tied]).train[0].responses == ("b", "c", "a")
    forced = _load(tmp_path, [{**columns, "ranking": [2, 0, 1]}], format="ranked")
    assert forced.train[0].responses == ("b", "c", "a")


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("scored", {"scores": None}, "scores is nothing, not a list of numbers"),
    ("scored", {"scores": [1, 2, 3]}, "scores has 3 entries, but there are 4 responses"),
    ("scored", {"scores": [1, 2, None, 3]}, "an entry of scores is nothing, not a number"),
    ("ranked", {"ranking": None}, "ranking is nothing, not a list of numbers"),
    ("ranked", {"ranking": []}, "ranking has 0 entries, but there are 4 responses"),
    ("best_of_n", {"best": None}, "best is nothing, not a whole number"),
    ("best_of_n", {"best": 7}, "best is 7, but there are 4 responses"),
    ("best_of_n", {"best": 4}, "best is 4, but there are 4 responses"),
    ("best_of_n", {"best": -1}, "best is -1, but there are 4 responses"),
    ("best_of_n", {"best": 1.5}, "best is a fraction, not a whole number"),
    ("scored", {"responses": None}, "responses is nothing, not a list"),
    ("scored", {"responses": [" a", None, " b", " c"]}, "a response is nothing, not text"),
    ("scored", {"prompt": None}, "prompt is nothing, not text"),
]
GOOD = {"scored": {"scores": [1, 2, 3, 4]}, "ranked": {"ranking": [1, 2, 3, 4]}, "best_of_n": {"best": 1}}


@pytest.mark.parametrize(("format", "columns", "reason"), BAD)
def test_bad_rows_are_counted(format: str, columns: dict[str, Any], reason: str, tmp_path: Path) -> None:
    good = [_list(prompt=f"{number}", **GOOD[format]) for number in range(3)]
    loaded = _load(tmp_path, [*good, _list(**{**GOOD[format], **columns})])
    assert len(loaded.train) == 3
    assert (_record(loaded).format, _record(loaded).dropped) == (format, {f"malformed: {reason}": 1})
    assert _record(loaded).examples == {f"malformed: {reason}": ["p.jsonl:3"]}


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"scores": [True, False, True, True]}, "an entry of scores is true/false, not a number"),
        ({"scores": ["1", "2", "3", "4"]}, "an entry of scores is text, not a number"),
        ({"scores": 3}, "scores is number, not a list of numbers"),
        ({"ranking": [[1], [2], [3], [4]]}, "an entry of ranking is list of number, not a number"),
        ({"best": True}, "best is true/false, not a whole number"),
        ({"best": "1"}, "best is text, not a whole number"),
        ({"best": [1]}, "best is list of number, not a whole number"),
    ],
)
def test_columns_of_the_wrong_type_are_explained(labels: dict[str, Any], reason: str, tmp_path: Path) -> None:
    format = {"scores": "scored", "ranking": "ranked", "best": "best_of_n"}[next(iter(labels))]
    with pytest.raises(UserError) as caught:
        _load(tmp_path, [_list(**labels)], format=format)
    assert f"no row can be read as {format} (malformed: {reason})" in str(caught.value)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_no_numbers(score: float, tmp_path: Path) -> None:
    listed = [_list(prompt="fine", scores=[1.0, 2.0, 3.0, 4.0]), _list(scores=[1.0, score, 2.0, 3.0])]
    datasets.Dataset.from_list(listed).to_parquet(tmp_path / "p.parquet")
    record = _record(data.load(settings(str(tmp_path / "p.parquet"))))
    assert record.dropped == {"malformed: an entry of scores is not a finite number": 1}


def test_a_whole_number_may_be_written_as_a_float(tmp_path: Path) -> None:
    """Tables that once had a missing cell keep whole numbers as floats."""
    assert _load(tmp_path, [_list(best=2.0)]).train[0].responses[0] == " c"


@pytest.mark.parametrize(
    ("responses", "reason"),
    [
        ([[_says("a")], [USER]], "a response does not start and end with an assistant message"),
        ([[_says("a")], [USER, USER, _says("b")]], "a response does not start and end with an assistant"),
        ([[_says("a")], []], "a response is an empty list, not messages"),
        ([[_says("a")], [{"role": "assistant", "content": None}]], "a message in a response lacks a text"),
        (["a", "b"], "a response is text, not messages"),
    ],
)
def test_bad_chats_are_explained(responses: list[Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        _load(tmp_path, [{"prompt": [USER], "responses": responses, "best": 0}], format="best_of_n")
    assert reason in str(caught.value)


def test_other_columns_by_name(tmp_path: Path) -> None:
    columns = {"question": "q", "answers": [" a", " b", " c"], "reward": [1, 3, 2], "pick": 0}
    names = {"prompt": "question", "responses": "answers"}
    scored = _load(tmp_path, [columns], columns={**names, "scores": "reward"})
    assert scored.train[0].responses == (" b", " c", " a")
    best = _load(tmp_path, [columns], columns={**names, "best": "pick"})
    assert (best.train[0].responses[0], _record(best).format) == (" a", "best_of_n")


def test_empty_and_repeated_responses_are_left_out(tmp_path: Path) -> None:
    listed = [
        _list(prompt="1", responses=[" a", " \n", " c", " d"], scores=[1, 9, 2, 3]),
        _list(prompt="2", responses=[" a", " b", " a", " a"], scores=[1, 2, 3, 0]),
        _list(prompt="3", responses=[" a", "", "", " a"], scores=[1, 2, 3, 0]),
        _list(prompt="4", responses=[" a", " a", " a", ""], scores=[1, 2, 3, 0]),
        _list(prompt="5", responses=[" a", " b", " b", ""], scores=[1, 1, 0, 2]),
        _list(prompt="6", scores=[2, 2, 2, 2]),
        _list(prompt="7", responses=[" a"], scores=[2]),
        _list(prompt="8", responses=[], scores=[]),
        _list(prompt="9", responses=[" a", "", " b", " a"], scores=[1, 5, 3, 0]),
    ]
    loaded = _load(tmp_path, listed)
    assert [(one.prompt, one.responses, one.ranks) for one in loaded.train] == [
        ("1", (" d", " c", " a"), (0, 1, 2)),
        ("2", (" a", " b"), (0, 1)),
        ("9", (" b", " a"), (0, 1)),
    ]
    assert _record(loaded).dropped == {FEW: 4, ALL_TIED: 2}
    assert _record(loaded).changed == {EMPTY_LEFT_OUT: 2, REPEATED_LEFT_OUT: 2}
    assert _record(loaded).examples[REPEATED_LEFT_OUT] == ["p.jsonl:1", "p.jsonl:8"]
    assert loaded.receipt.sets["train"].list_sizes == [2, 3]


def test_the_best_ranked_of_repeated_responses_stays(tmp_path: Path) -> None:
    """Also where best_of_n names one of several equal texts as the best."""
    loaded = _load(tmp_path, [_list(responses=[" b", " a", " b", " c"], best=2)])
    assert (loaded.train[0].responses, loaded.train[0].ranks) == ((" b", " a", " c"), (0, 1, 1))


def test_changes_of_rows_that_go_elsewhere_are_not_counted(tmp_path: Path) -> None:
    listed = [_list(prompt=f"{n}", responses=[" a", " b", ""], scores=[1, 2, 3]) for n in range(200)]
    path = jsonl(tmp_path / "p.jsonl", listed)
    limited = data.load(settings({"source": path, "limit": 10, "weight": 2.0}))
    assert _record(limited).changed == {EMPTY_LEFT_OUT: 10}
    held = data.load(settings(path, holdout=0.3))
    kept = held.receipt.sets["train"].sources[0], held.receipt.sets["holdout"].sources[0]
    assert [one.changed[EMPTY_LEFT_OUT] for one in kept] == [one.kept for one in kept]


def test_duplicates_have_the_same_prompt_responses_and_ranks(tmp_path: Path) -> None:
    listed = [
        _list(scores=[1, 2, 3, 4]),
        _list(scores=[10, 20, 30, 40]),
        _list(responses=[" d", " c", " b", " a"], scores=[4, 3, 2, 1]),
        _list(scores=[1, 2, 3, 3]),
        _list(scores=[2, 1, 3, 4]),
        _list(prompt="Who?", scores=[1, 2, 3, 4]),
    ]
    loaded = _load(tmp_path, listed)
    assert [one.row_id for one in loaded.train] == [f"p.jsonl:{n}" for n in (0, 3, 4, 5)]
    assert _record(loaded).dropped == {DUPLICATE: 2}


def test_pairs_and_lists_mix(tmp_path: Path) -> None:
    lists = jsonl(tmp_path / "l.jsonl", [_list(prompt=f"{n}", best=n) for n in range(4)])
    pairs = jsonl(tmp_path / "p.jsonl", [*rows(3), row(1, chosen="x", rejected="x")])
    loaded = data.load(settings([pairs, {"source": lists, "weight": 2.0}], eval={"lists": lists}))
    train = loaded.receipt.sets["train"]
    assert (train.rows, train.prompts, train.responses, train.list_sizes) == (11, 7, 38, [2, 4])
    assert train.sources[0].dropped == {IDENTICAL: 1}
    assert loaded.receipt.sets["lists"].leaked_prompts == 4
    assert [one.occurrence_id for one in loaded.train[-1:]] == ["l.jsonl:3#2"]
    assert json.loads(json.dumps(loaded.receipt.to_dict())) == loaded.receipt.to_dict()


@pytest.mark.parametrize("format", ["auto", "standard"])
def test_what_a_list_lacks_is_explained(format: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        _load(tmp_path, [{"prompt": "a", "responses": ["b", "c"]}], format=format)
    assert "columns found: prompt (text), responses (list of text)" in str(caught.value)
    expected = (
        "scores: a number each, higher is better" if format == "auto" else "prompt, chosen, rejected: text"
    )
    assert expected in str(caught.value)


def test_an_order_is_noticed_wherever_its_row_stands(tmp_path: Path) -> None:
    """In lists of two an order and ranks look alike, and a file may be sorted by length."""
    short = [
        {"prompt": f"p{n}", "responses": [" a", " b"], "scores": [1, 0], "ranking": [0, 1]}
        for n in range(150)
    ]
    long = {
        "prompt": "q",
        "responses": [" worst", " best", " mid"],
        "scores": [0, 2, 1],
        "ranking": [1, 2, 0],
    }
    loaded = _load(tmp_path, [*short, long])
    assert _record(loaded).format == "scored"
    assert loaded.train[-1].responses == (" best", " mid", " worst")


def test_the_order_of_what_ties_makes_no_other_row(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "responses": ["a", "b", "c"], "best": 0},
        {"prompt": "p", "responses": ["c", "a", "b"], "best": 1},
        {"prompt": "p", "responses": ["a", "b", "c"], "best": 1},
    ]
    assert len(_load(tmp_path, rows).train) == 2


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"best": 7}, "best is 7, but there are 2 responses"),
        ({"scores": ["high", "low"]}, "an entry of scores is text, not a number"),
        ({"ranking": [1]}, "ranking has 1 entries, but there are 2 responses"),
    ],
)
def test_columns_that_are_there_but_wrong_are_told_without_a_format(
    labels: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refusal:
        _load(tmp_path, [{"prompt": "p", "responses": ["a", "b"], **labels}])
    assert reason in str(refusal.value)
    assert "rename columns" not in str(refusal.value)
