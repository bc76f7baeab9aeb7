"""A picture of policies: how far each moved from its reference against what that brought."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from prefopt_cli.evaluation.statistics import Estimate
from prefopt_cli.runs import atomic

DOTS_PER_INCH = 150


class Point(NamedTuple):
    """A policy."""

    label: str
    kl: Estimate
    """In nats."""
    value: Estimate


def kl_picture(
    points: Sequence[Point], *, x: str, y: str, scale: float = 1.0, even: float | None = None
) -> Figure:
    """One point a policy, with intervals as bars.

    Args:
        points: the policies.
        x, y: what stands at the axes.
        scale: of the values, 100 for shares in percent.
        even: where a line says that nothing was won or lost.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for label, kl, value in points:
        axes.errorbar(
            kl.value, scale * value.value, xerr=_bars(kl), yerr=_bars(value, scale), fmt="o", capsize=2
        )
        axes.annotate(
            label,
            (kl.value, scale * value.value),
            textcoords="offset points",
            xytext=(6, 5),
            fontsize=8,
            parse_math=False,  # a dollar in a folder's name is no formula
        )
    if even is not None:
        axes.axhline(scale * even, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel(x, parse_math=False)
    axes.set_ylabel(y, parse_math=False)
    axes.grid(alpha=0.2)
    return figure


def write_picture(figure: Figure, path: Path) -> None:
    """Write a .png or .svg; the same figure gives the same bytes.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    kind = path.suffix.lower().removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else {}
    with (
        matplotlib.rc_context({"svg.hashsalt": "prefopt"}),
        atomic.file(path.expanduser()) as unfinished,
    ):
        figure.savefig(unfinished, format=kind, dpi=DOTS_PER_INCH, metadata=metadata)


def _bars(estimate: Estimate, scale: float = 1.0) -> list[list[float]]:
    """Lengths below and above; where all resamples agree, rounding must not make them negative."""
    value, low, high = estimate
    return [[max(0.0, scale * (value - low))], [max(0.0, scale * (high - value))]]
