"""Paired tests and their adjustment."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from prefopt_cli.evaluation.statistics import significance
from prefopt_cli.evaluation.statistics.significance import holm, paired_p_value


def test_by_hand() -> None:
    """Of the 8 patterns of 1, 2, 4 only +++ and --- are as far from zero as 7; -1, 2, 4 has four, at 5 and 7."""
    assert paired_p_value([1, 2, 4]) == 2 / 8
    assert paired_p_value([-1, 2, 4]) == 4 / 8


@pytest.mark.parametrize("seed", range(5))
def test_few_clusters_agree_with_scipy_exactly(seed: int) -> None:
    differences = np.random.default_rng(seed).normal(0.4, 1, 9).round(1)
    expected = stats.permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert paired_p_value(differences) == pytest.approx(expected.pvalue, abs=1e-12)


@pytest.mark.parametrize(("better", "worse"), [(3, 3), (5, 1), (0, 6), (9, 4), (1, 0)])
def test_mcnemar_exact(better: int, worse: int) -> None:
    differences = [1] * better + [-1] * worse + [0] * 20
    expected = stats.binomtest(better, better + worse).pvalue
    assert paired_p_value(differences) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_by_chance() -> None:
    differences = [1] * 60 + [-1] * 40 + [0] * 300
    expected = stats.binomtest(60, 100).pvalue
    assert paired_p_value(differences) == pytest.approx(expected, abs=4 * (expected / 10_000) ** 0.5)


def test_whole_clusters_flip() -> None:
    """Copies of an observation in its cluster change nothing; what cancels out within a cluster is no difference."""
    values = np.random.default_rng(0).normal(0.3, 1, 30)
    alone = paired_p_value(values)
    assert paired_p_value(np.repeat(values, 5), np.repeat(np.arange(30), 5)) == alone
    assert alone > 1.5 * paired_p_value(np.repeat(values, 5))
    assert paired_p_value([0.1, 0.2, -0.3, 0, 0], list("aaabb")) == 1.0
    assert paired_p_value([0.1, 0.2, -0.3, 1, 1], list("aaabb")) == 1.0


def test_ties_count_whatever_the_rounding() -> None:
    """All 0.1: reached by all patterns at +-n only, in whatever order the sums are rounded."""
    assert paired_p_value([0.1] * 10) == 2 / 2**10
    differences = np.repeat([0.1, -0.1, 0.3], [6, 4, 2])
    assert paired_p_value(differences) == paired_p_value(np.round(differences * 10))


def test_smallest_value_and_none() -> None:
    assert paired_p_value(np.ones(100), permutations=199) == 1 / 200
    assert paired_p_value(np.zeros(5)) == 1.0
    with pytest.raises(ValueError, match="0 differences"):
        paired_p_value([])
    with pytest.raises(ValueError, match="3 differences in 2 clusters"):
        paired_p_value([1, 2, 3], ["a", "b"])
    with pytest.raises(ValueError, match="not a finite number"):
        paired_p_value([1.0, np.nan])


def test_seed_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(0.2, 1, 64)
    whole = paired_p_value(values)
    assert whole != paired_p_value(values, seed=1)
    assert whole == pytest.approx(paired_p_value(values, seed=1), abs=0.02)
    monkeypatch.setattr(significance, "BLOCK", 7 * 64)
    assert paired_p_value(values) == whole


@pytest.mark.parametrize("clusters", [12, 40])
def test_rejects_as_often_as_it_says(clusters: int) -> None:
    """Where both are equally good, 5 % of p-values are below 0.05 and half below one half, within 4 standard errors."""
    sets = 600
    draw = np.random.default_rng(0)
    found = np.array(
        [
            paired_p_value(
                draw.standard_t(3, clusters * 2) + np.repeat(draw.normal(size=clusters), 2),
                np.repeat(np.arange(clusters), 2),
                seed=seed,
                permutations=999,
            )
            for seed in range(sets)
        ]
    )
    for level in (0.05, 0.5):
        assert (found <= level).mean() == pytest.approx(level, abs=4 * (level * (1 - level) / sets) ** 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_holm_agrees_with_statsmodels(seed: int) -> None:
    p_values = np.random.default_rng(seed).uniform(size=8) ** 3
    p_values[3] = p_values[5]
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []
