"""The rows of one set in tokens that fit, and why the others do not: what tokenising costs, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from prefopt_cli.data import receipt
from prefopt_cli.data.boundaries import Encoded, encode_rows
from prefopt_cli.data.degrading import Degrading
from prefopt_cli.data.examples import Comparison, Progress
from prefopt_cli.data.fitting import Fitted, degrees, fit, longest
from prefopt_cli.data.special_tokens import SpecialTokens
from prefopt_cli.data.tables import TokenRow
from prefopt_cli.recipe.schema import DatasetSettings

BATCH = 256
"""Rows per call of the tokenizer: enough for its threads, little enough for a lively progress bar."""


@dataclass(frozen=True)
class Encoding:
    """All that decides what a row's tokens are."""

    tokenizer: Any
    special: SpecialTokens
    settings: DatasetSettings
    degrading: Degrading | None = None


class Fitting(NamedTuple):
    """A row that fits, and what the receipt has to say about it."""

    tokens: TokenRow
    notes: tuple[str, ...]


class Dropped(NamedTuple):
    """A row that does not."""

    row_id: str
    reason: str
    tokens: int
    """Of its prompt and its longest response; 0 where it has none."""


@dataclass(frozen=True)
class EncodedSet:
    """What became of a set's rows."""

    fitting: dict[str, Fitting]
    """By row id."""
    dropped: list[Dropped]


def encode_set(
    name: str, rows: Sequence[Comparison], encoding: Encoding, progress: Progress | None
) -> EncodedSet:
    """Tokenise rows, none of them twice."""
    fitting: dict[str, Fitting] = {}
    dropped: list[Dropped] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        found = encode_rows(batch, encoding.tokenizer, encoding.special, encoding.degrading)
        for row, encoded in zip(batch, found, strict=True):
            fitted = fit(encoded, row.ranks, encoding.settings)
            if encoded is None or isinstance(fitted, str):
                reason = fitted if isinstance(fitted, str) else receipt.REFUSED
                dropped.append(Dropped(row.row_id, reason, longest(encoded) if encoded else 0))
            else:
                fitting[row.row_id] = _compact(row, encoded, fitted, encoding.degrading)
        if progress:
            progress(f"tokenising {name}", min(start + BATCH, len(rows)), len(rows))
    return EncodedSet(fitting, dropped)


def _compact(row: Comparison, encoded: Encoded, fitted: Fitted, degrading: Degrading | None) -> Fitting:
    """Arrays instead of lists at once: a set of Python ints would not fit where its arrays do."""
    prompt, *responses = (np.asarray(ids, dtype=np.int32) for ids in (fitted.prompt, *fitted.responses))
    levels = degrees(encoded, fitted) if degrading else ()
    turns = [receipt.SPANS_TURNS] if row.spans_turns else []
    notes = [*row.notes, *turns, *fitted.notes]
    versions = tuple(
        tuple((level, np.asarray(ids, dtype=np.int32)) for level, ids in each) for each in levels
    )
    row_tokens = TokenRow(row.row_id, prompt, tuple(responses), fitted.ranks, versions)
    return Fitting(row_tokens, tuple(dict.fromkeys(notes)))
