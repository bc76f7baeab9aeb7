"""``tokenize``: compared texts -> token ids that fit, their fingerprints, and the receipt's second half."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import datasets
import numpy as np

from prefopt_cli.data import receipt
from prefopt_cli.data.boundaries import encode_rows
from prefopt_cli.data.examples import Comparison, PreferenceData, Progress
from prefopt_cli.data.fitting import Fitted, fit, longest
from prefopt_cli.data.loading import PROMPTS, closed, list_figures, require_rows, set_receipts
from prefopt_cli.data.pairing import Pairing, pairs_of
from prefopt_cli.data.receipt import Receipt, SetReceipt, SourceReceipt, Tally
from prefopt_cli.data.special_tokens import SpecialTokens, probe
from prefopt_cli.data.tables import Columns, TokenRow, as_dataset, columns_of, fingerprint, length_figures
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import DatasetSettings

BATCH = 256
"""Rows per call of the tokenizer: enough for its threads, little enough for a lively progress bar."""
OVERFLOWS_SHOWN = 5

Lists = Literal["whole"] | Pairing
"""What becomes of rows with more than two responses."""


@dataclass(frozen=True)
class TokenizedData:
    """The sets in tokens.

    Every dataset has the columns ``row_id`` (str, unique within the set), ``prompt_ids`` (list of int32),
    ``response_ids`` (a list of int32 per response, the best response first; the prompt is shared,
    responses end with their end-of-turn unless truncated) and ``ranks`` (int32, one per response: 0 is
    best, none is skipped, equal ranks tie). Rows of a pairwise set have two responses, chosen and
    rejected, of ranks 0 and 1.

    ``prompts``, where they were asked for, has ``row_id`` and ``prompt_ids``: all that the policy sees
    before it writes. ``fingerprints`` are sha256 digests of each set's tokens and ranks in order; row ids
    do not enter, so moved or renamed data keeps its fingerprint. ``stop_ids`` are the token ids that end
    a response: the end-of-turn of the data's chats, then eos.
    """

    train: datasets.Dataset
    eval: dict[str, datasets.Dataset]
    receipt: Receipt
    fingerprints: dict[str, str]
    stop_ids: tuple[int, ...]
    prompts: datasets.Dataset | None = None


def tokenize(
    data: PreferenceData,
    tokenizer: Any,
    settings: DatasetSettings,
    progress: Progress | None = None,
    *,
    lists: Lists = "whole",
) -> TokenizedData:
    """Tokenise every set of ``data``, apply ``max_length`` and complete the receipt.

    Args:
        lists: ``whole`` leaves lists of responses as they are, ``all_pairs`` and ``adjacent_pairs`` make
            pairs of them (see ``pairing``). Rows are counted in the receipt before that.

    Raises:
        UserError: the tokenizer has no eos token or lacks a chat template that the data needs, a row is
            too long under ``on_overflow: error``, or nothing is left of a set.
    """
    sets = data.sets if data.prompts is None else {**data.sets, PROMPTS: data.prompts}
    special = probe(tokenizer, (row for listed in sets.values() for row in listed))
    found: dict[str, _TokenSet] = {}
    for name, listed in sets.items():
        before = data.receipt.sets[name].sources
        found[name] = _token_set(name, listed, before, tokenizer, special, settings, progress)
        require_rows(name, found[name].rows, found[name].sources, settings)

    rows = {name: one.rows for name, one in found.items()}
    asked = rows[PROMPTS] if data.prompts is not None else None
    counted = set_receipts(rows, {name: one.sources for name, one in found.items()}, asked)
    columns: dict[str, Columns] = {}
    for name, one in found.items():
        columns[name], counted[name] = _arranged(one.tokens, counted[name], lists)
    record = replace(data.receipt, sets=counted, special_tokens=special.to_dict())
    record.check()
    tables = {name: as_dataset(one) for name, one in columns.items()}
    prompts = tables.pop(PROMPTS) if asked is not None else None
    fingerprints = {name: fingerprint(one) for name, one in columns.items()}
    return TokenizedData(tables.pop("train"), tables, record, fingerprints, special.stop_ids, prompts)


@dataclass(frozen=True)
class _TokenSet:
    rows: list[Comparison]
    tokens: list[TokenRow]
    sources: list[SourceReceipt]


def _token_set(
    name: str,
    listed: Sequence[Comparison],
    before: Sequence[SourceReceipt],
    tokenizer: Any,
    special: SpecialTokens,
    settings: DatasetSettings,
    progress: Progress | None,
) -> _TokenSet:
    """The rows of a set that fit, as text and in tokens, and the receipts of its sources."""
    tallies = {record.source: Tally(record) for record in before}
    fitting = _encode_set(name, listed, tokenizer, special, settings, tallies, progress)
    rows = [replace(row, notes=fitting[row.row_id].notes) for row in listed if row.row_id in fitting]
    tokens = [replace(fitting[row.row_id].tokens, row_id=row.occurrence_id) for row in rows]
    sources = [
        closed(tallies[one.source], one.source, one.format, (row for row in rows if row.source == one.source))
        for one in before
    ]
    return _TokenSet(rows, tokens, sources)


@dataclass(frozen=True, slots=True)
class _Fitting:
    tokens: TokenRow
    notes: tuple[str, ...]


def _encode_set(
    name: str,
    listed: Sequence[Comparison],
    tokenizer: Any,
    special: SpecialTokens,
    settings: DatasetSettings,
    tallies: Mapping[str, Tally],
    progress: Progress | None,
) -> dict[str, _Fitting]:
    """By row id every row that fits; repeats share the tokens of their row. The others are counted."""
    rows = [row for row in listed if row.repeat == 1]
    fitting: dict[str, _Fitting] = {}
    overflows: list[str] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        for row, encoded in zip(batch, encode_rows(batch, tokenizer, special), strict=True):
            fitted = fit(encoded, row.ranks, settings)
            if isinstance(fitted, str):
                tallies[row.source].drop(fitted, row.row_id)
                if encoded and fitted in (receipt.PROMPT_TOO_LONG, receipt.TOO_LONG):
                    overflows.append(f"{row.row_id} ({longest(encoded)} tokens)")
                continue
            fitting[row.row_id] = _compact(row, fitted)
        if progress:
            progress(f"tokenising {name}", min(start + BATCH, len(rows)), len(rows))
    if overflows and settings.on_overflow == "error":
        shown = "".join(f"\n  {row}" for row in overflows[:OVERFLOWS_SHOWN])
        raise UserError(
            f"{name}: {len(overflows)} of {len(rows)} rows are longer than max_length {settings.max_length}, "
            f"and on_overflow is error{shown}\n"
            "  raise max_length, or choose on_overflow: drop or truncate_response"
        )
    return fitting


def _compact(row: Comparison, fitted: Fitted) -> _Fitting:
    """Arrays instead of lists at once: a set of Python ints would not fit where its arrays do."""
    prompt, *responses = (np.asarray(ids, dtype=np.int32) for ids in (fitted.prompt, *fitted.responses))
    turns = [receipt.SPANS_TURNS] if row.spans_turns else []
    notes = tuple(dict.fromkeys([*row.notes, *turns, *fitted.notes]))
    return _Fitting(TokenRow(row.row_id, prompt, tuple(responses), fitted.ranks), notes)


def _arranged(rows: list[TokenRow], record: SetReceipt, lists: Lists) -> tuple[Columns, SetReceipt]:
    """The set as it is trained on, and its receipt with counts and lengths in tokens."""
    figures = list_figures([len(row.ranks) for row in rows])
    if "list_sizes" in figures and lists != "whole":
        rows = pairs_of(rows, lists)
        figures |= {"pairs": len(rows), "pairing": lists}
    columns = columns_of(rows)
    # Overlong responses are gone from lists by now, so what was counted in texts no longer holds.
    record = replace(record, responses=None, list_sizes=None)
    return columns, replace(record, **figures, **length_figures(columns))
