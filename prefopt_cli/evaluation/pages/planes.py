"""Pairs in a plane of two figures: policy against reference, chosen against rejected."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from prefopt_cli.evaluation.pages.page import Html, figure
from prefopt_cli.evaluation.pages.plots import PlotData
from prefopt_cli.evaluation.pages.svg import BLUE, INK, MUTED, ORANGE, SIZE, inline
from prefopt_cli.evaluation.pages.wording import count, percent

POINTS = 500
"""Pairs drawn one by one; more are counted in squares."""
SQUARES = 14
"""Squares from the middle to the edge."""
FAR = 0.02
"""Share of the pairs that may lie beyond the plane, so that they do not press all others into the middle."""
FAINTEST = 0.2
"""Opacity of a square with one pair."""


def flips(data: PlotData, *, key: str) -> Html:
    """The policy's margins by log-probability against the reference's: pairs above and below the two zeros."""
    assert data.reference_deltas is not None
    corners = ("turned right", "both right", "both wrong", "turned wrong")
    return _plane(
        "Policy against reference",
        (data.reference_deltas, "reference's margin, nats"),
        (data.policy_deltas, "policy's margin, nats"),
        corners,
        colours=(BLUE, MUTED, MUTED, ORANGE),
        key=key,
        remark="Margins by log-probability; right: above 0. Above the dotted line, the policy prefers the chosen "
        "response more than the reference does.",
    )


def changes(data: PlotData, *, key: str) -> Html:
    """What became of the log-probabilities of both responses of a pair."""
    assert data.change_chosen is not None
    assert data.change_rejected is not None
    return _plane(
        "Change of both responses",
        (data.change_rejected, "rejected, policy - reference, nats"),
        (data.change_chosen, "chosen, policy - reference, nats"),
        ("chosen up only", "both up", "both down", "rejected up only"),
        colours=(BLUE, BLUE, ORANGE, ORANGE),
        key=key,
        remark="Above the dotted line, the reward's margin is positive.",
    )


def _plane(
    title: str,
    across: tuple[np.ndarray, str],
    up: tuple[np.ndarray, str],
    corners: Sequence[str],
    *,
    colours: Sequence[str],
    key: str,
    remark: str,
) -> Html:
    """Pairs in a plane; corners are upper left, upper right, lower left, lower right."""
    finite = np.isfinite(across[0]) & np.isfinite(up[0])
    x, y = across[0][finite], up[0][finite]
    parts = ((x <= 0) & (y > 0), (x > 0) & (y > 0), (x <= 0) & (y <= 0), (x > 0) & (y <= 0))
    shares = [percent(float(part.mean()) if len(x) else None) for part in parts]
    sizes = np.maximum(np.abs(x), np.abs(y))
    reach = 1.05 * float(np.quantile(sizes, 1 - FAR) if len(x) else 1.0) or 1.0
    outside = int((sizes > reach).sum())
    many = len(x) > POINTS

    def draw(drawn: Figure) -> None:
        axes = drawn.subplots()
        axes.plot([-reach, reach], [-reach, reach], color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.axvline(0, color=INK, linewidth=0.8)
        for part, colour in zip(parts, colours, strict=True):
            inside = (np.clip(x[part], -reach, reach), np.clip(y[part], -reach, reach))
            if many:
                _squares(axes, *inside, reach, colour)
            else:
                axes.plot(*inside, "o", color=colour, markersize=4, alpha=0.6, markeredgewidth=0)
        for place, (corner, share) in enumerate(zip(corners, shares, strict=True)):
            right, lower = place % 2, place // 2
            axes.text(
                0.99 if right else 0.01,
                0.0 if lower else 1.0,
                f"{corner}\n{share}",
                transform=axes.transAxes,
                ha="right" if right else "left",
                va="bottom" if lower else "top",
                fontsize=0.9 * SIZE,
            )
        axes.set_xlim(-1.35 * reach, 1.35 * reach)
        axes.set_ylim(-1.35 * reach, 1.35 * reach)
        axes.set_xlabel(across[1])
        axes.set_ylabel(up[1])

    said = ", ".join(f"{corner} {share}" for corner, share in zip(corners, shares, strict=True))
    squares = f"The stronger a square, the more of the {len(x)} pairs it holds."
    caption = f"{remark} {squares if many else 'A dot per pair.'}"
    if outside:
        caption += f" {count(outside, 'pair')} further out stand at the edge."
    if missing := len(finite) - len(x):
        caption += f" Without {count(missing, 'pair')} whose figures are no numbers."
    drawn = inline(draw, height=3.6, key=key, message=f"{title}: {said}.")
    return figure(title, drawn, caption)


def _squares(axes: Axes, x: np.ndarray, y: np.ndarray, reach: float, colour: str) -> None:
    """How many pairs each square holds. The two zeros are edges, so that no square lies on both sides of one."""
    step = reach / SQUARES
    edges = step * np.arange(-SQUARES, SQUARES + 1)
    # A figure of zero belongs to the lower side, a histogram puts it onto the upper one.
    counts = np.histogram2d(-x, -y, bins=(edges, edges))[0][::-1, ::-1]
    most = counts.max() or 1.0
    for column, row in zip(*np.nonzero(counts), strict=True):
        opacity = FAINTEST + (1 - FAINTEST) * float(np.sqrt(counts[column, row] / most))
        corner = (float(edges[column]), float(edges[row]))
        axes.add_patch(Rectangle(corner, step, step, color=colour, alpha=round(opacity, 2), linewidth=0))
