"""How many key phrases each level removes, and the responses that come of it."""

from typing import Any

import pytest

from prefopt_cli.data.degrees import degrade, removed_counts
from prefopt_cli.data.stopwords import find_stopwords
from tests.conftest import REPOSITORY

STOP = frozenset({"the", "a", "of", "and", "is", "in", "it"})


@pytest.mark.parametrize(
    ("phrases", "levels", "expected"),
    [
        (8, 4, [(0, 0), (1, 2), (2, 4), (3, 6)]),
        (5, 4, [(0, 0), (1, 1), (2, 2), (3, 4)]),  # 1.25, 2.5 (to even), 3.75
        (2, 4, [(0, 0), (2, 1), (3, 2)]),  # 0.5 (to even: as level 0), 1, 1.5
        (1, 4, [(0, 0), (3, 1)]),  # 0.25, 0.5, 0.75
        (0, 4, [(0, 0)]),
        (7, 2, [(0, 0), (1, 4)]),
        (100, 1, [(0, 0)]),
    ],
)
def test_removed_counts(phrases: int, levels: int, expected: list[tuple[int, int]]) -> None:
    assert removed_counts(phrases, levels) == expected


TEXT = " The big red ball is in the green box, and it is a toy. The cat of Rome."
"""Scores: big red ball 9, green box 4, toy, cat and rome 1 each in this order; levels 1 to 3 remove 1, 2, 4."""


def test_levels_remove_the_best_first() -> None:
    assert degrade(TEXT, STOP, 4) == [
        (1, " The is in the green box, and it is a toy. The cat of Rome."),
        (2, " The is in the, and it is a toy. The cat of Rome."),
        (3, " The is in the, and it is a. The of Rome."),
    ]


def test_every_occurrence_goes_but_none_inside_a_longer_phrase() -> None:
    """Scores: pear 3/2 at its 3 of 4 occurrences alone (deg 5 / freq 4), ripe pear 2 + 1.25, plum 1."""
    text = "A pear, a ripe pear and a plum; the Pear is a PEAR."
    assert degrade(text, STOP, 3) == [
        (1, "A pear, a and a plum; the Pear is a PEAR."),
        (2, "A, a and a plum; the is a."),
    ]


def _says(content: Any, role: str = "assistant", **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def test_messages_are_ranked_together() -> None:
    response = [
        _says("The big red ball.", tool_calls=[1]),
        _says("the big red ball", role="tool"),
        _says([{"type": "text", "text": "the big red ball"}]),
        _says(None),
        _says("It is a toy in the green box, a BIG red  ball."),
    ]
    expected = [_says("The.", tool_calls=[1]), *response[1:4], _says("It is a toy in the green box, a.")]
    before = [dict(message) for message in response]
    found = degrade(response, STOP, 3)
    assert found[0] == (1, expected)
    assert found[1] == (2, [*expected[:4], _says("It is a toy in the, a.")])
    assert response == before


def test_an_emptied_message_stays_while_another_has_words() -> None:
    assert degrade([_says("Big red ball!"), _says("It is a toy.")], STOP, 2) == [
        (1, [_says(""), _says("It is a toy.")])
    ]


def test_levels_without_a_word_are_left_out() -> None:
    """Two phrases: level 2 of 4 removes one, level 3 both."""
    assert degrade("Red ball, toy!", STOP, 4) == [(2, "toy!")]
    assert degrade("1. Red ball\n2. Toy", STOP, 4) == [(2, "2. Toy")]
    assert degrade("Ball.", STOP, 4) == []


@pytest.mark.parametrize(
    "response",
    [
        "",
        "  \n",
        "The, of it?",
        "🎉 ❤️ 👨‍👩‍👧",
        [],
        [_says("")],
        [_says("red ball of it", role="user")],
        [_says(None)],
        [{}],
    ],
)
def test_no_part(response: Any) -> None:
    assert degrade(response, STOP, 4) == []


def test_text_from_right_to_left() -> None:
    assert degrade("הכלב הגדול של, דנה", {"של"}, 2) == [(1, "של, דנה")]


@pytest.mark.parametrize(
    ("response", "left"),
    [
        ("Col·laboració de, dona", "de, dona"),
        ('הצבא צה"ל של, ארה״ב', "של, ארה״ב"),
        ("Co\u00adopera\u00adtion works of, co\u00adopted", "of, co\u00adopted"),
        ("ሰላም፡ዓለም፡ነው፡አበባ።", "ነው፡አበባ።"),
    ],
)
def test_words_with_marks_inside_go_or_stay_whole(response: str, left: str) -> None:
    assert degrade(response, {"de", "של", "of", "ነው"}, 2) == [(1, left)]


def test_a_phrase_goes_however_it_is_written() -> None:
    """Cooperation, with soft hyphens or without, is one phrase of score 1, before the toy's 1."""
    assert degrade("Coope\u00adration of a café, the cooperation of a cafe\u0301; it is a toy", STOP, 3) == [
        (1, "of a café, the of a cafe\u0301; it is a toy"),
        (2, "of a, the of a; it is a toy"),
    ]


def test_a_very_long_response() -> None:
    found = degrade("The red ball is in a box of toys. " * 10_000, STOP, 4)
    assert found[-1] == (2, "The is in a of toys. " * 10_000)  # of three phrases, level 3 removes two as well
    assert degrade("x" * 1_000_000, STOP, 4) == []


def test_the_example_of_the_documentation() -> None:
    page = (REPOSITORY / "docs" / "self-supervised.md").read_text(encoding="utf-8")
    original, *shown = [line.removeprefix("> ") for line in page.splitlines() if line.startswith("> ")]
    made = dict(degrade(original, find_stopwords("en"), 4))
    assert shown == [f"level {level} of 4: {made[level]}" for level in (1, 3)]
