"""``tokenize``: compared texts -> token ids that fit, their fingerprints, and the receipt's second half."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import datasets

from prefopt_cli.data import receipt
from prefopt_cli.data.degrading import Degrading, require_degrees
from prefopt_cli.data.encoding import EncodedSet, Encoding, Fitting
from prefopt_cli.data.examples import Comparison, PreferenceData, Progress
from prefopt_cli.data.loading import PROMPTS, closed, list_figures, require_rows, set_receipts
from prefopt_cli.data.pairing import Pairing, pairs_of
from prefopt_cli.data.receipt import Receipt, SetReceipt, SourceReceipt, Tally
from prefopt_cli.data.special_tokens import probe
from prefopt_cli.data.tables import Columns, TokenRow, as_dataset, columns_of, fingerprint, length_figures
from prefopt_cli.data.token_cache import TokenCache
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import DatasetSettings

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
    rejected, of ranks 0 and 1. Where degraded responses were asked for there are also ``degraded_ids`` (for each
    response the list of its degraded versions, the mildest first) and ``degraded_levels`` (int32, one per version; 0
    would be the response itself). A response without any takes no part.

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
    degrading: Degrading | None = None,
    report: Callable[[str], None] | None = None,
) -> TokenizedData:
    """Tokenise every set of ``data``, apply ``max_length`` and complete the receipt.

    Args:
        lists: ``whole`` leaves lists of responses as they are, ``all_pairs`` and ``adjacent_pairs`` make
            pairs of them (see ``pairing``). Rows are counted in the receipt before that.
        degrading: how responses are degraded; None leaves that out.
        report: told where something is wrong with the cache of tokenised data; None: standard error.

    Raises:
        UserError: the tokenizer has no eos token or lacks a chat template that the data needs, a row is
            too long under ``on_overflow: error``, nothing is left of a set, or nothing of train can be degraded.
    """
    sets = data.sets if data.prompts is None else {**data.sets, PROMPTS: data.prompts}
    special = probe(tokenizer, (row for listed in sets.values() for row in listed))
    cache = TokenCache(tokenizer, report) if report else TokenCache(tokenizer)
    found: dict[str, _TokenSet] = {}
    for name, listed in sets.items():
        before = data.receipt.sets[name].sources
        encoding = Encoding(tokenizer, special, settings, None if name == PROMPTS else degrading)
        found[name] = _token_set(name, listed, before, encoding, cache, lists, progress)
        require_rows(name, found[name].rows, found[name].sources, settings)

    rows = {name: one.rows for name, one in found.items()}
    asked = rows[PROMPTS] if data.prompts is not None else None
    counted = set_receipts(rows, {name: one.sources for name, one in found.items()}, asked)
    columns: dict[str, Columns] = {}
    for name, one in found.items():
        asked_of = None if name == PROMPTS else degrading
        columns[name], counted[name] = _arranged(one.tokens, counted[name], lists, asked_of)
    if degrading:
        require_degrees(counted["train"], degrading)
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
    encoding: Encoding,
    cache: TokenCache,
    lists: Lists,
    progress: Progress | None,
) -> _TokenSet:
    """The rows of a set that fit, as text and in tokens, and the receipts of its sources."""
    once = {row.row_id: row for row in listed if row.repeat == 1}
    encoded = cache.encoded(name, list(once.values()), encoding, progress)
    _require_no_overflow(name, encoded, len(once), encoding.settings)
    tallies = {record.source: Tally(record) for record in before}
    for row_id, reason, _ in encoded.dropped:
        tallies[once[row_id].source].drop(reason, row_id)
    fitting = encoded.fitting
    notes = {row_id: _notes(each, lists, encoding.degrading) for row_id, each in fitting.items()}
    rows = [replace(row, notes=notes[row.row_id]) for row in listed if row.row_id in fitting]
    tokens = [replace(fitting[row.row_id].tokens, row_id=row.occurrence_id) for row in rows]
    sources = [
        closed(tallies[one.source], one.source, one.format, (row for row in rows if row.source == one.source))
        for one in before
    ]
    return _TokenSet(rows, tokens, sources)


def _notes(fitting: Fitting, lists: Lists, degrading: Degrading | None) -> tuple[str, ...]:
    """What the receipt has to say about a row: which responses are to have degrees is known of its pairs only."""
    if degrading is None:
        return fitting.notes
    compared = [fitting.tokens] if lists == "whole" else pairs_of([fitting.tokens], lists)
    return (*fitting.notes, receipt.NO_DEGREES) if degrading.misses(compared) else fitting.notes


def _require_no_overflow(name: str, encoded: EncodedSet, rows: int, settings: DatasetSettings) -> None:
    """Raise UserError where a row is too long and the recipe wants none to be."""
    reasons = (receipt.PROMPT_TOO_LONG, receipt.TOO_LONG)
    overflows = [row for row in encoded.dropped if row.reason in reasons]
    if not overflows or settings.on_overflow != "error":
        return
    shown = "".join(f"\n  {row.row_id} ({row.tokens} tokens)" for row in overflows[:OVERFLOWS_SHOWN])
    raise UserError(
        f"{name}: {len(overflows)} of {rows} rows are longer than max_length {settings.max_length}, "
        f"and on_overflow is error{shown}\n"
        "  raise max_length, or choose on_overflow: drop or truncate_response"
    )


def _arranged(
    rows: list[TokenRow], record: SetReceipt, lists: Lists, degrading: Degrading | None
) -> tuple[Columns, SetReceipt]:
    """The set as it is trained on, and its receipt with counts and lengths in tokens."""
    figures = list_figures([len(row.ranks) for row in rows])
    if "list_sizes" in figures and lists != "whole":
        rows = pairs_of(rows, lists)
        figures |= {"pairs": len(rows), "pairing": lists}
    if degrading:
        rows = [degrading.applied(row) for row in rows]
        figures |= degrading.figures(rows)
    columns = columns_of(rows)
    # Overlong responses are gone from lists by now, so what was counted in texts no longer holds.
    record = replace(record, responses=None, list_sizes=None)
    return columns, replace(record, **figures, **length_figures(columns))
