"""RAKE against hand arithmetic; what a word is in several scripts; where a phrase ends."""

import pytest

from prefopt_cli.data.keyphrases import Candidate, candidates, has_word, normal_form, rake, score_phrases

STOP = frozenset({"the", "of", "is", "don't", "are", "and", "ist", "है"})


def _phrases(text: str) -> list[str]:
    return [one.phrase for one in candidates(text, STOP)]


def test_scores_by_hand() -> None:
    """Phrases: "red ball", "big red ball", "ball". freq red 2, ball 3, big 1; deg red 2+3, ball 2+3+1, big 3.

    red 5/2, ball 6/3, big 3/1: "big red ball" 7.5, "red ball" 4.5, "ball" 2.
    """
    found = rake("The red ball is the big red ball, and the ball.", STOP)
    assert found == [("big red ball", 7.5), ("red ball", 4.5), ("ball", 2.0)]


def test_repeats_count_for_frequency_and_degree() -> None:
    """ "new new cat" twice: new freq 4, deg 12; cat freq 2, deg 6 (+1 alone: 3 and 7)."""
    found = dict(rake("New new cat. New  new cat. Cat", STOP))
    assert found == pytest.approx({"new new cat": 3 + 3 + 7 / 3, "cat": 7 / 3})


def test_equal_scores_stay_in_the_order_of_the_text() -> None:
    assert [phrase for phrase, _ in rake("zeta and alpha, mid dle and at ease", STOP)] == [
        "mid dle",
        "at ease",
        "zeta",
        "alpha",
    ]


def test_the_order_of_words_does_not_break_a_tie() -> None:
    """0.1 + 0.2 + 0.3 in another order is another float: the sums here must be equal all the same."""
    found = [Candidate(phrase, 0, 0) for phrase in ("a b c", "c b a", "b", "b x", "c", "c", "a y z w", "a")]
    scores = dict(score_phrases(found))
    assert scores["a b c"] == scores["c b a"]


def test_offsets_are_those_of_the_original() -> None:
    text = " The Poodle’s  ÇA\tva, İstanbul and Rome"
    found = candidates(text, STOP)
    assert [text[one.start : one.end] for one in found] == ["Poodle’s  ÇA\tva", "İstanbul", "Rome"]
    assert found[0].phrase == "poodle's ça va"
    assert found[1].phrase == "istanbul"  # lower() alone makes two characters of İ
    assert found[2].phrase == "rome"
    text = "C\u0327a va, co\u00adope\u00adra\u00adtion"
    found = candidates(text, STOP)
    assert [text[one.start : one.end] for one in found] == text.split(", ")
    assert [one.phrase for one in found] == ["ça va", "cooperation"]


@pytest.mark.parametrize(
    ("written", "normal"),
    [
        ("The", "the"),
        ("Don’t", "don't"),
        ("donʼt", "don't"),
        ("U\u0308BER", "über"),
        ("İÇİN", "için"),
        ("I\u0307C\u0327I\u0307N", "için"),
        ("I\u0307\u0301", "í"),
        ("ei\u00adne", "eine"),
        ("ΛΌΓΟΣ", "λόγος"),
    ],
)
def test_normal_form(written: str, normal: str) -> None:
    assert normal_form(written) == normal_form(normal) == normal


@pytest.mark.parametrize(
    ("stopword", "text"),
    [
        ("için", "güzel İÇİN ev"),
        ("für", "gut FU\u0308R dich"),
        ("don't", "we donʼt go"),
        ("eine", "so ei\u00adne da"),
    ],
)
def test_a_stop_word_is_met_however_it_is_written(stopword: str, text: str) -> None:
    before, _, after = normal_form(text).partition(f" {stopword} ")
    assert [one.phrase for one in candidates(text, {stopword})] == [before, after]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("well-known state-of-the-art AR-15", ["well-known state-of-the-art ar-15"]),
        ("don’t panic", ["panic"]),
        ("rock ’n’ roll", ["rock", "n", "roll"]),
        ("the 'quoted words'", ["quoted words"]),
        ("3.5 of 1,000.25 and 3. 5", ["3.5", "1,000.25", "3", "5"]),
        ("3,a", ["3", "a"]),
        ("big\nred", ["big", "red"]),
        ("big\u2028red\r\nball", ["big", "red", "ball"]),
        ("big\t \u00a0red", ["big red"]),
        ("big -- red_ball/cat", ["big", "red", "ball", "cat"]),
        ("हिन्दी भाषा है सुन्दर", ["हिन्दी भाषा", "सुन्दर"]),
        ("می\u200cخواهم آب، نان", ["می\u200cخواهم آب", "نان"]),
        ("cafe\u0301 noir", ["café noir"]),
        ("我喜欢苹果。你呢", ["我喜欢苹果", "你呢"]),
        ("שלום עולם", ["שלום עולם"]),
        ('צה"ל ארה״ב ג׳ירפה', ['צה"ל ארה״ב ג׳ירפה']),
        ('"צה"ל", "שלום" עולם 5"x', ['צה"ל', "שלום", "עולם 5", "x"]),
        ("col·laboració in·tel‧ligent · col·", ["col·laboració in·tel‧ligent", "col"]),
        ("ሰላም፡ዓለም፣አዲስ፡ አበባ።ነው", ["ሰላም ዓለም", "አዲስ አበባ", "ነው"]),
        ("❤️ 👨‍👩‍👧 🎉", []),
        ("❤️love", ["love"]),
        (
            "1. first\n 2) second\n(3) third\n- 4th\n* 5 apples",
            ["first", "second", "third", "4th", "5 apples"],
        ),
        ("> 1. quoted\n## Head\n42", ["quoted", "head", "42"]),
        ("1.5 litres\n2.litres", ["1.5 litres", "2", "litres"]),
        ("the of", []),
        ("", []),
    ],
)
def test_words_and_phrases(text: str, expected: list[str]) -> None:
    assert _phrases(text) == expected


@pytest.mark.parametrize(
    ("text", "has"), [("the", True), ("7", True), ("", False), (" ?! ❤️ -", False), ("1. !", False)]
)
def test_has_word(text: str, has: bool) -> None:
    assert has_word(text) is has


@pytest.mark.parametrize(
    "text", ["a" * 10**6, "-" * 10**6, " " * 10**6, "\n" * 10**6, "1." * 10**6, "'a" * 10**6]
)
def test_long_runs_are_read_once(text: str) -> None:
    """A pattern that tries again from every character would take hours."""
    assert len(candidates(text, STOP)) <= len(text)
