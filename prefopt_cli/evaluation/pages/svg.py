"""Matplotlib's figures as SVG inside a page: they take the page's colours and font and share no id."""

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from prefopt_cli.evaluation.pages.page import Html, printable

INK, MUTED, LINE, PAPER, BLUE, ORANGE = (f"#01020{number}" for number in range(6))
"""Stand-ins: colours that nobody would draw in, each for one of the page's."""

COLOURS = {INK: "ink", MUTED: "muted", LINE: "line", PAPER: "paper", BLUE: "blue", ORANGE: "orange"}
"""The page's names for them (page.css)."""

WIDTH = 3.75
"""Inches: 360 pixels of a page, the width of a phone."""
SIZE = 11.25
"""Points: 15 pixels at that width."""

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "prefopt",
    "font.size": SIZE,
    "axes.labelsize": SIZE,
    "axes.unicode_minus": False,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "axes.axisbelow": True,
    "text.parse_math": False,
}

NAMESPACE = re.compile(r"\{[^}]*\}")
LONG_FIGURE = re.compile(r"-?\d+\.\d{3,}")
FONT = re.compile(r"font-family: [^;]*(; )?")
REFERENCE = re.compile(r"url\(#([^)]*)\)")


def inline(draw: Callable[[Figure], None], *, height: float, key: str, message: str) -> Html:
    """An ``<svg>`` element; the same figure gives the same bytes.

    Args:
        draw: draws into an empty figure, in the stand-ins' colours.
        height: inches; the width is `WIDTH`.
        key: what ids begin with; no other figure of the page may have it.
        message: what the figure says, for readers who do not see it.
    """
    written = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The page's font has the signs that matplotlib's lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        figure.savefig(written, format="svg", metadata=nothing)
    root = ElementTree.fromstring(written.getvalue())
    referred = _referred(root)
    _tidy(root, {old: f"{key}-{number}" for number, old in enumerate(referred)})
    for unwanted in ("width", "height", "version"):
        del root.attrib[unwanted]
    root.set("role", "img")
    root.set("aria-label", printable(message))
    return Html(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _referred(root: ElementTree.Element) -> list[str]:
    """The ids that something points to, in order."""
    found: dict[str, None] = {}
    for element in root.iter():
        for name, value in element.attrib.items():
            if name.endswith("}href"):
                found.setdefault(value.removeprefix("#"))
            found.update(dict.fromkeys(REFERENCE.findall(value)))
    return list(found)


def _tidy(element: ElementTree.Element, names: dict[str, str]) -> None:
    """Names without namespaces, which HTML knows by itself; ids of the page's own; colours of the page."""
    element.tag = NAMESPACE.sub("", element.tag)
    attributes = {NAMESPACE.sub("", name): value for name, value in element.attrib.items()}
    element.attrib.clear()
    for name, value in attributes.items():
        if name == "id" and value not in names:
            continue
        element.set(name, _value(name, value, names))
    if element.tag != "text":
        element.text = element.text and element.text.strip()
    for child in list(element):
        # Matplotlib's style sheet would hold for the whole page.
        if NAMESPACE.sub("", child.tag) in ("style", "metadata"):
            element.remove(child)
            continue
        _tidy(child, names)
        child.tail = child.tail and child.tail.strip()
        if child.tag == "defs" and not len(child):
            element.remove(child)


def _value(name: str, value: str, names: dict[str, str]) -> str:
    if name == "id":
        return names[value]
    if name == "href":
        return "#" + names[value.removeprefix("#")]
    if name in ("d", "x", "y", "transform", "style"):
        value = LONG_FIGURE.sub(lambda found: f"{float(found[0]):.2f}", value)
    if name == "d":
        return value.replace("\n", "").strip()
    if name == "style":
        value = FONT.sub("", value)
        for stand_in, colour in COLOURS.items():
            value = value.replace(stand_in, f"var(--{colour})")
    return REFERENCE.sub(lambda found: f"url(#{names[found[1]]})", value)
