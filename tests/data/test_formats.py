"""Every format is recognised, named in the receipt, and read as its documentation says."""

from pathlib import Path
from typing import Any, get_args

import pytest

from prefopt_cli import data
from prefopt_cli.data.formats import FORMATS
from prefopt_cli.data.receipt import EMPTY_SIDE, IDENTICAL, NO_SHARED_PROMPT
from prefopt_cli.recipe.schema import Source
from tests.data.build import chat_row, jsonl, settings

USER = {"role": "user", "content": "Why?"}
YES = {"role": "assistant", "content": "Yes"}
NO = {"role": "assistant", "content": "No"}
SYSTEM = {"role": "system", "content": "Be brief."}
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"

CASES: list[tuple[str, dict[str, Any], tuple[Any, Any, Any]]] = [
    ("standard", {"prompt": "p", "chosen": "a", "rejected": "b"}, ("p", "a", "b")),
    ("standard", {"prompt": "", "chosen": "a", "rejected": "b"}, ("", "a", "b")),
    ("standard", {"prompt": TRANSCRIPT, "chosen": " a", "rejected": " b"}, (TRANSCRIPT, " a", " b")),
    ("conversational", {"prompt": [USER], "chosen": [YES], "rejected": [NO]}, ([USER], [YES], [NO])),
    (
        "conversational",  # responses that repeat the prompt
        {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]},
        ([SYSTEM, USER], [YES], [NO]),
    ),
    ("implicit_conversational", {"chosen": [USER, YES], "rejected": [USER, NO]}, ([USER], [YES], [NO])),
    (
        "implicit_conversational",  # UltraFeedback-binarized
        {"prompt": "Why?", "chosen": [USER, YES], "rejected": [USER, NO]},
        ([USER], [YES], [NO]),
    ),
    ("implicit_conversational", {"prompt": "Why?", "chosen": [YES], "rejected": [NO]}, ([USER], [YES], [NO])),
    (
        "implicit_conversational",  # a shared first answer belongs to the prompt
        {"prompt": "Why?", "chosen": [YES, USER, YES], "rejected": [YES, USER, NO]},
        ([USER, YES, USER], [YES], [NO]),
    ),
    (
        "implicit_conversational",
        {"chosen": [USER, YES, USER, YES], "rejected": [USER, YES, USER, NO]},
        ([USER, YES, USER], [YES], [NO]),
    ),
    (
        "hh_transcript",
        {"chosen": TRANSCRIPT + " Because.", "rejected": TRANSCRIPT + " Be quiet."},
        (TRANSCRIPT, " Because.", " Be quiet."),
    ),
    (
        "hh_transcript",  # the answers differ before the last turn: later turns belong to the responses
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: x\n\nAssistant: B",
            "rejected": "\n\nHuman: Hi\n\nAssistant: C",
        },
        ("\n\nHuman: Hi\n\nAssistant:", " A\n\nHuman: x\n\nAssistant: B", " C"),
    ),
    (
        "implicit_standard",
        {"chosen": "The sky is blue", "rejected": "The sky is black"},
        ("The sky is", " blue", " black"),
    ),
    ("implicit_standard", {"chosen": "Q: a\nA1", "rejected": "Q: a\nA2"}, ("Q: a\n", "A1", "A2")),
    (
        "implicit_standard",
        {"chosen": "The sky is", "rejected": "The sky is red"},
        ("The sky", " is", " is red"),
    ),
    (
        "implicit_standard",
        {"chosen": "问:天是什么颜色?答:蓝", "rejected": "问:天是什么颜色?答:红"},
        ("问:天是什么颜色?答:", "蓝", "红"),
    ),
]


@pytest.mark.parametrize(("format", "columns", "expected"), CASES)
def test_formats(
    format: str, columns: dict[str, Any], expected: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "p.jsonl", [columns])
    for asked in ("auto", format):
        loaded = data.load(settings({"source": path, "format": asked}))
        assert (loaded.train[0].prompt, *loaded.train[0].responses) == expected
        assert loaded.train[0].ranks == (0, 1)
        assert loaded.receipt.sets["train"].sources[0].format == format


def test_renamed_columns_win_over_columns_of_that_name(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": 7, "question": "q", "good": "a", "bad": "b"}])
    source = {"source": path, "columns": {"prompt": "question", "chosen": "good", "rejected": "bad"}}
    pair = data.load(settings(source)).train[0]
    assert (pair.prompt, *pair.responses) == ("q", "a", "b")


def test_keys_that_only_other_messages_have_are_left_out(tmp_path: Path) -> None:
    named = {"prompt": [{**USER, "name": "Ann"}], "chosen": [YES], "rejected": [NO]}
    first, second = data.load(settings(jsonl(tmp_path / "p.jsonl", [named, chat_row()]))).train
    assert first.prompt == [{**USER, "name": "Ann"}]
    assert second.prompt == [{"role": "user", "content": "Tell me"}]


def _dropped(path: str, format: str = "auto") -> dict[str, int]:
    return data.load(settings({"source": path, "format": format})).receipt.sets["train"].sources[0].dropped


def test_unusable_chats_are_counted(tmp_path: Path) -> None:
    good = {"chosen": [USER, YES], "rejected": [USER, NO]}
    listed = [
        *[
            {
                **good,
                "chosen": [{**USER, "content": f"Why {n}?"}, YES],
                "rejected": [{**USER, "content": f"Why {n}?"}, NO],
            }
            for n in range(9)
        ],
        {**good, "rejected": [YES, USER, NO]},
        {**good, "rejected": [USER, YES]},
        {**good, "rejected": [USER, {**NO, "content": " \n"}]},
        {**good, "rejected": [USER, USER]},
        {**good, "rejected": []},
        {**good, "rejected": [USER, {"role": "assistant", "content": None}]},
    ]
    assert _dropped(jsonl(tmp_path / "p.jsonl", listed)) == {
        NO_SHARED_PROMPT: 1,
        IDENTICAL: 1,
        EMPTY_SIDE: 1,
        "malformed: rejected does not start and end with an assistant message": 1,
        "malformed: rejected is an empty list, not messages": 1,
        "malformed: a message in rejected lacks a text role or content": 1,
    }


def test_transcripts_without_a_shared_turn_are_counted(tmp_path: Path) -> None:
    other = {"chosen": "\n\nHuman: a\n\nAssistant: x", "rejected": "\n\nHuman: b\n\nAssistant: x"}
    listed = [{"chosen": TRANSCRIPT + f" {n}", "rejected": TRANSCRIPT + " no"} for n in range(3)]
    assert _dropped(jsonl(tmp_path / "p.jsonl", [*listed, other])) == {NO_SHARED_PROMPT: 1}


def test_a_few_odd_rows_do_not_change_the_format(tmp_path: Path) -> None:
    odd = {"prompt": None, "chosen": "x", "rejected": "y"}
    loaded = data.load(
        settings(jsonl(tmp_path / "p.jsonl", [odd, *[CASES[0][1] | {"prompt": f"{n}"} for n in range(3)]]))
    )
    record = loaded.receipt.sets["train"].sources[0]
    assert record.format == "standard"
    assert record.dropped == {"malformed: prompt is nothing, not text": 1}
    assert record.examples == {"malformed: prompt is nothing, not text": ["p.jsonl:0"]}


def test_a_recipe_may_name_every_format() -> None:
    assert set(get_args(Source.model_fields["format"].annotation)) == {"auto", *FORMATS}
