"""The statistics of the benchmarks: intervals for shares of pairs, clustered by prompt."""

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


def mean_with_interval(
    values: Sequence[float], clusters: Sequence[str], *, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of per-pair values with a percentile bootstrap interval that resamples whole prompts.

    Pairs of one prompt are not independent, so an interval over pairs would be too narrow.
    """
    names, groups = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(groups, weights=np.asarray(values, dtype=float), minlength=len(names))
    counts = np.bincount(groups, minlength=len(names)).astype(float)
    # Resampling n of n prompts with replacement gives multinomial weights.
    draws = np.random.default_rng(seed).multinomial(
        len(names), np.full(len(names), 1 / len(names)), RESAMPLES
    )
    means = (draws @ sums) / (draws @ counts)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(sums.sum() / counts.sum()), float(low), float(high)
