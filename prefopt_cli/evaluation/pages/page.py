"""HTML pages that stand alone: nothing is fetched, every text is escaped, light and dark alike."""

import base64
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from importlib import resources

VOID = frozenset({"meta", "br", "col"})
"""Elements without an end tag."""

UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")
"""Neither HTML nor XML may hold them."""


class Html(str):
    """Text that is HTML already; every other string is escaped where it enters the page."""

    __slots__ = ()


def printable(text: str) -> str:
    """The text without what no page can hold; half a surrogate pair, too, has no UTF-8."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.encode("utf-8", "replace").decode("utf-8"))


def escaped(text: str) -> Html:
    """Text as HTML, unless it is HTML already."""
    return text if isinstance(text, Html) else Html(html.escape(printable(text)))


def joined(parts: Iterable[str]) -> Html:
    """The parts one after the other."""
    return Html("".join(escaped(part) for part in parts))


def tag(name: str, *children: str, **attributes: str | None) -> Html:
    """An element. `class_` stands for ``class``, `aria_label` for ``aria-label``; None leaves an attribute out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(printable(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{shown}>" + ("" if name in VOID else f"{joined(children)}</{name}>"))


def isolated(text: str) -> Html:
    """Somebody's own words in a line, whose direction of writing must not turn the words around them."""
    return tag("bdi", text)


def section(title: str, *children: str, id: str | None = None, level: int = 2) -> Html:
    """A part of the page with its heading."""
    return tag("section", tag(f"h{level}", title), *children, "\n", id=id)


def details(summary: str, *children: str) -> Html:
    """What is folded away until the reader asks for it."""
    return tag("details", tag("summary", summary), *children)


def facts(pairs: Iterable[tuple[str, str]], *, wide: bool = False) -> Html:
    """Terms and what is to be said about them; wide: the terms are longer than a word or two."""
    lines = (tag("div", tag("dt", term), tag("dd", said)) for term, said in pairs)
    return tag("dl", *lines, class_="facts wide" if wide else "facts")


def listed(items: Iterable[str]) -> Html:
    """A plain list."""
    return tag("ul", *(tag("li", item) for item in items))


def figure(title: str, drawn: Html, caption: str) -> Html:
    """A plot with its heading and its message in words."""
    return tag("figure", tag("h4", title), drawn, tag("figcaption", caption), "\n")


def table(
    label: str,
    head: Sequence[str],
    groups: Iterable[tuple[str | None, Sequence[Sequence[str]]]],
    *,
    sortable: bool = False,
) -> Html:
    """A table that scrolls inside its own frame where it is too wide.

    Args:
        label: what it holds, for readers who hear the page.
        head: the columns' titles; the first column names the rows.
        groups: a title over some rows, or None, and the rows.
        sortable: whether the page's script may sort the rows by a column.
    """
    bodies = []
    for title, rows in groups:
        lines = [
            tag("tr", tag("th", cells[0], scope="row"), *(tag("td", cell) for cell in cells[1:]), "\n")
            for cells in rows
        ]
        if title is not None:
            lines.insert(0, tag("tr", tag("th", title, colspan=str(len(head)), scope="rowgroup")))
        bodies.append(tag("tbody", *lines))
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    whole = tag("table", top, *bodies, class_="sortable" if sortable else None)
    return tag("div", whole, class_="scroll", role="region", aria_label=label, tabindex="0")


def page(title: str, made: str, *content: str, script: bool = False) -> str:
    """The whole file.

    Args:
        title: the page's heading.
        made: what made it, and when.
        content: the parts below the heading.
        script: whether tables can be sorted; without scripts, the page is as complete.
    """
    code = _file("page.js") if script else ""
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'" + (
        f"; script-src 'sha256-{digest}'" if code else ""
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(_file("page.css"))),
        "\n",
    )
    body = tag(
        "body",
        tag("header", tag("h1", isolated(title)), tag("p", made, class_="small")),
        "\n",
        tag("main", *content),
        tag("script", Html(code)) if code else "",
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _file(name: str) -> str:
    return resources.files("prefopt_cli.evaluation.pages").joinpath(name).read_text(encoding="utf-8")
