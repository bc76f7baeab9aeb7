"""Intervals of proportions."""

import math
from statistics import NormalDist

LEVEL = 0.95


def wilson(successes: float, trials: float, level: float = LEVEL) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927), which keeps within [0, 1] and has a width at 0 and at 1.

    Raises:
        ValueError: there are no trials, or not between 0 and ``trials`` successes.
    """
    if not 0 <= successes <= trials or not trials:
        raise ValueError(f"{successes:g} successes in {trials:g} trials are no proportion")
    z = NormalDist().inv_cdf((1 + level) / 2)
    found = successes / trials
    middle = found + z * z / (2 * trials)
    half = z * math.sqrt(found * (1 - found) / trials + (z / (2 * trials)) ** 2)
    low, high = ((middle + side * half) / (1 + z * z / trials) for side in (-1, 1))
    # At 0 and 1 the bound is exact but for rounding.
    return min(max(0.0, low), found), max(min(1.0, high), found)
