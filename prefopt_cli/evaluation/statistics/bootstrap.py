"""Intervals of smooth functions of totals, from resampled clusters: all quantities share the same draws."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from prefopt_cli.evaluation.statistics.proportions import LEVEL, wilson

RESAMPLES = 10_000
BLOCK = 4_000_000
"""Numbers held at a time: 32 MB."""


class Estimate(NamedTuple):
    """A figure and its interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return self._asdict()

    def excludes(self, value: float) -> bool:
        """Whether the interval leaves this value out: the difference to it is significant."""
        return not self.low <= value <= self.high


@dataclass(frozen=True)
class Quantity:
    """A function of sums over the observations, such as a mean: a sum divided by a count."""

    columns: tuple[np.ndarray, ...]
    """Each (N,), summed over the observations of a resample. An observation that is not meant is 0 in all of them."""
    function: Callable[..., np.ndarray]
    """Takes the total of each column, (R,), and returns (R,); nan where a resample has no such quantity."""
    share: bool = False
    """A proportion: the columns are values in [0, 1] and what counts (0 or 1), the function divides."""


def mean(values: Sequence[float] | np.ndarray, where: Sequence[bool] | np.ndarray | None = None) -> Quantity:
    """The mean of (N,) values, or of those where the (N,) mask is true."""
    values = np.asarray(values, dtype=float)
    counted = np.ones(len(values), dtype=bool) if where is None else np.asarray(where, dtype=bool)
    return Quantity((np.where(counted, values, 0.0), counted.astype(float)), np.divide)


def share(values: Sequence[float] | np.ndarray, where: Sequence[bool] | np.ndarray | None = None) -> Quantity:
    """As `mean`, for values that are 0, 1/2 (a tie) or 1."""
    return Quantity(mean(values, where).columns, np.divide, share=True)


def estimates(
    quantities: Mapping[str, Quantity],
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    *,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Each quantity with its interval, from resamples of whole clusters (Efron and Tibshirani 1993).

    The interval is the expanded percentile interval (Hesterberg 2015): the percentiles are taken further
    out, as few clusters make a plain percentile interval too narrow. A share whose observations stand alone and are
    0 or 1, or that is the same in all clusters, has the Wilson interval instead: there the bootstrap is poor or has
    nothing to resample. One cluster tells nothing of the spread between clusters: its interval has no width.

    Args:
        quantities: by name, of the same N observations.
        clusters: (N,) what observations belong together, usually their prompt; None: each stands alone.
        level: of confidence.
        seed: of the resampling; the same seed gives the same intervals.

    Raises:
        ValueError: there are no observations, not as many clusters as observations, or none that a quantity is about.
    """
    if not quantities:
        return {}
    columns = [column for quantity in quantities.values() for column in quantity.columns]
    sums, present = cluster_sums(columns, clusters)
    drawn = resampled(sums, seed)
    found, start = {}, 0
    for name, quantity in quantities.items():
        own = slice(start, start + len(quantity.columns))
        start = own.stop
        value = float(_apply(quantity, sums[own].sum(axis=1, keepdims=True))[0])
        if math.isnan(value):
            raise ValueError(f"No observation is there for {name!r}, or its value is not a number")
        size = int(present[own].any(axis=0).sum())
        interval = _proportion(sums[own], size, level) if quantity.share else None
        if interval is None:
            interval = _expanded(value, _apply(quantity, drawn[own]), size, level)
        found[name] = Estimate(value, *interval)
    return found


def cluster_sums(
    columns: Sequence[np.ndarray], clusters: Sequence[Hashable] | np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(K, C) the sum of each of K columns (N,) in each of C clusters, and (K, C) whether it has a value but 0 there.

    Raises:
        ValueError: there are no observations, or not as many clusters as observations.
    """
    table = np.array(columns, dtype=float)
    if clusters is None:
        clusters = np.arange(table.shape[1])
    if not table.shape[1] or table.shape[1] != len(clusters):
        raise ValueError(f"{table.shape[1]} values in {len(clusters)} clusters have no mean")
    names, groups = np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.array([np.bincount(groups, weights=column, minlength=len(names)) for column in table])
    present = [np.bincount(groups, weights=column != 0, minlength=len(names)) > 0 for column in table]
    return sums, np.array(present)


def resampled(sums: np.ndarray, seed: int) -> np.ndarray:
    """(K, R) totals of (K, C) sums in R resamples of C clusters each, drawn with replacement.

    Counted numbers are multinomial, as those of `Generator.multinomial`, and come ten times faster.
    """
    clusters = sums.shape[1]
    random = np.random.default_rng(seed)
    block = max(1, BLOCK // clusters)
    totals = np.empty((len(sums), RESAMPLES))
    for start in range(0, RESAMPLES, block):
        times = np.empty((min(block, RESAMPLES - start), clusters))
        for row in times:
            row[:] = np.bincount(random.integers(0, clusters, clusters, dtype=np.int32), minlength=clusters)
        totals[:, start : start + block] = sums @ times.T
    return totals


def _apply(quantity: Quantity, totals: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return quantity.function(*totals)


def _expanded(value: float, drawn: np.ndarray, clusters: int, level: float) -> tuple[float, float]:
    """The expanded percentile interval. Resamples without the quantity (nan) are left out."""
    if clusters < 2:
        return value, value
    tail = expanded_tail(clusters, level)
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _proportion(sums: np.ndarray, clusters: int, level: float) -> tuple[float, float] | None:
    """The Wilson interval of a share, where it applies.

    Where all clusters agree nothing says how alike the observations of one are: then the clusters are the trials.
    """
    values, counts = sums[:, sums[1] > 0]
    alone = counts.max() <= 1 and np.isin(values, (0, 1)).all()
    if alone or np.ptp(values / counts) == 0:
        return wilson(float(values.sum() / counts.sum()) * clusters, clusters, level)
    return None


def expanded_tail(n: int, level: float) -> float:
    """Share of the resamples to leave out at either end: Phi(-sqrt(n / (n - 1)) t), t of n - 1 degrees of freedom."""
    return 0.5 * math.erfc(math.sqrt(n / (n - 1)) * t_quantile((1 + level) / 2, n - 1) / math.sqrt(2))


@lru_cache
def t_quantile(chance: float, df: int) -> float:
    """Student's t: the value below which a ``chance`` in [1/2, 1) lies, by halving the angle atan(t / sqrt(df)).

    For whole degrees of freedom the distribution is a finite sum in that angle (Abramowitz and Stegun 26.7.3-4).
    """
    odd = df % 2
    steps = np.arange(1, df // 2)
    factors = np.cumprod(np.r_[1.0, (2 * steps - 1 + odd) / (2 * steps + odd)])[: df // 2]
    powers = odd + 2 * np.arange(len(factors))

    def inside(angle: float) -> float:
        """P(|T| < sqrt(df) tan(angle))."""
        total = math.sin(angle) * float(factors @ math.cos(angle) ** powers)
        return 2 / math.pi * (angle + total) if odd else total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 2 * chance - 1 else (low, middle)
    return math.sqrt(df) * math.tan((low + high) / 2)
