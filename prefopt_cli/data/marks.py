"""The marks between words, by what they do there: open, close, end a sentence, part its members."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import regex

from prefopt_cli.data.keyphrases import BLANK

Span = tuple[int, int]
"""(start, end) offsets."""

OPEN, CLOSE, WEAK, END, OTHER, LIMIT = "open", "close", "weak", "end", "other", "limit"
"""LIMIT: the word or the end of the line that a gap reaches to."""

_BRACKETS = "()[]{}<>（）【】「」『』《》"
_QUOTES = "“”„«»‹›‘’‚\"'*_`~"
_OPENERS = frozenset("([{<（【「『《„“«‹‘‚¿¡")
_CLOSERS = frozenset(")]}>）】」』》”»›")
_PAIR = {**dict.fromkeys('“”„"', "“"), **dict.fromkeys("‘’‚'", "‘"), "»": "«", "›": "‹", "?": "¿", "!": "¡"}
_PAIR |= dict(zip(_BRACKETS[1::2], _BRACKETS[::2], strict=True))

_ENDS = frozenset(".!?…。！？।؟۔።፧")
_TIES = frozenset("-–—―/&\\+=_*~")
"""Join two words; where one that they touch is cut, nothing is left to join."""

_RANKS = {**dict.fromkeys(",،，、፣", 1), **dict.fromkeys(_TIES, 1), **dict.fromkeys(";:؛；：፤፥፦", 2)}
"""Of two that meet after a cut, the one of higher rank stays, or the first."""

_PREFIXES = frozenset("-–—.:+~*_/&=\\")
"""Belong to the word that they touch where a blank stands before them: -5, .NET, /usr."""

_UNITS = regex.compile(r"[\p{Sc}%‰#@°™®©^]++")
"""Belong to the word or number that they touch: $5, 20%."""

_PIECE = regex.compile(
    rf"(?P<blank>{BLANK}++)|[{regex.escape(_BRACKETS)}]|(?P<sign>.)(?P=sign)*+", regex.DOTALL
)
_LETTER = regex.compile(r"[\p{L}\p{N}\p{M}]")
_OPENING_APOSTROPHE = regex.compile(r"(?<![\p{L}\p{N}\p{M}])['‘’](?=[\p{L}\p{N}])")


@dataclass(slots=True)
class Mark:
    """A run of one sign. ``blank`` stands before it; ``cut``: so did something that was taken out."""

    text: str
    kind: str
    blank: str = ""
    cut: bool = False
    spaced: str = ""
    """The blank directly before it in the original."""
    lost_left: bool = False
    lost_right: bool = False
    """It joined two words, and the one on this side was taken out."""

    @property
    def rank(self) -> int:
        return 3 if self.kind == END else _RANKS.get(self.text[0], 0)

    @property
    def is_tie(self) -> bool:
        return self.text[0] in _TIES

    @property
    def is_bracket(self) -> bool:
        return self.text in _BRACKETS

    @property
    def pair(self) -> tuple[str, int] | None:
        """Equal for an opening mark and the one that closes it."""
        return (_PAIR.get(self.text[0], self.text[0]), len(self.text)) if self.text else None


def opening_apostrophe(said: str) -> int:
    """Where the first single quote of a line opens; its length where none does."""
    found = _OPENING_APOSTROPHE.search(said)
    return found.start() if found else len(said)


def marks_of(said: str, gap: list[Span], opening: int) -> Iterator[Mark]:
    """The marks in the parts ``gap`` of the line ``said``, between which something was cut; a LIMIT ends them.

    Marks that belong to what was cut are left out: a currency sign, a minus, the apostrophe of a plural
    (after ``opening``, where the line's first single quote opens, it may be a closing quote and stays).
    """
    blank, cut = "", False
    for number, (start, end) in enumerate(gap):
        cut = cut or number > 0
        for piece in _PIECE.finditer(said, start, end):
            if piece["blank"]:
                blank += piece[0]
                continue
            before = said[max(piece.start() - 1, 0) : piece.start()]
            after = said[piece.end() : piece.end() + 1]
            mark = Mark(piece[0], _kind(piece[0][0], before, after), blank, cut)
            follows = number > 0 and piece.start() == start
            precedes = number < len(gap) - 1 and piece.end() == end
            if _belongs_to_cut(mark, before, after, follows, precedes, piece.start() < opening):
                cut = True
                continue
            mark.spaced = before if _blank(before) else ""
            if mark.kind == WEAK and mark.is_tie:
                mark.lost_left, mark.lost_right = follows, precedes
            yield mark
            blank, cut = "", False
    yield Mark("", LIMIT, blank, cut)


def _belongs_to_cut(
    mark: Mark, before: str, after: str, follows: bool, precedes: bool, unopened: bool
) -> bool:
    if mark.kind == CLOSE and mark.text in ("'", "’"):
        return follows and unopened
    if mark.kind == OTHER and mark.text[0] in _PREFIXES:
        return precedes
    if not _UNITS.fullmatch(mark.text):
        return False
    return (follows and not _LETTER.match(after)) or (precedes and not _LETTER.match(before))


def _kind(sign: str, before: str, after: str) -> str:
    if sign in _QUOTES:
        return _quote_kind(sign, before, after)
    if sign in "<>":
        tight = not _blank(after if sign == "<" else before)
        return (OPEN if sign == "<" else CLOSE) if tight else OTHER
    if sign in _OPENERS:
        return OPEN
    if sign in _CLOSERS:
        return CLOSE
    if sign not in _ENDS and sign not in _RANKS:
        return OTHER
    if sign in _PREFIXES and _blank(before) and not _blank(after):
        return OTHER
    return END if sign in _ENDS else WEAK


def _quote_kind(sign: str, before: str, after: str) -> str:
    """Quotes and emphasis open before words and close after them, as in CommonMark's rules of emphasis."""
    word_before, word_after = bool(_LETTER.match(before)), bool(_LETTER.match(after))
    opens = not _blank(after) and (word_after or not word_before)
    closes = not _blank(before) and (word_before or not word_after)
    if opens != closes:
        return OPEN if opens else CLOSE
    if word_before and word_after and sign in _TIES:
        return WEAK
    if opens and (after in _CLOSERS or after in _ENDS or after in _RANKS):
        return CLOSE
    if opens and before in _OPENERS:
        return OPEN
    return OPEN if sign in _OPENERS else CLOSE if sign in _CLOSERS else OTHER


def _blank(sign: str) -> bool:
    return not sign or sign.isspace() or sign == "፡"
