"""Scores against ranks."""

import math

import numpy as np
import pytest
from scipy import stats

from prefopt_cli.evaluation.statistics.ranking import best_hit, chance_of_best, kendall_tau


def test_by_hand() -> None:
    assert kendall_tau([3.0, 2.0, 1.0], [0, 1, 2]) == pytest.approx(1)
    assert kendall_tau([1.0, 2.0, 3.0], [0, 1, 2]) == pytest.approx(-1)
    # Of three comparable pairs two agree; ranks tie in one pair: (2 - 0) / sqrt(3 * 2).
    assert kendall_tau([3.0, 2.0, 1.0], [0, 1, 1]) == pytest.approx(2 / math.sqrt(6))


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_scipy(seed: int) -> None:
    draw = np.random.default_rng(seed)
    size = int(draw.integers(2, 9))
    scores, ranks = draw.integers(0, 4, size), draw.integers(0, 3, size)
    expected = stats.kendalltau(-scores, ranks, variant="b").statistic
    assert kendall_tau(scores, ranks) == pytest.approx(expected, nan_ok=True)


def test_undefined_where_all_are_equal() -> None:
    assert math.isnan(kendall_tau([1.0, 1.0], [0, 1]))
    assert math.isnan(kendall_tau([1.0, 2.0], [0, 0]))
    assert math.isnan(kendall_tau([1.0], [0]))


def test_best_hit() -> None:
    assert best_hit([0.3, 0.9, 0.1], [1, 0, 2]) == 1
    assert best_hit([0.9, 0.3, 0.1], [1, 0, 2]) == 0
    assert best_hit([0.9, 0.9, 0.1], [1, 0, 0]) == 0.5
    assert best_hit([0.9, 0.5, 0.1], [0, 0, 1]) == 1


def test_chance_is_what_random_scores_hit() -> None:
    ranks = [0, 1, 0, 2, 3]
    draw = np.random.default_rng(0)
    hits = [best_hit(draw.normal(size=5), ranks) for _ in range(4000)]
    assert chance_of_best(ranks) == 0.4
    assert np.mean(hits) == pytest.approx(0.4, abs=0.03)


def test_what_is_no_ranking() -> None:
    with pytest.raises(ValueError, match="2 scores and 1 ranks"):
        kendall_tau([1.0, 2.0], [0])
    with pytest.raises(ValueError, match="no ranking"):
        best_hit([], [])
    with pytest.raises(ValueError, match="no ranking"):
        chance_of_best([])
