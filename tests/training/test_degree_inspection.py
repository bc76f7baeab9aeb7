"""How a response is shown at its levels."""

import random

import pytest

from prefopt_cli.data.degrees import degrade
from prefopt_cli.data.tables import TokenRow, as_dataset, columns_of
from prefopt_cli.training.degree_inspection import Cut, first_degraded, removed
from prefopt_cli.training.row_text import text_after
from tests.tiny import build_tokenizer


def applied(text: str, cuts: list[Cut]) -> str:
    """The text after the cuts."""
    left, at = [], 0
    for cut in cuts:
        left += [text[at : cut.start], cut.instead]
        at = cut.end
    return "".join([*left, text[at:]])


@pytest.mark.parametrize(
    ("text", "left", "gone"),
    [
        ("We will replace your mattress soon.", "We will your mattress soon.", [" replace"]),
        ("Apples, pears, plums.", "Apples, plums.", [" pears,"]),
        ("the cat and the dog and the cow", "the cat and the cow", [" dog and the"]),
        # The blank before "of" is another one than before; it is still the same word.
        ("You need:\n\n1 piece of paper", "You need:\n\nof paper", ["1 piece "]),
        ("Same.", "Same.", []),
    ],
)
def test_what_is_gone(text: str, left: str, gone: list[str]) -> None:
    cuts = list(removed(text, left))
    assert applied(text, cuts) == left
    assert [text[cut.start : cut.end] for cut in cuts] == gone or len("".join(gone)) == sum(
        cut.end - cut.start for cut in cuts
    )
    assert not any(cut.instead for cut in cuts)


def test_what_was_added_stands_in_its_place() -> None:
    assert list(removed("one-two three", "one two three")) == [Cut(3, 4, " ")]


def test_cuts_always_lead_to_what_is_left() -> None:
    """Random texts of few words, so that most words occur many times."""
    draw = random.Random(0)
    for _ in range(200):
        text = "".join(draw.choice(["tea ", "of ", "the ", "map, ", "\n", "(rain) "]) for _ in range(40))
        for _, left in degrade(text, frozenset({"of", "the"}), 4):
            assert applied(text, list(removed(text, str(left)))) == left


def test_a_long_text_takes_no_time() -> None:
    """3,000 words, the commonest of them 1,000 times; every third is gone."""
    draw = random.Random(0)
    words = [draw.choice(["the", "of", f"word{draw.randrange(500)}"]) for _ in range(3000)]
    text, left = " ".join(words), " ".join(word for n, word in enumerate(words) if n % 3)
    assert applied(text, list(removed(text, left))) == left


def test_the_first_response_that_takes_part() -> None:
    tokenizer = build_tokenizer()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    prompt, chosen, rejected, left = map(ids, ("Say:", " yes", " no maps or ships", " no or ships"))
    rows = [
        TokenRow("a:1", prompt, (chosen, rejected), (0, 1), ((), ())),
        TokenRow("a:2", prompt, (chosen, rejected), (0, 1), ((), ((2, left),))),
    ]
    found = first_degraded(as_dataset(columns_of(rows)), tokenizer)

    assert found is not None
    assert (found.row_id, found.side, found.text, found.tokens) == (
        "a:2",
        "rejected",
        " no maps or ships",
        len(rejected),
    )
    (version,) = found.levels
    assert (version.level, version.tokens, version.text) == (2, len(left), " no or ships")
    assert version.removed == [Cut(3, 8, "")]
    assert first_degraded(as_dataset(columns_of(rows[:1])), tokenizer) is None


def test_a_text_after_half_a_character() -> None:
    """The bytes of an e with an accent are two tokens; the prompt ends between them."""
    tokenizer = build_tokenizer()
    first, second = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert text_after(tokenizer, [first], [second]) == tokenizer.decode([second])
