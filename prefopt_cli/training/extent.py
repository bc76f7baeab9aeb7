"""How long the rows of a tokenised set are, without looking at one after the other."""

import numpy as np
from datasets import Dataset


def row_lengths(rows: Dataset) -> np.ndarray:
    """(P, 1 + N) tokens of the prompt and of each response of every row; 0 where a row has fewer responses."""
    table = rows.with_format("arrow")[:]
    lists = table["response_ids"].combine_chunks()
    starts = lists.offsets.to_numpy()
    counts = np.diff(starts)
    lengths = np.diff(lists.values.offsets.to_numpy())[starts[0] : starts[-1]]
    found = np.zeros((len(rows), 1 + counts.max()), dtype=np.int64)
    found[:, 0] = np.diff(table["prompt_ids"].combine_chunks().offsets.to_numpy())
    found[:, 1:][np.arange(counts.max()) < counts[:, None]] = lengths
    return found


def prompt_lengths(rows: Dataset) -> np.ndarray:
    """(P,) tokens of every prompt."""
    lengths: np.ndarray = np.diff(
        rows.with_format("arrow")[:]["prompt_ids"].combine_chunks().offsets.to_numpy()
    )
    return lengths


def longest_row(rows: Dataset) -> int:
    """Tokens of the longest prompt + response of a set."""
    lengths = row_lengths(rows)
    return int((lengths[:, 0] + lengths[:, 1:].max(1)).max())


def largest_id(rows: Dataset) -> int:
    """The largest token id of a set."""
    table = rows.with_format("arrow")[:]
    largest = 0
    for name in {"prompt_ids", "response_ids"} & set(table.column_names):
        ids = table[name].combine_chunks().flatten()
        ids = (ids.flatten() if name == "response_ids" else ids).to_numpy()
        largest = max(largest, int(ids.max(initial=0)))
    return largest
