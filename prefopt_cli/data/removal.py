"""Take phrases out of a text so that the rest reads as written: no doubled blanks, no commas without words.

Line by line. What stands between two words that stay is a gap; only gaps in which something was cut are
tidied, each as a whole, so that neighbouring cuts leave nothing between them and no word is ever touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import regex

from prefopt_cli.data.keyphrases import BREAKS, MARGIN, WORD
from prefopt_cli.data.marks import (
    CLOSE,
    END,
    LIMIT,
    OPEN,
    WEAK,
    Mark,
    Span,
    marks_of,
    opening_apostrophe,
)

_LINE = regex.compile(rf"(?P<said>[^{BREAKS}]*+)(?P<ending>\r\n|[{BREAKS}]|\Z)")
_FENCES = ("```", "~~~")
_HARD_BLANKS = "\u00a0\u202f"
"""Before French punctuation: it belongs to the mark."""


def remove(text: str, spans: Iterable[Span]) -> str:
    """``text`` without the characters of ``spans``, tidied where something was cut and nowhere else.

    Punctuation that has lost its words goes, as do brackets and quotes that were emptied, and lines in
    which no word is left. Blanks around the whole text stay, and so does every word outside ``spans``.

    Args:
        text: any text; its line breaks stay, except those of lines that go.
        spans: (start, end) offsets into ``text``, whole words, not overlapping, in any order. A line break
            inside one stays.
    """
    cuts = sorted(span for span in spans if span[0] < span[1])
    if not cuts:
        return text
    start = len(text) - len(text.lstrip())
    end = max(len(text.rstrip()), start)
    return text[:start] + "".join(_lines(text, start, end, cuts)) + text[end:]


def _lines(text: str, start: int, end: int, cuts: list[Span]) -> list[str]:
    """The lines of ``text[start:end]`` that keep a word or were not touched, each with its line break."""
    kept: list[str] = []
    gone, first = False, 0
    for line in _LINE.finditer(text, start, end):
        if not line[0]:
            break  # the end, after the last line
        said, (begin, until) = line["said"], line.span("said")
        while first < len(cuts) and cuts[first][1] <= begin:
            first += 1
        last = first
        while last < len(cuts) and cuts[last][0] < until:
            last += 1
        if first < last:
            inside = [(max(a, begin) - begin, min(b, until) - begin) for a, b in cuts[first:last]]
            said = _tidied(said, inside)
            gone = not said
            if gone:
                continue
        elif gone and not said.strip() and not (kept and kept[-1].strip()):
            continue  # the line between two empty ones is gone: one of them is enough
        kept.append(said + line["ending"])
        gone = False
    return _without_end(kept) if gone else kept


def _without_end(lines: list[str]) -> list[str]:
    """``lines`` without the line breaks that led to a last line now gone."""
    while lines and not lines[-1].strip():
        lines.pop()
    return [*lines[:-1], *(line.rstrip("\n\r\v\f\x85\u2028\u2029") for line in lines[-1:])]


def _tidied(said: str, cuts: list[Span]) -> str:
    """One line without ``cuts``; empty where no word is left."""
    margin = MARGIN.match(said)
    begin = min(margin.end() if margin else len(said) - len(said.lstrip()), cuts[0][0])
    end = max(len(said.rstrip()), cuts[-1][1])
    opening = opening_apostrophe(said)
    out, gap, left = [said[:begin]], [], ""
    position = begin
    for start, until in [*cuts, (end, end)]:
        for word in WORD.finditer(said, position, start):
            gap.append((position, word.start()))
            out += [_filled(said, gap, left, word[0], opening), word[0]]
            gap, left, position = [], word[0], word.end()
        gap.append((position, start))
        position = until
    filled = _filled(said, gap, left, "", opening)
    if not left and not filled.startswith(_FENCES):
        return ""
    return "".join([*out, filled, said[end:]])


def _filled(said: str, gap: list[Span], left: str, right: str, opening: int) -> str:
    """What to write between the words ``left`` and ``right`` (empty at an end of the line).

    ``gap`` are the parts of ``said`` between them; something was cut between one part and the next.
    """
    if len(gap) == 1:
        return said[slice(*gap[0])]
    kept = _settled(marks_of(said, gap, opening), left, right)
    filled = "".join(_blank(before, mark, left, right) + mark.text for before, mark in pairwise(kept))
    joined = WORD.match(left + filled + right) if left and right else None
    return filled + " " if joined and joined.end() > len(left) else filled


def _settled(marks: Iterator[Mark], left: str, right: str) -> list[Mark]:
    """The marks of a gap that stay, from the limit at its left to the one at its right."""
    kept = [Mark("", LIMIT)]
    blank, lost = "", False
    for mark in marks:
        mark.blank, mark.cut = blank + mark.blank, mark.cut or lost
        lost = mark.cut and _goes(kept, mark, left, right)
        blank = mark.blank if lost else ""
        if not lost:
            kept.append(mark)
    return kept


def _goes(kept: list[Mark], mark: Mark, left: str, right: str) -> bool:
    """Whether ``mark``, after a cut, has nothing to stand for; what it outdoes is taken off ``kept``."""
    emptied = _emptied(kept, mark)
    if emptied:
        mark.blank = kept[emptied].blank
        del kept[emptied:]
        return True
    if mark.lost_left:
        if kept[-1].lost_right:  # either/that/or -> either/or
            kept[-1].lost_right = mark.lost_right
        return True
    while _outdone(kept[-1], mark, right):
        mark.blank = kept.pop().blank + mark.blank
    if mark.kind not in (WEAK, END):
        return False
    if kept[-1].kind == OPEN or (len(kept) == 1 and not left):
        return True
    return _said_before(kept, mark)


def _outdone(before: Mark, mark: Mark, right: str) -> bool:
    """Whether ``before`` has nothing left to part or to open, as ``mark`` follows it."""
    at_end = mark.kind == LIMIT and not right
    if before.kind == OPEN:
        return at_end and before.is_bracket
    if before.kind != WEAK:
        return False
    beaten = mark.kind in (WEAK, END) and before.rank < mark.rank
    return before.lost_right or mark.kind == CLOSE or at_end or beaten


def _emptied(kept: list[Mark], mark: Mark) -> int:
    """The place of the opening mark that ``mark`` closes with nothing but punctuation between them, or 0."""
    place = len(kept) - 1
    while mark.kind == CLOSE and kept[place].kind in (WEAK, END):
        place -= 1
    return place if kept[place].kind == OPEN and kept[place].pair == mark.pair else 0


def _said_before(kept: list[Mark], mark: Mark) -> bool:
    """Whether the punctuation before ``mark``, closing brackets and quotes aside, makes it superfluous."""
    place = len(kept) - 1
    while kept[place].kind == CLOSE:
        place -= 1
    before = kept[place]
    if before.kind not in (WEAK, END):
        return False
    if before.rank < mark.rank:  # "pears," apples. -> "pears".
        del kept[place]
        return False
    return True


def _blank(before: Mark, mark: Mark, left: str, right: str) -> str:
    """The blanks between two marks that stay: as they were, or at most one after a cut."""
    if not mark.cut:
        return mark.blank
    at_start = before.kind == LIMIT and not left
    if at_start or before.kind == OPEN or (mark.kind == LIMIT and not right):
        return ""
    if mark.kind in (CLOSE, END, WEAK):
        hard = mark.spaced and mark.spaced in _HARD_BLANKS
        return mark.spaced if hard or (mark.is_tie and mark.spaced) else ""
    return mark.blank[:1]
