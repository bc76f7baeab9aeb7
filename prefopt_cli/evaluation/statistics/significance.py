"""Whether two policies differ on the same pairs, and what is left of that when many sets are looked at."""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

PERMUTATIONS = 10_000
ENUMERATED = 13
"""Up to so many clusters that differ, all 2^13 = 8192 patterns of signs are gone through."""
BLOCK = 4_000_000
"""Signs held at a time: 32 MB."""
ROUNDING = 1e-12


def paired_p_value(
    differences: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | np.ndarray | None = None,
    *,
    seed: int = 0,
    permutations: int = PERMUTATIONS,
) -> float:
    """Two-sided p-value of the hypothesis that either policy is as likely to be the better one in each cluster.

    The sign of a whole cluster's sum is flipped (Fisher 1935): with k of R random patterns at least as far from zero
    as the observed total, p = (1 + k) / (1 + R). With few clusters all patterns are gone through and p is exact.
    For 0/1 outcomes of pairs that stand alone this is McNemar's exact test.

    Args:
        differences: (N,) first policy - second policy, observation by observation.
        clusters: (N,) what observations belong together, usually their prompt; None: each stands alone.
        seed: of the patterns.
        permutations: how many patterns, R.

    Raises:
        ValueError: there are no differences, not as many clusters as differences, or one is not finite.
    """
    values = np.asarray(differences, dtype=float)
    if clusters is None:
        clusters = np.arange(len(values))
    if not len(values) or len(values) != len(clusters):
        raise ValueError(f"{len(values)} differences in {len(clusters)} clusters cannot be tested")
    if not np.isfinite(values).all():
        raise ValueError("A difference is not a finite number")
    groups = np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums = np.bincount(groups, weights=values)
    # What cancels out within a cluster is zero but for rounding.
    sums = sums[np.abs(sums) > ROUNDING * np.bincount(groups, weights=np.abs(values))]
    if not len(sums):
        return 1.0
    # Patterns that tie with the observed one count, whatever the order in which they were added.
    bound = abs(sums.sum()) - ROUNDING * np.abs(sums).sum()
    if len(sums) <= ENUMERATED:
        patterns = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
        return float((_totals(patterns, sums) >= bound).mean())
    reached = sum(
        int((_totals(patterns, sums) >= bound).sum()) for patterns in _patterns(len(sums), permutations, seed)
    )
    return (1 + reached) / (1 + permutations)


def _patterns(clusters: int, permutations: int, seed: int) -> Iterator[np.ndarray]:
    """Random zeros and ones, (patterns, clusters), in blocks."""
    random = np.random.default_rng(seed)
    block = max(1, BLOCK // clusters)
    for start in range(0, permutations, block):
        rows = min(block, permutations - start)
        octets = random.integers(0, 256, (rows, -(-clusters // 8)), dtype=np.uint8)
        yield np.unpackbits(octets, axis=1, count=clusters)


def _totals(patterns: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """How far from zero each total is, where a pattern's ones keep their sign and its zeros are flipped."""
    return np.abs(2 * (patterns.astype(float) @ sums) - sums.sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number, in the same order (Holm 1979).

    Where those at or below a threshold count as significant, one or more of them is so by chance with at most that
    probability, whatever the dependence between them.
    """
    order = np.argsort(p_values, kind="stable")
    stepped = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return [float(p) for p in adjusted]
