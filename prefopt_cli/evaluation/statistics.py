"""Means with intervals that respect prompts: answers to one prompt are not independent of one another."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
BLOCK = 4_000_000
"""Numbers drawn at a time: 32 MB."""


class Estimate(NamedTuple):
    """A mean and its interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return self._asdict()

    def excludes(self, value: float) -> bool:
        """Whether the interval leaves this value out: the difference to it is significant."""
        return not self.low <= value <= self.high


def mean_with_interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """As `means_with_intervals`, for one quantity."""
    return means_with_intervals({"": values}, clusters, level=level, seed=seed)[""]


def means_with_intervals(
    quantities: Mapping[str, Sequence[float] | np.ndarray],
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Means with percentile bootstrap intervals that resample whole clusters (Efron and Tibshirani 1993).

    Args:
        quantities: by name, (N,) values, one per observation.
        clusters: (N,) what observations belong together, usually their prompt; None: each stands alone.
        level: share of the bootstrap means that an interval holds.
        seed: of the resampling; the same seed gives the same intervals.

    Raises:
        ValueError: there are no values, or not as many clusters as values.
    """
    if not quantities:
        return {}
    columns = np.array([np.asarray(values, dtype=float) for values in quantities.values()])
    if clusters is None:
        clusters = np.arange(columns.shape[1])
    if not columns.shape[1] or columns.shape[1] != len(clusters):
        raise ValueError(f"{columns.shape[1]} values in {len(clusters)} clusters have no mean")
    names, groups = np.unique(np.asarray(clusters), return_inverse=True)
    counts = np.bincount(groups, minlength=len(names)).astype(float)
    sums = np.array([np.bincount(groups, weights=column, minlength=len(names)) for column in columns])
    means = np.concatenate(
        [(draws @ sums.T) / (draws @ counts)[:, None] for draws in _draws(len(names), seed)]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    value = sums.sum(axis=1) / counts.sum()
    return {
        name: Estimate(float(value[n]), float(low[n]), float(high[n])) for n, name in enumerate(quantities)
    }


def _draws(clusters: int, seed: int) -> Iterator[np.ndarray]:
    """How often each cluster is drawn, resample by resample: n of n with replacement is multinomial."""
    random = np.random.default_rng(seed)
    chances = np.full(clusters, 1 / clusters)
    block = max(1, BLOCK // clusters)
    for start in range(0, RESAMPLES, block):
        yield random.multinomial(clusters, chances, min(block, RESAMPLES - start)).astype(float)
