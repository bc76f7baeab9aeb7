"""Rows of token ids as flat arrays: the tables that are trained on, their fingerprints and their lengths."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Token ids (int32) of one prompt and of its responses from the best on, and their dense ranks.

    Rows share arrays where they share text, so that repeats and pairs of one list cost no memory here.
    """

    row_id: str
    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    ranks: tuple[int, ...]
    degrees: tuple[tuple[tuple[int, np.ndarray], ...], ...] = ()
    """For each response its degraded versions, each with its level; empty where none were asked for."""


class Ragged(NamedTuple):
    """Lists of different lengths (int64), one after the other in ``values``."""

    lengths: np.ndarray
    values: np.ndarray

    def as_arrow(self, values: pa.Array | None = None) -> pa.LargeListArray:
        """The lists, of other ``values`` if given."""
        offsets = np.concatenate(([0], np.cumsum(self.lengths)))
        return pa.LargeListArray.from_arrays(offsets, pa.array(self.values) if values is None else values)


@dataclass(frozen=True)
class Columns:
    """A set as flat arrays: lists of Python ints would take ten times the memory.

    ``responses`` has those of all rows one after the other; ``ranks`` says how many are a row's.
    """

    row_ids: list[str]
    prompts: Ragged
    responses: Ragged
    ranks: Ragged
    levels: Ragged | None = None
    """Levels of each response's degraded versions, where they were asked for."""
    degraded: Ragged | None = None
    """Tokens of each degraded version."""

    @property
    def pairwise(self) -> bool:
        """Whether every row has exactly two responses."""
        return bool((self.ranks.lengths == 2).all())


def columns_of(rows: Sequence[TokenRow]) -> Columns:
    """The rows' arrays, joined."""
    sizes = np.fromiter((len(row.ranks) for row in rows), np.int64, len(rows))
    ranks = np.fromiter(chain.from_iterable(row.ranks for row in rows), np.int32, int(sizes.sum()))
    columns = Columns(
        [row.row_id for row in rows],
        _ragged([row.prompt for row in rows]),
        _ragged([response for row in rows for response in row.responses]),
        Ragged(sizes, ranks),
    )
    if not any(row.degrees for row in rows):
        return columns
    versions = [each for row in rows for each in row.degrees]
    levels = _ragged([np.array([level for level, _ in each], dtype=np.int32) for each in versions])
    return replace(
        columns, levels=levels, degraded=_ragged([tokens for each in versions for _, tokens in each])
    )


def _ragged(lists: Sequence[np.ndarray]) -> Ragged:
    lengths = np.fromiter(map(len, lists), np.int64, len(lists))
    return Ragged(lengths, np.concatenate(lists) if lists else np.empty(0, np.int32))


def as_dataset(columns: Columns) -> datasets.Dataset:
    """An in-memory table of ``row_id``, ``prompt_ids`` and what else there is; see ``TokenizedData``."""
    table: dict[str, Any] = {"row_id": columns.row_ids, "prompt_ids": columns.prompts.as_arrow()}
    if len(columns.responses.lengths):
        table["response_ids"] = columns.ranks.as_arrow(columns.responses.as_arrow())
        table["ranks"] = columns.ranks.as_arrow()
    if columns.levels is not None and columns.degraded is not None:
        table["degraded_ids"] = columns.ranks.as_arrow(columns.levels.as_arrow(columns.degraded.as_arrow()))
        table["degraded_levels"] = columns.ranks.as_arrow(columns.levels.as_arrow())
    return datasets.Dataset(datasets.table.InMemoryTable(pa.table(table)))


def fingerprint(columns: Columns) -> str:
    """sha256 of token ids, ranks and levels in order, whatever the row ids."""
    digest = hashlib.sha256()
    for lists in (columns.prompts, columns.responses, columns.ranks, columns.levels, columns.degraded):
        if lists is None:
            continue
        # Lengths first: the same tokens cut at other places are other data.
        digest.update(lists.lengths.astype("<i8", copy=False).tobytes())
        digest.update(lists.values.astype("<i4", copy=False).tobytes())
    return digest.hexdigest()


def length_figures(columns: Columns) -> dict[str, Any]:
    """``lengths`` of a ``SetReceipt`` and, for pairs, how often the chosen response is the longer one."""
    lengths = {"prompt": _summary(columns.prompts.lengths)}
    responses = columns.responses.lengths
    if not len(responses):
        return {"lengths": lengths}
    if not columns.pairwise:
        return {"lengths": lengths | {"responses": _summary(responses)}}
    chosen, rejected = responses[::2], responses[1::2]
    return {
        "lengths": lengths | {"chosen": _summary(chosen), "rejected": _summary(rejected)},
        "chosen_longer": float(np.mean(chosen > rejected)),
        "same_length": float(np.mean(chosen == rejected)),
    }


def _summary(lengths: np.ndarray) -> dict[str, int]:
    points = {f"p{q}": int(np.percentile(lengths, q, method="nearest")) for q in (5, 50, 95)}
    return {**points, "max": int(lengths.max()), "total": int(lengths.sum())}
