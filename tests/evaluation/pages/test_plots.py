"""What plots count and say."""

import re

import numpy as np
import pytest

from prefopt_cli.evaluation.pages.compare_plot import kl_plot
from prefopt_cli.evaluation.pages.interval_plot import Row, intervals
from prefopt_cli.evaluation.pages.page import escaped, tag
from prefopt_cli.evaluation.pages.planes import POINTS, changes, flips
from prefopt_cli.evaluation.pages.plots import PlotData, histogram
from prefopt_cli.evaluation.pages.wording import both, interval, number, p_value, points, value
from tests.evaluation.pages.summaries import estimate, plot_data


def data(own: list[float], its: list[float]) -> PlotData:
    first, second = np.array(own), np.array(its)
    return PlotData(first, np.zeros(len(own)), first, second, first, second)


def test_a_histogram_counts_wins_losses_and_ties() -> None:
    html = histogram(data([1.0, 2.0, -1.0, 0.0, float("nan")], [0.0] * 5), key="k", score="reward")
    assert "2 pairs with a margin above 0, 1 below, 1 at 0." in html
    assert "Without 1 pair whose margin is no number." in html
    assert "wrong: 1<" in html
    assert "right: 2<" in html


def test_one_far_pair_does_not_press_the_others_together() -> None:
    margins = [*np.linspace(-1, 1, 999).tolist(), 1000.0]
    html = histogram(data(margins, [0.0] * 1000), key="k", score="reward")
    assert len(set(re.findall(r'<path d="M [^"]*z" clip-path', html))) > 20
    assert "beyond them" in html


def test_the_plane_counts_pairs_in_its_corners() -> None:
    html = flips(data([1, 1, 1, -1, -1, 2, 2, 2, 2, 2], [-1, 1, 1, -1, 1, 1, 1, 1, 1, 1]), key="k")
    assert "turned right 10.0%, both right 70.0%, both wrong 10.0%, turned wrong 10.0%" in html


@pytest.mark.parametrize("size", [POINTS, POINTS + 1])
def test_many_pairs_are_counted_in_squares(size: int) -> None:
    html = changes(plot_data(size), key="k")
    assert ("A dot per pair." in html) == (size == POINTS)
    assert len(html) < 100_000


def test_squares_hold_all_pairs_of_their_side() -> None:
    """A pair at zero is on the lower side, in the shares and in the squares alike."""
    zeros = [0.0] * (POINTS + 1)
    html = changes(data(zeros, zeros), key="k")
    assert "both down 100.0%" in html
    drawn = re.findall(r'<path d="(M [^"]*)" clip-path="[^"]*" style="fill: var\(--orange\)', html)
    assert len(drawn) == 1


def test_estimates_without_a_value_are_left_out_of_the_plot() -> None:
    rows = [Row("known", estimate(0.6, 0.1)), Row("not known", estimate(float("nan"), 0))]
    html = intervals("Accuracy", rows, key="k", centre=0.5, axis="%", scale=100)
    assert "known 60.0% [50.0, 69.0]" in html
    assert "not known" not in html


def test_numbers_of_near_points_stand_apart() -> None:
    near = [(f"run-{each}", estimate(4, 0.5), estimate(0.6, 0.05)) for each in range(5)]
    html = kl_plot(near, title="helpful", key="k", score="reward")
    found = (re.search(rf' y="([-\d.]+)"[^>]*>{each + 1}</text>', html) for each in range(5))
    heights = [float(each[1]) for each in found if each]
    assert len(heights) == 5
    assert np.diff(sorted(heights)).min() > 10
    assert "1 <bdi>run-0</bdi>. 2 <bdi>run-1</bdi>." in html


def test_figures_are_written_as_they_are_read() -> None:
    assert both(estimate(0.6321, 0.05), share=True) == "63.2% [58.2, 67.7]"
    assert both(estimate(-12.346, 1.0)) == "-12.35 [-13.35, -11.45]"
    assert value(estimate(0.0123, 0.001)) == "0.0123"
    assert value(estimate(-0.001, 0.0), share=True) == "-0.1%"
    assert value(estimate(-0.0001, 0.0), share=True) == "0.0%"
    assert points(estimate(0.066, 0.01)) == "+6.6"
    assert points(estimate(0.0, 0.01)) == "0.0"
    assert points(estimate(-0.066, 0.01)) == "-6.6"
    assert interval({"value": 1.0, "low": None, "high": None}) == "–"
    assert number(None) == "–"
    assert p_value(0.0004) == "< 0.001"


def test_text_is_escaped_once() -> None:
    assert tag("p", "a < b & 'c'", title='"') == '<p title="&quot;">a &lt; b &amp; &#x27;c&#x27;</p>'
    assert escaped(tag("br")) == "<br>"
