"""Estimates with their intervals, one below the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from prefopt_cli.evaluation.pages.page import Html, figure, printable
from prefopt_cli.evaluation.pages.svg import BLUE, MUTED, PAPER, inline
from prefopt_cli.evaluation.pages.wording import both

LONGEST = 38
"""Characters of a name above its interval."""


@dataclass(frozen=True)
class Row:
    """A line of an interval plot."""

    label: str
    estimate: Mapping[str, Any]
    own: bool = True
    """Whether it is about the policy; what it is compared with is drawn in grey."""


def intervals(
    title: str, rows: Sequence[Row], *, key: str, centre: float, axis: str, scale: float = 1
) -> Html:
    """Estimates one below the other, each with its name above it.

    Args:
        title: the heading.
        rows: from the top down; those without a value are left out.
        key: what the ids begin with.
        centre: where the line of no difference stands, in the estimates' unit.
        axis: what the axis shows.
        scale: factor from the estimates' unit to the axis's.
    """
    rows = [row for row in rows if finite(row.estimate)]

    def draw(drawn: Figure) -> None:
        axes = drawn.subplots()
        axes.axvline(centre * scale, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        for place, row in enumerate(rows):
            whisker(axes, row.estimate, place, scale, BLUE if row.own else MUTED, "o" if row.own else "s")
            axes.text(
                0.0,
                place - 0.42,
                shortened(row.label, LONGEST),
                transform=axes.get_yaxis_transform(),
                va="center",
                bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 0.5},
                in_layout=False,
            )
        axes.set_ylim(len(rows) - 0.6, -0.8)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.06)
        axes.set_xlabel(axis)

    share = scale == 100
    said = "; ".join(f"{row.label} {both(row.estimate, share=share)}" for row in rows)
    height = 0.55 + 0.48 * len(rows)
    drawn = inline(draw, height=height, key=key, message=f"{title}: {said}.")
    return figure(title, drawn, f"Bars: the interval. Dotted: {'chance' if centre else 'no difference'}.")


def whisker(
    axes: Axes, estimate: Mapping[str, Any], place: float, scale: float, colour: str, marker: str
) -> None:
    """One estimate and its interval, at a height."""
    value, low, high = (scale * float(estimate[part]) for part in ("value", "low", "high"))
    axes.plot([low, high], [place, place], color=colour, linewidth=1.8)
    axes.plot([value], [place], marker, color=colour, markersize=5.5)


def finite(estimate: Mapping[str, Any] | None) -> bool:
    """Whether there is a figure with an interval to draw."""
    parts = [estimate.get(part) for part in ("value", "low", "high")] if estimate else [None]
    return all(part is not None and np.isfinite(part) for part in parts)


def shortened(name: str, longest: int) -> str:
    """A name in one line; a longer one loses its middle."""
    name = " ".join(printable(name).split())
    half = longest // 2
    return name if len(name) <= longest else f"{name[: half - 1]}…{name[-half:]}"
