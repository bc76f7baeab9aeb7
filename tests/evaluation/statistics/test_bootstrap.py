"""Intervals of functions of totals."""

import numpy as np
import pytest
from scipy import stats

from prefopt_cli.evaluation.statistics import bootstrap
from prefopt_cli.evaluation.statistics.bootstrap import (
    Quantity,
    estimates,
    expanded_tail,
    mean,
    resampled,
    share,
    t_quantile,
)
from prefopt_cli.evaluation.statistics.proportions import wilson


@pytest.mark.parametrize("chance", [0.5001, 0.75, 0.9, 0.975, 0.995, 0.9999])
def test_t_quantile_agrees_with_scipy(chance: float) -> None:
    df = np.array([*range(1, 1001), 4639, 20_000])
    found = [t_quantile(chance, int(each)) for each in df]
    np.testing.assert_allclose(found, stats.t.ppf(chance, df), rtol=1e-9, atol=1e-9)


def test_expanded_tail() -> None:
    """Hesterberg (2015): for n = 5 the 2.5 % percentile becomes the 0.1 %, for many it stays."""
    expected = stats.norm.cdf(-np.sqrt(5 / 4) * stats.t.ppf(0.975, 4))
    assert expanded_tail(5, 0.95) == pytest.approx(expected, rel=1e-9)
    assert expected < 0.001 * 1.1
    assert expanded_tail(100_000, 0.95) == pytest.approx(0.025, rel=1e-3)


def test_draws_are_multinomial() -> None:
    """The totals of one-hot clusters are the draws: n of them each time, with the multinomial's (co)variances."""
    clusters = 7
    draws = resampled(np.eye(clusters), seed=0)
    assert draws.shape == (clusters, bootstrap.RESAMPLES)
    assert (draws.sum(axis=0) == clusters).all()
    np.testing.assert_allclose(draws.mean(axis=1), 1, atol=0.05)
    expected = np.where(np.eye(clusters), 1 - 1 / clusters, -1 / clusters)
    np.testing.assert_allclose(np.cov(draws), expected, atol=0.05)
    chances = stats.binom.pmf(np.arange(clusters + 1), clusters, 1 / clusters)
    counts = np.bincount(draws[0].astype(int), minlength=clusters + 1)
    np.testing.assert_allclose(counts / counts.sum(), chances, atol=0.02)


def test_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).exponential(size=400)
    found = estimates({"mean": mean(values)})["mean"]
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), abs=0.1 * half)


def test_few_clusters_are_as_wide_as_student_says() -> None:
    """The interval of 6 normal clusters is about as wide as that of Student's t; percentiles alone give 2/3 of it."""
    widths = []
    for seed in range(40):
        values = np.random.default_rng(seed).normal(size=6)
        found = estimates({"mean": mean(values)}, seed=seed)["mean"]
        widths.append((found.high - found.low) / (2 * stats.t.ppf(0.975, 5) * values.std(ddof=1) / 6**0.5))
    assert np.mean(widths) == pytest.approx(1, abs=0.12)


def test_smooth_functions_share_the_draws() -> None:
    first, second = np.random.default_rng(0).normal(3, 1, size=(2, 80))
    clusters = np.repeat(np.arange(40), 2)
    found = estimates(
        {
            "ratio": Quantity((first, second), np.divide),
            "inverse": Quantity((second, first), np.divide),
            "same": Quantity((second, second), np.divide),
        },
        clusters,
    )
    ratio, inverse = found["ratio"], found["inverse"]
    assert ratio.value == pytest.approx(first.sum() / second.sum())
    assert ratio == pytest.approx((1 / inverse.value, 1 / inverse.high, 1 / inverse.low), rel=1e-4)
    assert found["same"] == (1, 1, 1)


def test_subset() -> None:
    """A mean of a subset is that of the subset alone, its clusters counted, whatever the others hold."""
    draw = np.random.default_rng(1)
    values, inside = draw.normal(size=300), np.arange(300) < 12
    found = estimates({"part": mean(np.where(inside, values, np.nan), inside)}, np.arange(300) // 3)["part"]
    alone = estimates({"part": mean(values[:12])}, np.arange(12) // 3)["part"]
    assert found.value == pytest.approx(alone.value)
    # How many of the four clusters a resample of all holds is by chance, so the interval is a little different.
    assert found.high - found.low == pytest.approx(alone.high - alone.low, rel=0.3)


def test_resamples_without_the_subset_are_left_out() -> None:
    values, inside = np.array([1.0, 2, 3, 4, 5]), np.array([True, True, False, False, False])
    found = estimates({"part": mean(values, inside)})["part"]
    assert found == (1.5, 1.0, 2.0)


def test_empty_subset() -> None:
    with pytest.raises(ValueError, match="No observation is there for 'part'"):
        estimates({"all": mean([1.0, 2.0]), "part": share([1.0, 0.0], [False, False])})


def test_no_quantities_no_observations() -> None:
    assert estimates({}) == {}
    with pytest.raises(ValueError, match="0 values in 0 clusters"):
        estimates({"a": mean([])})
    with pytest.raises(ValueError, match="3 values in 2 clusters"):
        estimates({"a": share([1, 0, 1])}, ["p", "q"])


def test_share_of_lone_observations_is_wilsons() -> None:
    values = np.array([1, 1, 0, 1, 1, 1, 0, 1])
    found = estimates({"share": share(values)}, list("abcdefgh"))["share"]
    assert found == pytest.approx((0.75, *wilson(6, 8)))
    # A subset whose observations stand alone, though others do not.
    found = estimates({"share": share(values, np.arange(8) < 4)}, list("abcdeeee"))["share"]
    assert found == pytest.approx((0.75, *wilson(3, 4)))


def test_share_without_variance_has_a_width() -> None:
    """Ten right pairs of two prompts are two trials, not ten; so are two prompts with half of theirs right."""
    clusters = ["a"] * 4 + ["b"] * 6
    assert estimates({"share": share([1] * 10)}, clusters)["share"] == pytest.approx((1, *wilson(2, 2)))
    halves = estimates({"share": share([1, 0] * 5)}, clusters)["share"]
    assert halves == pytest.approx((0.5, *wilson(1, 2)))
    ties = estimates({"share": share([0.5] * 10)}, clusters)["share"]
    assert ties == pytest.approx((0.5, *wilson(1, 2)))


def test_clustered_shares_and_ties_are_resampled() -> None:
    draw = np.random.default_rng(0)
    values = draw.integers(0, 2, 60)
    clusters = np.arange(60) // 2
    together = {"share": share(values), "mean": mean(values)}
    found = estimates(together, clusters)
    assert found["share"] == found["mean"]
    tied = np.where(np.arange(60) < 5, 0.5, values)
    found = estimates({"share": share(tied), "mean": mean(tied)})
    assert found["share"] == found["mean"]


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    quantities = {"ratio": Quantity(tuple(np.random.default_rng(0).uniform(1, 2, (2, 50))), np.divide)}
    whole = estimates(quantities)
    monkeypatch.setattr(bootstrap, "BLOCK", 7 * 50)  # 7 resamples at a time, which do not divide all
    assert estimates(quantities)["ratio"] == pytest.approx(whole["ratio"], abs=1e-12)
    assert bootstrap.RESAMPLES % 7
