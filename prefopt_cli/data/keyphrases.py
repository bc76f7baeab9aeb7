"""Key phrases of a text by RAKE (Rose et al. 2010, "Automatic keyword extraction from individual documents").

A candidate is what stands between stop words and punctuation. What a word is holds for every script that
puts blanks (or the Ethiopic ፡) between words; where none are written (Chinese, Thai), a run of letters counts
as one word.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from math import fsum

import regex

BREAKS = r"\n\r\v\f\x85\u2028\u2029"
"""Characters that end a line, for use inside brackets of a pattern."""

BLANK = r"[\t\p{Zs}፡]"
"""A blank within a line; ፡ stands between words in the Ethiopic scripts."""

_REST = r"[\p{L}\p{N}\p{M}\u200c\u200d]*+"  # combining marks and joiners, but none to begin with: emoji have them too
_JOINT = (
    r"(?:['’‐‑·‧׳״\u00ad-]"
    r"|[.,](?<=\p{Nd}[.,])(?=\p{Nd})"
    r'|"(?<=\p{Hebrew}")(?=\p{Hebrew}))'  # the mark of an acronym: צה"ל
)
WORD = regex.compile(rf"[\p{{L}}\p{{N}}]{_REST}(?:{_JOINT}[\p{{L}}\p{{N}}]{_REST})*+")
"""One word: ``don't``, ``well-known``, ``AR-15``, ``1,000.5``, ``col·laboració``."""

MARGIN = regex.compile(
    rf"(?<![^{BREAKS}]){BLANK}*+(?:(?:[->*+•‣◦]|\#{{1,6}}|\(?\p{{Nd}}{{1,3}}[.)]){BLANK}++(?=\S))++"
)
"""What begins a line without being said: the mark of a list (``1. ``, ``- ``), a quotation or a heading."""

_TOKEN = regex.compile(rf"{MARGIN.pattern}|(?P<word>{WORD.pattern})")
_BLANKS = regex.compile(rf"{BLANK}++")
_AS_TYPED = str.maketrans({"’": "'", "ʼ": "'", "\u00ad": None})


@dataclass(frozen=True, slots=True)
class Candidate:
    """One occurrence of a phrase: words in their ``normal_form``, joined by a space; ``text[start:end]`` as written."""

    phrase: str
    start: int
    end: int


def normal_form(word: str) -> str:
    """What words that are the same have in common: lower case, NFC, ' for an apostrophe, no soft hyphens.

    Turkish İ becomes i, as I does: its lower case would be two characters, which no list has.
    """
    if word.isascii():
        return word.lower()
    lower = word.lower().translate(_AS_TYPED).replace("i\u0307", "i")
    return unicodedata.normalize("NFC", lower)  # last, as an accent may have followed the dot of i


def rake(text: str, stopwords: Collection[str]) -> list[tuple[str, float]]:
    """The distinct key phrases of ``text`` and their scores, the best first (see ``score_phrases``).

    ``stopwords`` are in their ``normal_form``, as ``find_stopwords`` returns them.
    """
    return score_phrases(candidates(text, stopwords))


def candidates(text: str, stopwords: Collection[str]) -> list[Candidate]:
    """Every phrase between stop words, punctuation and line breaks, in the order of the text."""
    stopwords = frozenset(stopwords)
    found: list[Candidate] = []
    words: list[str] = []
    start = end = 0
    for word, at, until in _words(text):
        if words and not _BLANKS.fullmatch(text, end, at):
            found.append(Candidate(" ".join(words), start, end))
            words = []
        if word not in stopwords:
            start, end = at if not words else start, until
            words.append(word)
        elif words:
            found.append(Candidate(" ".join(words), start, end))
            words = []
    return [*found, Candidate(" ".join(words), start, end)] if words else found


def score_phrases(candidates: Iterable[Candidate]) -> list[tuple[str, float]]:
    """The distinct phrases with their scores, the best first; of equals, the one that occurs first.

    A word scores deg / freq: the mean number of words in the phrases around its occurrences. A phrase
    scores the sum over its words (Rose et al. 2010, section 1.2.3).
    """
    phrases = Counter(candidate.phrase for candidate in candidates)
    frequency: Counter[str] = Counter()
    degree: Counter[str] = Counter()
    for phrase, times in phrases.items():
        words = phrase.split(" ")
        for word in words:
            frequency[word] += times
            degree[word] += times * len(words)
    # fsum: phrases of the same words in another order tie exactly.
    scores = [
        (phrase, fsum(degree[word] / frequency[word] for word in phrase.split(" "))) for phrase in phrases
    ]
    return sorted(scores, key=lambda scored: -scored[1])


def has_word(text: str) -> bool:
    """Whether ``text`` has any word, stop words included."""
    return next(_words(text), None) is not None


def _words(text: str) -> Iterator[tuple[str, int, int]]:
    for match in _TOKEN.finditer(text):
        word = match["word"]
        if word:
            yield normal_form(word), match.start(), match.end()
