"""How many degraded versions a tokenised set has, how long they are, and what a step takes of them."""

from typing import NamedTuple

import numpy as np
from datasets import Dataset

from prefopt_cli.scoring.savings import Unscored


class Versions(NamedTuple):
    """The D degraded versions of a set of P rows with R responses in all."""

    lengths: np.ndarray
    """(D,) tokens of each."""
    rows: np.ndarray
    """(D,) the row that each belongs to, rising."""
    responses: np.ndarray
    """(D,) the response, counted through over all rows, rising."""
    counts: np.ndarray
    """(R,) versions of every response; 0 where it takes no part."""


def versions_in(rows: Dataset) -> Versions:
    """Look at all rows at once."""
    lists = rows.with_format("arrow")[:]["degraded_ids"].combine_chunks()
    row_at = lists.offsets.to_numpy()
    response_at = lists.values.offsets.to_numpy()[row_at[0] : row_at[-1] + 1]
    lengths = np.diff(lists.values.values.offsets.to_numpy())[response_at[0] : response_at[-1]]
    counts = np.diff(response_at)
    own = np.repeat(np.arange(len(rows)), np.diff(row_at))
    return Versions(lengths, np.repeat(own, counts), np.repeat(np.arange(len(counts)), counts), counts)


def expected_versions(found: Versions, rows: int, levels_per_step: int) -> Unscored:
    """What the draws of a step take of each of P rows on average.

    Of v degraded versions and the response itself, min(levels_per_step, v + 1) are drawn, each as likely as any
    other; the response itself is in the batch already.

    Args:
        found: the versions of the set.
        rows: P.
        levels_per_step: versions drawn for every response that takes part.
    """
    likely = (np.minimum(levels_per_step, found.counts + 1) / (found.counts + 1))[found.responses]
    lengths = found.lengths
    texts, tokens, pairs = (
        np.bincount(found.rows, likely * each, minlength=rows)
        for each in (np.ones_like(lengths), lengths, lengths * (lengths + 1) / 2)
    )
    return Unscored(texts, tokens, pairs)


def longest_versions(found: Versions, rows: int, levels_per_step: int) -> np.ndarray:
    """(P, U) tokens of the longest versions that a step can take of each of P rows; 0 where there are no more.

    An upper bound: a draw may hold the response itself, or shorter versions.

    Args:
        found, rows, levels_per_step: as for `expected_versions`.
    """
    order = np.lexsort((-found.lengths, found.responses))  # the longest of each response first
    place = np.arange(len(order)) - np.repeat(np.cumsum(found.counts) - found.counts, found.counts)
    kept = order[place < levels_per_step]
    counts = np.bincount(found.rows[kept], minlength=rows)
    longest = np.zeros((rows, counts.max(initial=0)), dtype=np.int64)
    longest[np.arange(longest.shape[1]) < counts[:, None]] = found.lengths[kept]
    return longest
