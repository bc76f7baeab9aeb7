"""Means and their intervals."""

import numpy as np
import pytest

from prefopt_cli.evaluation.statistics import mean_with_interval


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
