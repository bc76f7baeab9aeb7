"""Means and their intervals."""

import numpy as np
import pytest

from prefopt_cli.evaluation.statistics import Estimate, bootstrap, mean_with_interval, means_with_intervals


def test_by_hand() -> None:
    mean, low, high = mean_with_interval([1, 0, 1, 1], ["a", "a", "b", "b"])
    assert mean == 0.75
    # Two prompts with means 0.5 and 1: resampling draws (a, a), (a, b) or (b, b).
    assert (low, high) == (0.5, 1.0)


def test_pairs_of_one_prompt_do_not_narrow_the_interval() -> None:
    draw = np.random.default_rng(0)
    prompts = draw.integers(0, 2, 100)
    alone = mean_with_interval(prompts, [str(i) for i in range(100)])
    copied = mean_with_interval(np.repeat(prompts, 10), [str(i) for i in range(100) for _ in range(10)])
    assert copied == pytest.approx(alone)


@pytest.mark.slow
def test_coverage() -> None:
    """A 95 % interval holds the true share in about 95 % of simulated sets (here 300 of 150 prompts)."""
    draw = np.random.default_rng(1)
    held = 0
    for seed in range(300):
        shares = draw.beta(3, 2, 150)  # every prompt has its own chance; the mean is 0.6
        values = draw.random((150, 3)) < shares[:, None]
        clusters = [str(i) for i in range(150) for _ in range(3)]
        _, low, high = mean_with_interval(values.ravel(), clusters, seed=seed)
        held += low <= 0.6 <= high
    assert 0.92 <= held / 300 <= 0.98


def test_quantities_share_their_draws() -> None:
    """What is a sum of two others in every observation is so in every resample: the interval is that of the sum."""
    draw = np.random.default_rng(0)
    first, second = draw.normal(size=(2, 60))
    clusters = np.repeat(np.arange(20), 3)
    found = means_with_intervals(
        {"first": first, "doubled": 2 * first, "both": first + second, "second": second}, clusters
    )
    assert list(found) == ["first", "doubled", "both", "second"]
    assert found["doubled"] == pytest.approx([2 * part for part in found["first"]])
    assert found["both"].value == pytest.approx(found["first"].value + found["second"].value)
    for name, values in {"first": first, "second": second}.items():
        assert found[name] == pytest.approx(mean_with_interval(values, clusters))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    quantities = {name: np.random.default_rng(n).normal(size=50) for n, name in enumerate("ab")}
    whole = means_with_intervals(quantities)
    # 7 resamples at a time, which do not divide all.
    monkeypatch.setattr(bootstrap, "BLOCK", 7 * 50)
    blocks = means_with_intervals(quantities)
    assert all(blocks[name] == pytest.approx(whole[name], abs=1e-12) for name in quantities)
    assert bootstrap.RESAMPLES % 7


def test_seed_and_level() -> None:
    values = np.random.default_rng(0).normal(size=40)
    assert mean_with_interval(values) == mean_with_interval(values)
    assert mean_with_interval(values) != mean_with_interval(values, seed=1)
    wide, narrow = mean_with_interval(values, level=0.99), mean_with_interval(values, level=0.5)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


def test_one_cluster_has_an_interval_of_no_width() -> None:
    assert mean_with_interval([1, 2, 6], ["a", "a", "a"]) == (3.0, 3.0, 3.0)
    assert mean_with_interval([4.0]) == (4.0, 4.0, 4.0)


def test_what_has_no_mean() -> None:
    assert means_with_intervals({}) == {}
    with pytest.raises(ValueError, match="no mean"):
        means_with_intervals({"a": []})
    with pytest.raises(ValueError, match="3 values in 2 clusters"):
        means_with_intervals({"a": [1, 2, 3]}, ["p", "q"])
    with pytest.raises(ValueError, match="inhomogeneous"):
        means_with_intervals({"a": [1, 2, 3], "b": [1, 2]})


def test_significance() -> None:
    estimate = Estimate(1.0, 0.0, 2.0)
    assert not any(map(estimate.excludes, (0.0, 1.0, 2.0)))
    assert estimate.excludes(-0.1)
    assert estimate.excludes(2.1)
    assert estimate.to_dict() == {"value": 1.0, "low": 0.0, "high": 2.0}
