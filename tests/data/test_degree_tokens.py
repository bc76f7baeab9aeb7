"""Degraded responses in tokens: columns by hand, and data that is otherwise what it is without them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from prefopt_cli import data
from prefopt_cli.data import receipt
from prefopt_cli.data.degrading import Degrading
from prefopt_cli.errors import UserError
from tests.data.build import (
    CHATML,
    LLAMA3,
    MISTRAL,
    PHI,
    WITHOUT_TURN_END,
    chat_row,
    jsonl,
    settings,
    tokenizer,
)

STOP = frozenset({"the", "and", "are", "of", "it", "is", "a"})

TOYS = " The big red ball and the green box are toys."
"""Scores: big red ball 9, green box 4, toys 1. Of 4 levels 1, 2 and 3 remove round(0.75), round(1.5), round(2.25)
= 1, 2, 2 of the 3 phrases: level 3 is level 2 again and is left out."""
FIRST, SECOND = " The and the green box are toys.", " The and the are toys."

NOTHING = " Of it, and the."
ONE_PHRASE = " It is tea."
"""Levels 1, 2, 3 remove round(0.25), round(0.5), round(0.75) = 0, 0, 1 phrase."""


def rows(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [
        {"prompt": f"Question {number}?", "chosen": chosen, "rejected": rejected}
        for number, (chosen, rejected) in enumerate(pairs)
    ]


def tokenize(
    folder: Path,
    given: list[Any],
    tok: Any = None,
    degrading: Degrading | None = Degrading(STOP, 4),  # noqa: B008 - it is frozen
    lists: Any = "whole",
    **others: Any,
) -> data.TokenizedData:
    wanted = settings(jsonl(folder / "p.jsonl", given), **others)
    return data.tokenize(data.load(wanted), tok or tokenizer(), wanted, lists=lists, degrading=degrading)


def texts(tok: Any, one: dict[str, Any]) -> list[list[str]]:
    """The degraded versions of each response."""
    return [[tok.decode(ids) for ids in versions] for versions in one["degraded_ids"]]


def record(tokens: data.TokenizedData) -> Any:
    tokens.receipt.check()
    return tokens.receipt.sets["train"]


def test_a_row_by_hand(tmp_path: Path) -> None:
    tok = tokenizer()
    one = tokenize(tmp_path, rows((TOYS, ONE_PHRASE)), tok).train[0]
    assert one["degraded_levels"] == [[1, 2], [3]]
    assert texts(tok, one) == [[f"{FIRST}</s>", f"{SECOND}</s>"], [" It is.</s>"]]
    for versions, response in zip(one["degraded_ids"], one["response_ids"], strict=True):
        for ids in versions:
            assert len(ids) < len(response)
            whole = tok("Question 0?" + tok.decode(ids[:-1]))["input_ids"]
            assert one["prompt_ids"] + ids == [*whole, tok.eos_token_id], "as the policy would see it"


def test_columns(tmp_path: Path) -> None:
    ids = pa.large_list(pa.int32())
    given = rows((TOYS, ONE_PHRASE))
    schema = {field.name: field.type for field in tokenize(tmp_path, given).train.data.schema}
    assert schema["degraded_ids"] == pa.large_list(pa.large_list(ids))
    assert schema["degraded_levels"] == pa.large_list(ids)
    plain = tokenize(tmp_path, given, degrading=None).train
    assert set(schema) - set(plain.column_names) == {"degraded_ids", "degraded_levels"}


GIVEN = [
    *rows((TOYS, ONE_PHRASE), (NOTHING, TOYS), (ONE_PHRASE, NOTHING)),
    # The prompt ends inside a token of one response, and of none of that response's degraded versions.
    {"prompt": "Human: Te", "chosen": "ll me of cats", "rejected": " of the small dogs"},
]


@pytest.mark.parametrize("apply_to", ["both", "chosen", "rejected"])
def test_everything_else_is_as_without_degrees(apply_to: Any, tmp_path: Path) -> None:
    plain = tokenize(tmp_path, GIVEN, degrading=None)
    degraded = tokenize(tmp_path, GIVEN, degrading=Degrading(STOP, 4, apply_to))
    assert len(degraded.train) == len(plain.train) == 4
    for name in plain.train.column_names:
        assert degraded.train[name][:] == plain.train[name][:], name


def test_a_degraded_version_has_no_say_in_where_the_prompt_ends(tmp_path: Path) -> None:
    """Without "12 34" the answer goes on with the prompt's last letter, in one token: that version takes no part."""
    tok = tokenizer()
    given = [
        {"prompt": "Human: T", "chosen": "12 34 ell me", "rejected": "99 of it."},
        *rows((TOYS, ONE_PHRASE)),
    ]
    tokens = tokenize(tmp_path, given, tok, degrading=Degrading(STOP | {"ell"}, 2))
    assert len(tok(" Tell")["input_ids"]) == 2, "BOS and one token"
    assert tok.decode(tokens.train[0]["prompt_ids"]) == "<s>Human: T"
    assert tok.decode(tokens.train[0]["response_ids"][0]) == "12 34 ell me</s>"
    assert tokens.train["degraded_levels"][:] == [[[], []], [[1], []]]
    assert record(tokens).sources[0].changed == {receipt.NO_DEGREES: 2}


@pytest.mark.parametrize("template", [CHATML, LLAMA3, WITHOUT_TURN_END, MISTRAL, PHI])
def test_chats(template: str, tmp_path: Path) -> None:
    """A degraded answer has the tokens that it would have as an answer of its own, up to its end-of-turn."""
    tok = tokenizer(template=template)
    toys = TOYS.strip()
    one = tokenize(tmp_path, [chat_row(chosen=toys, rejected="It is tea.")], tok).train[0]
    assert one["degraded_levels"] == [[1, 2], [3]]
    own = tokenize(tmp_path, [chat_row(chosen=FIRST.strip(), rejected="It is.")], tok, degrading=None).train[
        0
    ]
    assert one["prompt_ids"] == own["prompt_ids"]
    assert [versions[0] for versions in one["degraded_ids"]] == own["response_ids"]


REFUSES_EMPTY = CHATML.replace(
    "{% for m in messages %}",
    "{% for m in messages %}{% if not m['content'] %}{{ raise_exception('empty message') }}{% endif %}",
)


def test_a_version_that_the_template_refuses_does_not_take_its_row_along(tmp_path: Path) -> None:
    """Without its only phrase the first of two answers is empty, which some templates refuse; the row is sound."""
    tok = tokenizer(template=REFUSES_EMPTY)
    several = chat_row()
    several["chosen"] = [
        {"role": "assistant", "content": "Big red ball"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "It is a toy."},
    ]
    given = [several, chat_row(chosen=TOYS.strip())]
    assert len(tokenize(tmp_path, given, tok, degrading=None).train) == 2
    degraded = tokenize(tmp_path, given, tok)
    assert record(degraded).dropped() == {}
    assert len(degraded.train) == 2


def test_truncated_responses_take_no_part(tmp_path: Path) -> None:
    """They end in the middle, which would tell them from all that are whole."""
    long = TOYS + " The small cat and a dog are fine." * 4
    given = rows((TOYS, ONE_PHRASE), (long, TOYS))
    room = len(tokenize(tmp_path, given[:1]).train[0]["response_ids"][0])
    prompt = len(tokenize(tmp_path, given[:1]).train[0]["prompt_ids"])
    tokens = tokenize(tmp_path, given, max_length=prompt + room, on_overflow="truncate_response")
    assert tokens.train["degraded_levels"][:] == [[[1, 2], [3]], [[], [1, 2]]]
    assert record(tokens).sources[0].changed == {receipt.TRUNCATED: 1, receipt.NO_DEGREES: 1}
    assert record(tokens).degrees == {
        "responses": 4,
        "taking_part": 3,
        "levels": {"0": 3, "1": 2, "2": 2, "3": 1},
    }


@pytest.mark.parametrize(
    ("apply_to", "levels", "responses", "counts", "noted"),
    [
        ("both", [[[1, 2], [3]], [[], [1, 2]], [[3], []]], 6, [4, 2, 2, 2], 2),
        ("chosen", [[[1, 2], []], [[], []], [[3], []]], 3, [2, 1, 1, 1], 1),
        ("rejected", [[[], [3]], [[], [1, 2]], [[], []]], 3, [2, 1, 1, 1], 1),
    ],
)
def test_sides_and_the_receipt(
    apply_to: Any, levels: Any, responses: int, counts: list[int], noted: int, tmp_path: Path
) -> None:
    """Rows with a response that was to take part and has no phrase are noted; they stay."""
    tokens = tokenize(tmp_path, GIVEN[:3], degrading=Degrading(STOP, 4, apply_to))
    assert tokens.train["degraded_levels"][:] == levels
    assert record(tokens).degrees == {
        "responses": responses,
        "taking_part": counts[0],
        "levels": {str(level): count for level, count in enumerate(counts)},
    }
    assert record(tokens).sources[0].changed[receipt.NO_DEGREES] == noted
    assert record(tokens).dropped() == {}


LIST = {"prompt": "Question?", "responses": [ONE_PHRASE, TOYS, NOTHING, " The cat."], "scores": [3, 4, 2, 1]}
"""Ranked: TOYS, ONE_PHRASE, NOTHING, the cat; the last, without its phrase, says nothing but "The."."""


def test_lists(tmp_path: Path) -> None:
    tokens = tokenize(tmp_path, [LIST])
    assert tokens.train[0]["degraded_levels"] == [[1, 2], [3], [], [3]]
    assert record(tokens).degrees["responses"] == 4
    rejected = tokenize(tmp_path, [LIST], degrading=Degrading(STOP, 4, "rejected"))
    assert rejected.train[0]["degraded_levels"] == [[], [3], [], [3]]


@pytest.mark.parametrize(
    ("apply_to", "levels", "responses", "counts"),
    [
        ("both", [[[1, 2], [3]], [[3], []], [[], [3]]], 6, [4, 1, 1, 3]),
        ("chosen", [[[1, 2], []], [[3], []], [[], []]], 3, [2, 1, 1, 1]),
        ("rejected", [[[], [3]], [[], []], [[], [3]]], 3, [2, 0, 0, 2]),
    ],
)
def test_pairs_made_of_lists(
    apply_to: Any, levels: Any, responses: int, counts: list[int], tmp_path: Path
) -> None:
    """A response in the middle of its list is chosen in one pair and rejected in another; the list is noted once."""
    tokens = tokenize(tmp_path, [LIST], degrading=Degrading(STOP, 4, apply_to), lists="adjacent_pairs")
    assert tokens.train["degraded_levels"][:] == levels
    assert record(tokens).degrees == {
        "responses": responses,
        "taking_part": counts[0],
        "levels": {str(level): count for level, count in enumerate(counts)},
    }
    assert record(tokens).sources[0].changed == {receipt.NO_DEGREES: 1}


@pytest.mark.parametrize(
    ("apply_to", "lists", "noted"),
    [
        ("chosen", "whole", 0),
        ("chosen", "all_pairs", 1),  # it is chosen over the last
        ("rejected", "whole", 1),
        ("rejected", "all_pairs", 1),
    ],
)
def test_the_note_is_about_the_responses_as_they_are_compared(
    apply_to: Any, lists: Any, noted: int, tmp_path: Path
) -> None:
    """Of the list's responses only the third has no degrees; of the other list only the last, which is never chosen."""
    worst = {**LIST, "responses": [ONE_PHRASE, TOYS, NOTHING], "scores": [2, 3, 1]}
    tokens = tokenize(tmp_path, [LIST, worst], degrading=Degrading(STOP, 4, apply_to), lists=lists)
    also = 1 if apply_to == "rejected" else 0
    assert record(tokens).sources[0].changed.get(receipt.NO_DEGREES, 0) == noted + also


def test_responses_that_a_list_loses_take_their_degrees_along(tmp_path: Path) -> None:
    long = " The cat and a big dog of it." * 20
    given = [{**LIST, "responses": [long, TOYS, ONE_PHRASE, " The cat."]}]
    tokens = tokenize(tmp_path, given, max_length=60)
    assert record(tokens).sources[0].changed == {receipt.TOO_LONG_LEFT_OUT: 1}
    assert tokens.train[0]["ranks"] == [0, 1, 2]
    assert tokens.train[0]["degraded_levels"] == [[1, 2], [3], [3]]


def test_repeats_have_the_degrees_of_their_row(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "w.jsonl", rows((TOYS, ONE_PHRASE)))
    wanted = settings({"source": path, "weight": 2})
    tokens = data.tokenize(data.load(wanted), tokenizer(), wanted, degrading=Degrading(STOP, 4))
    assert tokens.train["degraded_levels"][:] == [[[1, 2], [3]]] * 2
    assert record(tokens).degrees["taking_part"] == 4


def test_fingerprints(tmp_path: Path) -> None:
    """They cover what is trained on: versions where there are any, and nothing else than before where not."""
    given = rows((TOYS, ONE_PHRASE))
    plain = tokenize(tmp_path, given, degrading=None).fingerprints
    found = {
        tokenize(tmp_path, given, degrading=degrading).fingerprints["train"]
        for degrading in (
            Degrading(STOP, 4),
            Degrading(STOP, 4, "chosen"),
            Degrading(STOP, 2),
            Degrading(STOP - {"of", "is"}, 4),
        )
    }
    assert len(found | set(plain.values())) == 5
    # The same versions at other levels are other data: one phrase goes at level 3 of 4 and at level 2 of 3.
    tea = rows((ONE_PHRASE, NOTHING))
    versions = [tokenize(tmp_path, tea, degrading=Degrading(STOP, levels)) for levels in (4, 3)]
    assert versions[0].train["degraded_ids"][:] == versions[1].train["degraded_ids"][:]
    assert versions[0].fingerprints != versions[1].fingerprints


def test_data_without_any_degrees_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        tokenize(tmp_path, rows((NOTHING, " It is the."), (" Of.", NOTHING)))
    message = str(caught.value)
    for part in ("dataset.train: none of the 4 responses", "(7 of them)", "method.stopwords"):
        assert part in message, message


def test_an_eval_set_without_any_is_no_mistake(tmp_path: Path) -> None:
    bare = jsonl(tmp_path / "bare.jsonl", rows((NOTHING, " It is the.")))
    tokens = tokenize(tmp_path, rows((TOYS, NOTHING)), eval={"bare": bare})
    assert tokens.eval["bare"]["degraded_levels"][:] == [[[], []]]
    assert tokens.eval["bare"]["degraded_ids"][:] == [[[], []]]
    assert tokens.receipt.sets["bare"].degrees["taking_part"] == 0
