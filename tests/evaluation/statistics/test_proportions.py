"""The interval of a proportion."""

import pytest
from statsmodels.stats.proportion import proportion_confint

from prefopt_cli.evaluation.statistics.proportions import wilson


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (4300, 4642)])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_agrees_with_statsmodels(successes: int, trials: int, level: float) -> None:
    expected = proportion_confint(successes, trials, alpha=1 - level, method="wilson")
    assert wilson(successes, trials, level) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("trials", [1, 3, 7, 49, 1000])
def test_holds_the_proportion_at_either_end(trials: int) -> None:
    assert wilson(0, trials)[0] == 0.0
    assert wilson(trials, trials)[1] == 1.0
    assert 0 < wilson(0, trials)[1] < 1


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2), (float("nan"), 2)])
def test_what_is_no_proportion(successes: float, trials: float) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        wilson(successes, trials)
