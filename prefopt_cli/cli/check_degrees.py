"""A response at all its levels, in `prefopt check`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.text import Text

    from prefopt_cli.training.degree_inspection import Cut, DegradedResponse

CHARACTERS_SHOWN = 400
"""Of the response at each level, what is removed included."""

STRUCK = "strike dim"
"""Where a terminal cannot strike through, at least it dims."""


def has_colour(console: "Console") -> bool:
    """Whether styles are seen; otherwise marks must do."""
    return console.is_terminal and not console.no_color


def visible(text: str) -> str:
    """A text on one line."""
    return text.replace("\n", "\\n").replace("\t", "\\t")


def print_degrees(found: "DegradedResponse", console: "Console") -> None:
    """Print the response and below it each level, with what is removed struck through or in marks."""
    colour = has_colour(console)
    how = "struck through" if colour else "between [- and -]"
    console.print(
        f"A response at its levels, {found.row_id} {found.side}, with what is removed {how}:",
        markup=False,
        soft_wrap=not console.is_terminal,
    )
    for level, tokens, cuts in (
        (0, found.tokens, ()),
        *((each.level, each.tokens, each.removed) for each in found.levels),
    ):
        line = _level_line(f"  level {level}, {tokens:,} tokens: ", found.text, list(cuts), colour=colour)
        console.print(line, soft_wrap=not console.is_terminal)


def _level_line(begins: str, text: str, cuts: "list[Cut]", *, colour: bool) -> "Text":
    from rich.text import Text

    line = Text(begins)
    for part, is_removed in _parts(text[:CHARACTERS_SHOWN], cuts):
        marked = f"[-{visible(part)}-]" if is_removed and not colour else visible(part)
        line.append(marked, STRUCK if is_removed and colour else "")
    hidden = len(text) - CHARACTERS_SHOWN
    if hidden > 0:
        removed = sum(max(cut.end - max(cut.start, CHARACTERS_SHOWN), 0) for cut in cuts)
        line.append(f" ({hidden:,} more characters{f', {removed:,} of them removed' if cuts else ''})")
    return line


def _parts(text: str, cuts: "list[Cut]") -> "Iterator[tuple[str, bool]]":
    """The text piece by piece, and whether each is removed; what stands instead of one follows it."""
    at = 0
    for cut in cuts:
        if cut.start >= len(text):
            break
        yield text[at : cut.start], False
        if cut.end > cut.start:
            yield text[cut.start : cut.end], True
        yield cut.instead, False
        at = cut.end
    yield text[at:], False
