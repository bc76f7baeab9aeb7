"""How well scores order the responses to one prompt whose ranks are known; rank 0 is best, equal ranks are ties."""

import math
from collections.abc import Sequence

import numpy as np

Values = Sequence[float] | Sequence[int] | np.ndarray


def kendall_tau(scores: Values, ranks: Values) -> float:
    """Kendall's tau-b (Kendall 1945): 1 where higher scores go with better ranks throughout, -1 the other way round.

    Ties on either side are corrected for; nan where all scores or all ranks are equal.

    Raises:
        ValueError: there are no responses, or not as many ranks as scores.
    """
    higher, better = (_signs(values) for values in _checked(scores, ranks))
    compared = math.sqrt(np.abs(higher).sum() * np.abs(better).sum())
    return float(-(higher * better).sum() / compared) if compared else math.nan


def best_hit(scores: Values, ranks: Values) -> float:
    """1 where the highest score is that of a best response; of several that are highest, the share that is best.

    Raises:
        ValueError: there are no responses, or not as many ranks as scores.
    """
    given, places = _checked(scores, ranks)
    return float((places[given == given.max()] == 0).mean())


def chance_of_best(ranks: Values) -> float:
    """The share of the responses that are best: what `best_hit` gives on average to scores drawn by chance.

    Raises:
        ValueError: there are no responses.
    """
    return float((_checked(ranks, ranks)[1] == 0).mean())


def _checked(scores: Values, ranks: Values) -> tuple[np.ndarray, np.ndarray]:
    if not len(scores) or len(scores) != len(ranks):
        raise ValueError(f"{len(scores)} scores and {len(ranks)} ranks are no ranking")
    return np.asarray(scores, dtype=float), np.asarray(ranks)


def _signs(values: np.ndarray) -> np.ndarray:
    """(K, K) whether one is above the other: 1, 0 or -1."""
    return np.sign(values[:, None] - values[None, :])
