"""Words taken out of texts: what is tidied at the seams, and that nothing else ever changes."""

import random
import re
from itertools import pairwise
from typing import Any

import pytest

from prefopt_cli.data.keyphrases import WORD, candidates
from prefopt_cli.data.removal import remove


def _marked(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text and the spans of "one ⟦two⟧ three", where ⟦two⟧ is to go."""
    text, spans = "", []
    for part in re.split("(⟦.*?⟧)", marked, flags=re.DOTALL):
        if part.startswith("⟦"):
            spans.append((len(text), len(text) + len(part) - 2))
            part = part[1:-1]
        text += part
    return text, spans


SEAMS = {
    "blanks": [
        ("I like ⟦green⟧ pears", "I like pears"),
        ("⟦Green⟧ pears", "pears"),
        ("like ⟦pears⟧", "like"),
        ("a\t⟦b⟧\tc", "a\tc"),
        ("⟦a⟧ of ⟦b⟧ of ⟦c⟧", "of of"),
        ("a ⟦b⟧\u00a0⟦c⟧ d", "a d"),
        ("ሰላም፡⟦ዓለም⟧፡ነው", "ሰላም፡ነው"),
        ("⟦ሰላም⟧፡ዓለም፡⟦ነው⟧", "ዓለም"),
        (" ⟦Hello⟧, all\n ", " all\n "),
    ],
    "weaker punctuation": [
        ("I like ⟦apples⟧, pears, and ⟦plums⟧.", "I like, pears, and."),
        ("⟦Apples⟧, ⟦pears⟧, and more, ⟦plums⟧.", "and more."),
        ("Fruits: ⟦apples⟧, pears", "Fruits: pears"),
        ("more, ⟦apples⟧; less", "more; less"),
        ("so: ⟦apples⟧\nthen", "so\nthen"),
        ("these ⟦apples⟧:\nthen", "these:\nthen"),
        ("e.g., ⟦apples⟧, pears", "e.g., pears"),
        ("me — ⟦apples⟧ — you", "me — you"),
        ("me—⟦apples⟧—you", "me—you"),
        ("the ⟦road⟧- ⟦racing⟧ of", "the of"),
        ("his ⟦apple⟧/pear", "his pear"),
        ("apple/⟦pear⟧/plum", "apple/plum"),
    ],
    "ends of sentences": [
        ("It is. ⟦Apples⟧! Then", "It is. Then"),
        ("It is.  ⟦Apples⟧, or", "It is. or"),
        ("It is ⟦red⟧?!  Then", "It is?!  Then"),
        ("wait... ⟦what⟧... yes", "wait... yes"),
        ("«Oh, ⟦non⟧\u202f!»", "«Oh\u202f!»"),
        ("我们 ⟦喜欢⟧，苹果。", "我们，苹果。"),
        ("तुम ⟦दुनिया⟧। और", "तुम। और"),
        ("this ⟦one⟧ :) yes", "this :) yes"),
        ("ሰላም፣ ⟦ዓለም⟧። ነው", "ሰላም። ነው"),
    ],
    "brackets, quotes, emphasis": [
        ("the (⟦red⟧) pie", "the pie"),
        ("(⟦red⟧, ⟦green⟧).", ""),
        ("pie (⟦red⟧, ⟦green⟧).", "pie."),
        ("pie (or ⟦red⟧), and", "pie (or), and"),
        ("pie (⟦red⟧ or)", "pie (or)"),
        ('the "⟦red⟧" pie', "the pie"),
        ("the “⟦red⟧,” he", "the he"),
        ('"one" ⟦and⟧ "two"', '"one" "two"'),
        ("„⟦Rot⟧“ ist", "ist"),
        ("»⟦Rot⟧« ist", "ist"),
        ("¿⟦Rojo⟧? Si", "Si"),
        ("a **⟦red⟧** *and* pie", "a *and* pie"),
        ("the *“⟦red⟧”*. Yes", "the. Yes"),
        ("call `⟦red⟧` now", "call now"),
        ("keep f() and ⟦red⟧ f()", "keep f() and f()"),
        ('"Or pears," ⟦apples⟧, and', '"Or pears," and'),
        ('"Or pears," ⟦apples⟧.', '"Or pears".'),
        ("the ⟦dogs⟧’ food", "the food"),
        ("the 'big ⟦dogs⟧' food", "the 'big' food"),
    ],
    "signs of a number": [
        ("costs $⟦5⟧ or 20% of ⟦6⟧%, or", "costs or 20% of, or"),
        ("it was ⟦cold⟧ -5 or -⟦6⟧ there", "it was -5 or there"),
        ("$3 ⟦off⟧,5", "$3, 5"),
    ],
    "lines": [
        ("- ⟦one⟧\n- two\n- ⟦three⟧", "- two"),
        ("1. ⟦one⟧ and\r\n2. ⟦two⟧.\r\n3. or", "1. and\r\n3. or"),
        ("a\n\n⟦b⟧.\n\nc", "a\n\nc"),
        ("⟦a⟧\n\n    c = 1", "    c = 1"),
        ("a  \n\n⟦b⟧ ⟦c⟧", "a  "),
        ("## ⟦One⟧ of\n> ⟦two⟧ or", "## of\n> or"),
        ("Code:\n```⟦python⟧\nx  =  1\n```", "Code:\n```\nx  =  1\n```"),
        ("| ⟦a⟧ | b |\n|---|---|", "| | b |\n|---|---|"),
        ("  ⟦one⟧ \n ", "   \n "),
    ],
    "not glued": [
        ("a_⟦b⟧_c", "a_c"), ("a⟦ ⟧c", "a c"), ("1⟦ of⟧,000", "1, 000"), ("a'⟦ b ⟧c", "a' c"), ('א"⟦ב ⟧ג', 'א" ג'),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("marked", "expected"), [case for cases in SEAMS.values() for case in cases])
def test_seams(marked: str, expected: str) -> None:
    text, spans = _marked(marked)
    assert remove(text, spans) == expected
    assert remove(text, spans[::-1]) == expected


def test_what_was_not_cut_stays_as_it_was() -> None:
    ugly = '  so ,  () "" **** `` ,, . . ( x )\n\n\n\n-\n'
    text, spans = _marked(f" {ugly}the ⟦red⟧ pie\n{ugly}")
    assert remove(text, spans) == f" {ugly}the pie\n{ugly}"
    assert remove(text, []) == remove(text, [(3, 3)]) == text


WORDS = [
    "the", "of", "and", "pears", "Äpfel", "can’t", "well-known", "3.5", "2024", "हिन्दी", "我们", "می\u200cخواهم",
    "col·laboració", 'צה"ל', "ארה״ב", "co\u00adopera\u00adtion", "ሰላም",
]  # fmt: skip
PROSE = [*WORDS, "(pears)", '"the pears"', "(of pears, and figs)", "*pears*,", "(and “figs”)."]
PLAIN = [" ", " ", " ", ", ", ". ", "; ", "! "]
BETWEEN = [
    *PLAIN, " (", ") ", ' "', '" ', "  ", ".  ", "?", ": ", " - ", "—", "-", "/", "_", "'", "’ ", " **", "** ",
    "`", "``", "\n", "\n\n", "\n- ", "\n1. ", "\r\n", "\n    ", "\t", "\u00a0", ",", ".", "$", "%", " 🎉 ", "…", "¿",
    "(", ")", '"', "*", "|", "&", "<", "> ",
    "፡", "።", "·", "״",
]  # fmt: skip


def _random_cuts(
    chance: random.Random, words: list[str], between: list[str], most: int
) -> tuple[str, list[tuple[int, int]]]:
    """A text of 2 to 12 ``words``, up to ``most`` of ``between`` after each, and some of its phrases."""
    said = chance.choices(words, k=chance.randint(2, 12))
    text = "".join(word + "".join(chance.choices(between, k=chance.randint(1, most))) for word in said)
    text = chance.choice(["", *between]) + text
    found = candidates(text, ("the", "of", "and"))
    return text, [(one.start, one.end) for one in found if chance.random() < 0.5]


def _words(text: str) -> list[Any]:
    """The words of ``text``; "1" is in it only as the number of a list's item, which may go with the item."""
    return [word for word in WORD.finditer(text) if word[0] != "1"]


@pytest.mark.parametrize("seed", range(5))
def test_other_words_and_what_is_between_them_stay(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(1000):
        text, cuts = _random_cuts(chance, WORDS, BETWEEN, most=3)
        result = remove(text, cuts)
        stay = [word for word in _words(text) if not any(a <= word.start() < b for a, b in cuts)]
        left = _words(result)
        assert [word[0] for word in left] == [word[0] for word in stay], (text, cuts)
        for (one, two), (was_one, was_two) in zip(pairwise(left), pairwise(stay), strict=True):
            if not any(was_one.end() <= start < was_two.start() for start, _ in cuts):
                assert result[one.end() : two.start()] == text[was_one.end() : was_two.start()], (text, cuts)


@pytest.mark.parametrize("seed", range(5))
def test_prose_stays_prose(seed: int) -> None:
    """No doubled blank, no punctuation after a blank, a comma, an opening bracket or the end of a sentence."""
    chance = random.Random(seed)
    ugly = re.compile(r"\s\s|\s[,.;!)]|[,;(][,.;!)]|[.!]\s?[,.;!]|\( |^\s*[,.;!]|[,;]\s*$")
    for _ in range(1000):
        text, cuts = _random_cuts(chance, PROSE, PLAIN, most=1)
        if not ugly.search(text):
            result = remove(text, cuts)
            assert not (result.strip() and ugly.search(result)), (text, cuts, result)


@pytest.mark.parametrize(
    "piece", ["pear, ", "the pear. ", "(pear) ", "- pear\n", "pear/", "pear’ ", "a\n\npear\n\n"]
)
def test_long_texts_are_read_once(piece: str) -> None:
    """30,000 cuts; going back to the start from each of them would take hours."""
    text = piece * 30_000
    cuts = [(start, start + 4) for start in range(piece.index("pear"), len(text), len(piece))]
    assert "pear" not in remove(text, cuts)
