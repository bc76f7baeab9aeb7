"""KL to the reference against accuracy, a point per policy."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefopt_cli.evaluation.pages.interval_plot import finite
from prefopt_cli.evaluation.pages.page import Html, figure, isolated, joined
from prefopt_cli.evaluation.pages.svg import BLUE, SIZE, inline
from prefopt_cli.evaluation.pages.wording import both

LINE_HEIGHT = SIZE
"""Points from a number to the next one."""
LETTER = 0.64 * SIZE
"""Points, the width of a digit."""
GAP = 5
"""Points from a point to its number."""

Point = tuple[str, Mapping[str, Any], Mapping[str, Any]]
"""Label, KL in nats, accuracy in [0, 1]."""


def kl_plot(points: Sequence[Point], *, title: str, key: str, score: str) -> Html:
    """The points with both intervals; those without a figure are left out."""
    points = [point for point in points if finite(point[1]) and finite(point[2])]

    def draw(drawn: Figure) -> None:
        axes = drawn.subplots()
        for _, kl, accuracy in points:
            x, left, right = (float(kl[part]) for part in ("value", "low", "high"))
            y, low, high = (100 * float(accuracy[part]) for part in ("value", "low", "high"))
            axes.plot([left, right], [y, y], color=BLUE, linewidth=1.2, alpha=0.6)
            axes.plot([x, x], [low, high], color=BLUE, linewidth=1.2, alpha=0.6)
            axes.plot([x], [y], "o", color=BLUE, markersize=6)
        axes.margins(x=0.12, y=0.1)
        axes.grid(linewidth=0.6)
        axes.set_xlabel("KL to the reference, nats per response")
        axes.set_ylabel(f"accuracy by {score}, %")
        _number(axes, points)

    said = "; ".join(
        f"{label}: KL {both(kl)}, accuracy {both(accuracy, share=True)}" for label, kl, accuracy in points
    )
    drawn = inline(draw, height=3.2, key=key, message=f"KL against accuracy: {said}.")
    named = (
        joined([f"{place} ", isolated(label), ". "]) for place, (label, *_) in enumerate(points, start=1)
    )
    reading = "Up is better, left is nearer to the reference. Lines: the intervals."
    return figure(isolated(title), drawn, joined([*named, reading]))


def _number(axes: Axes, points: Sequence[Point]) -> None:
    """Numbers beside the points; one that would cover another, or a point, moves up."""
    axes.get_figure(root=True).draw_without_rendering()  # type: ignore[union-attr]
    inverse = 72 / axes.get_figure(root=True).dpi  # type: ignore[union-attr]
    spots = [(float(kl["value"]), 100 * float(accuracy["value"])) for _, kl, accuracy in points]
    places = [inverse * axes.transData.transform(spot) for spot in spots]
    taken = [(x - GAP, x + GAP, y) for x, y in places]
    for place, (spot, (x, y)) in enumerate(zip(spots, places, strict=True), start=1):
        said = str(place)
        left, right = x + GAP, x + GAP + LETTER * len(said)
        height = y + LINE_HEIGHT / 2
        while any(a < right and b > left and abs(c - height) < LINE_HEIGHT for a, b, c in taken):
            height += LINE_HEIGHT / 4
        taken.append((left, right, height))
        axes.annotate(said, spot, xytext=(GAP, height - y), textcoords="offset points", va="center")
