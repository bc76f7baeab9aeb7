"""Figures of an evaluation's report, each with its message in words, drawn in the page's colours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prefopt_cli.evaluation.pages.interval_plot import finite, whisker
from prefopt_cli.evaluation.pages.page import Html, figure
from prefopt_cli.evaluation.pages.svg import BLUE, INK, MUTED, ORANGE, SIZE, inline
from prefopt_cli.evaluation.pages.wording import both, count, percent

BARS = 30
"""Of a histogram, about."""
OUTERMOST = 0.005
"""Share of the pairs at either end that a histogram's range may leave out; they count in its last bars."""


@dataclass(frozen=True)
class PlotData:
    """What the plots of one set need, pair by pair."""

    margins: np.ndarray
    """(P,) of the main score."""
    length_differences: np.ndarray
    """(P,) chosen - rejected, in tokens."""
    policy_deltas: np.ndarray
    """(P,) logp(chosen) - logp(rejected), in nats."""
    reference_deltas: np.ndarray | None = None
    """(P,) as `policy_deltas`, of the reference."""
    change_chosen: np.ndarray | None = None
    """(P,) policy - reference, logp of the chosen response, in nats."""
    change_rejected: np.ndarray | None = None
    """(P,) as `change_chosen`, of the rejected one."""


def histogram(data: PlotData, *, key: str, score: str) -> Html:
    """Margins of the pairs in the right order and of those in the wrong one."""
    margins = data.margins[np.isfinite(data.margins)]
    won, lost, tied = (int(found.sum()) for found in (margins > 0, margins < 0, margins == 0))
    low, high = np.quantile(margins, [OUTERMOST, 1 - OUTERMOST]) if len(margins) else (0.0, 0.0)
    step = float(max(high, 0) - min(low, 0)) / BARS or 1.0
    below, above = int(np.ceil(max(-low, 0) / step)) or 1, int(np.ceil(max(high, 0) / step)) or 1
    edges = step * np.arange(-below, above + 1)
    inside = np.clip(margins, edges[0], edges[-1])
    beyond = int(((margins < edges[0]) | (margins > edges[-1])).sum())

    def draw(drawn: Figure) -> None:
        axes = drawn.subplots()
        for found, colour in ((margins < 0, ORANGE), (margins > 0, BLUE)):
            axes.hist(inside[found], bins=list(edges), color=colour, rwidth=0.88)
        axes.axvline(0, color=INK, linewidth=1)
        top = axes.get_ylim()[1]
        axes.set_ylim(0, 1.18 * top)
        axes.text(0.01, 1.0, f"wrong: {lost}", transform=axes.transAxes, va="top", color=ORANGE)
        axes.text(0.99, 1.0, f"right: {won}", transform=axes.transAxes, va="top", ha="right", color=BLUE)
        axes.set_xlabel(f"margin by {score}")
        axes.set_ylabel("pairs")

    said = f"{count(won, 'pair')} with a margin above 0, {lost} below" + (f", {tied} at 0." if tied else ".")
    if beyond:
        said += f" The outermost bars hold the {beyond} beyond them, too."
    if missing := len(data.margins) - len(margins):
        said += f" Without {count(missing, 'pair')} whose margin is no number."
    drawn = inline(draw, height=2.5, key=key, message=f"Histogram of margins: {said}")
    return figure("Margins", drawn, said)


def reliability(calibration: Mapping[str, Any], *, key: str) -> Html:
    """Accuracy against confidence, bin by bin, and how many pairs each bin holds."""
    bins = [each for each in calibration["bins"] if each["pairs"] and finite(each["accuracy"])]

    def draw(drawn: Figure) -> None:
        upper, lower = drawn.subplots(2, 1, sharex=True, height_ratios=(3.2, 1))
        upper.plot([50, 100], [50, 100], color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        for each in bins:
            x, estimate = 100 * each["confidence"], each["accuracy"]
            upper.plot([x, x], [100 * estimate["low"], 100 * estimate["high"]], color=BLUE, linewidth=1.6)
            upper.plot([x], [100 * estimate["value"]], "o", color=BLUE, markersize=5)
            width = 100 * (each["high"] - each["low"])
            lower.bar(
                100 * each["low"], each["pairs"], width=0.9 * width, align="edge", color=BLUE, alpha=0.6
            )
        upper.set_ylabel("accuracy, %")
        lower.set_ylabel("pairs")
        lower.set_xlabel("confidence, %")
        lower.set_xlim(49, 101)
        upper.grid(linewidth=0.6)
        drawn.align_ylabels()

    said = f"ECE {both(calibration['ece'], share=True)}; a calibrated policy would rarely exceed "
    said += f"{percent(calibration['ece_if_calibrated'])}."
    drawn = inline(draw, height=3.4, key=key, message=f"Reliability diagram: {said}")
    return figure("Reliability", drawn, f"Dotted: calibrated; below it, the policy is too confident. {said}")


def by_length(buckets: Sequence[Mapping[str, Any]], *, key: str, score: str) -> Html:
    """Accuracy of the policy and of length alone, by the difference in length."""

    def draw(drawn: Figure) -> None:
        axes = drawn.subplots()
        axes.axvline(50, color=MUTED, linewidth=1, linestyle=(0, (2, 2)))
        for place, bucket in enumerate(buckets):
            for name, off, colour, marker in (
                ("accuracy", -0.13, BLUE, "o"),
                ("length_only", 0.17, ORANGE, "s"),
            ):
                if finite(bucket[name]):
                    whisker(axes, bucket[name], place + off, 100, colour, marker)
        axes.set_yticks(range(len(buckets)), [bucket_name(bucket) for bucket in buckets])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(buckets) - 0.4, -0.6)
        axes.set_xlim(-3, 103)
        axes.set_xlabel("accuracy, %")
        axes.set_title("chosen - rejected, tokens", loc="left", fontsize=SIZE, x=0.0)
        axes.grid(axis="x", linewidth=0.6)

    said = "; ".join(
        f"{bucket_name(bucket)} tokens: {percent(bucket['accuracy'] and bucket['accuracy']['value'])} against "
        f"{percent(bucket['length_only'] and bucket['length_only']['value'])}"
        for bucket in buckets
    )
    message = f"Accuracy by {score} against length alone, by difference in length: {said}."
    drawn = inline(draw, height=0.95 + 0.42 * len(buckets), key=key, message=message)
    caption = f"Circles, blue: the policy by {score}. Squares, orange: length alone."
    return figure("Accuracy by difference in length", drawn, caption)


def bucket_name(bucket: Mapping[str, Any]) -> str:
    """The differences in length that a bucket holds."""
    return f"{bucket['from']} to {bucket['to']}" if bucket["from"] != bucket["to"] else str(bucket["from"])
