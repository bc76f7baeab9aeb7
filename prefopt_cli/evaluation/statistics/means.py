"""Means with intervals that respect prompts: answers to one prompt are not independent of one another."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from prefopt_cli.evaluation.statistics.bootstrap import Estimate, estimates, mean
from prefopt_cli.evaluation.statistics.proportions import LEVEL

__all__ = ["LEVEL", "Estimate", "mean_with_interval", "means_with_intervals"]


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
    """Means with bootstrap intervals that resample whole clusters, all from the same draws (see `estimates`).

    Args:
        quantities: by name, (N,) values, one per observation.
        clusters: (N,) what observations belong together, usually their prompt; None: each stands alone.
        level: of confidence.
        seed: of the resampling; the same seed gives the same intervals.

    Raises:
        ValueError: there are no values, or not as many clusters as values.
    """
    means = {name: mean(values) for name, values in quantities.items()}
    return estimates(means, clusters, level=level, seed=seed)
