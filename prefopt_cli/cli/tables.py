"""Text and tables for terminals and pipes alike.

Tables of figures are never cut and never folded: columns that do not fit go into another table below.
"""

import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from prefopt_cli.evaluation.statistics import Estimate

GAP = "  "


@dataclass(frozen=True)
class Column:
    """A title, in one line or several, and a cell for every row."""

    title: str
    cells: Sequence[str]

    @property
    def width(self) -> int:
        return max(map(len, (*self.title.split("\n"), *self.cells)))


def print_line(console: "Console", line: str = "") -> None:
    """Plain text: as it is where it is piped, folded between words on a terminal."""
    console.print(line, markup=False, soft_wrap=not console.is_terminal)


def print_hanging(console: "Console", begins: str, text: str) -> None:
    """One line; on a terminal, as many as it takes, so that the text stays in its column."""
    if not console.is_terminal:
        lines = [begins + text]
    else:
        # Where the beginning leaves next to no room, the terminal may fold.
        width = max(console.width, len(begins) + 20)
        indent = " " * len(begins)
        lines = textwrap.wrap(
            text, width, initial_indent=begins, subsequent_indent=indent, break_long_words=False
        ) or [begins]
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def print_table(
    console: "Console", first: Column, others: Sequence[Column], bold: Collection[int] = ()
) -> None:
    """Print the columns, aligned to the right after the first, which every part of the table begins with.

    Args:
        console: where to; its width decides how many columns stand side by side.
        first: says what each row is about.
        others: at least one of them stands in each part, however narrow the console is.
        bold: numbers of rows to set off.
    """
    from rich.text import Text

    for number, part in enumerate(_parts(first, others, console.width)):
        if number:
            console.print()
        for row, line in _lines(first, part, "─" if console.encoding.startswith("utf") else "-"):
            console.print(Text(line, "bold" if row in bold else ""), soft_wrap=True)


def _parts(first: Column, others: Sequence[Column], width: int) -> Iterator[list[Column]]:
    part: list[Column] = []
    for column in others:
        if part and sum(len(GAP) + each.width for each in (*part, column)) + first.width > width:
            yield part
            part = []
        part.append(column)
    yield part


def _lines(first: Column, others: Sequence[Column], rule: str) -> Iterator[tuple[int, str]]:
    """(number of the row, -1 in the head; its text)."""
    columns = (first, *others)
    height = max(column.title.count("\n") for column in columns) + 1
    titles = [column.title.split("\n") for column in columns]
    titles = [[""] * (height - len(title)) + title for title in titles]

    def line(cells: Sequence[str]) -> str:
        rest = (f"{GAP}{cell:>{column.width}}" for cell, column in zip(cells[1:], others, strict=True))
        return f"{cells[0]:<{first.width}}{''.join(rest)}".rstrip()

    for cells in zip(*titles, strict=True):
        yield -1, line(cells)
    yield -1, rule * (first.width + sum(len(GAP) + column.width for column in others))
    for row, cells in enumerate(zip(*(column.cells for column in columns), strict=True)):
        yield row, line(cells)


def text(estimate: "Estimate", *, percent: bool = False, signed: bool = False) -> str:
    """An estimate with its interval, `1.23 [1.10, 1.36]`; as a share in percent, a difference with its sign."""
    small = 0 < max(map(abs, estimate)) < 0.1
    scale, digits = (100, 1) if percent else (1, 4 if small else 2)
    # Adding zero makes a zero of one that was rounded from below.
    value, low, high = (round(scale * part, digits) + 0.0 for part in estimate)
    plus = "+" if signed and value else ""
    return f"{value:{plus}.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
