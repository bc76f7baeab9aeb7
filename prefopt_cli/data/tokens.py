"""``tokenize``: text pairs -> token ids that fit, their fingerprints, and the second half of the receipt."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from prefopt_cli.data import receipt
from prefopt_cli.data.boundaries import Encoded, encode_pairs
from prefopt_cli.data.examples import Pair, PreferenceData, Progress
from prefopt_cli.data.loading import require_pairs, set_receipts
from prefopt_cli.data.receipt import Receipt, SetReceipt, SourceReceipt, Tally
from prefopt_cli.data.special_tokens import SpecialTokens, probe
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import DatasetSettings

BATCH = 256
"""Pairs per call of the tokenizer: enough for its threads, little enough for a lively progress bar."""
COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
OVERFLOWS_SHOWN = 5


@dataclass(frozen=True)
class TokenizedData:
    """The sets in tokens.

    Every dataset has the columns ``pair_id`` (str, unique within the set), ``prompt_ids``,
    ``chosen_ids`` and ``rejected_ids`` (lists of int; the prompt is shared, responses end with their
    end-of-turn unless truncated). ``fingerprints`` are sha256 digests of each set's tokens in order;
    pair ids do not enter, so moved or renamed data keeps its fingerprint.
    """

    train: datasets.Dataset
    eval: dict[str, datasets.Dataset]
    receipt: Receipt
    fingerprints: dict[str, str]


_Ids = tuple[np.ndarray, np.ndarray, np.ndarray]


def tokenize(
    data: PreferenceData, tokenizer: Any, settings: DatasetSettings, progress: Progress | None = None
) -> TokenizedData:
    """Tokenise every set of ``data``, apply ``max_length`` and complete the receipt.

    Raises:
        UserError: the tokenizer has no eos token or lacks a chat template that the data needs, a row is
            too long under ``on_overflow: error``, or nothing is left of a set.
    """
    special = probe(tokenizer, (pair for pairs in data.sets.values() for pair in pairs))
    pairs: dict[str, list[Pair]] = {}
    ids: dict[str, dict[str, _Ids]] = {}
    records: dict[str, list[SourceReceipt]] = {}
    for name, listed in data.sets.items():
        tallies = {record.source: Tally(record) for record in data.receipt.sets[name].sources}
        ids[name] = _encode_set(name, listed, tokenizer, special, settings, tallies, progress)
        pairs[name] = [pair for pair in listed if pair.row_id in ids[name]]
        records[name] = _closed(data.receipt.sets[name].sources, tallies, pairs[name])
        require_pairs(name, pairs[name], records[name], settings)

    columns = {name: _columns(pairs[name], ids[name]) for name in pairs}
    tables = {name: _dataset(pairs[name], columns[name]) for name in pairs}
    sets = {
        name: _with_lengths(record, columns[name]) for name, record in set_receipts(pairs, records).items()
    }
    record = replace(data.receipt, sets=sets, special_tokens=special.to_dict())
    record.check()
    fingerprints = {name: _fingerprint(columns[name]) for name in pairs}
    return TokenizedData(tables.pop("train"), tables, record, fingerprints)


def _encode_set(
    name: str,
    pairs: Sequence[Pair],
    tokenizer: Any,
    special: SpecialTokens,
    settings: DatasetSettings,
    tallies: Mapping[str, Tally],
    progress: Progress | None,
) -> dict[str, _Ids]:
    """Ids by row id of every row that fits; repeats share those of their row."""
    rows = [pair for pair in pairs if pair.repeat == 1]
    fitting: dict[str, _Ids] = {}
    overflows: list[str] = []
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        for pair, encoded in zip(batch, encode_pairs(batch, tokenizer, special), strict=True):
            fitted = _fit(encoded, settings)
            if isinstance(fitted, str):
                tallies[pair.source].drop(fitted, pair.row_id)
                if encoded and fitted in (receipt.PROMPT_TOO_LONG, receipt.TOO_LONG):
                    overflows.append(f"{pair.row_id} ({_length(encoded)} tokens)")
                continue
            if pair.spans_turns:
                tallies[pair.source].change(receipt.SPANS_TURNS, pair.row_id)
            for note in fitted.notes:
                tallies[pair.source].change(note, pair.row_id)
            prompt, chosen, rejected = (
                np.asarray(side, dtype=np.int32) for side in (fitted.prompt, fitted.chosen, fitted.rejected)
            )
            fitting[pair.row_id] = prompt, chosen, rejected
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


def _fit(encoded: Encoded | None, settings: DatasetSettings) -> Encoded | str:
    """The pair within ``max_length`` tokens, or the reason why it is dropped."""
    if encoded is None:
        return receipt.REFUSED
    if not encoded.prompt:
        return receipt.EMPTY_PROMPT
    limit = settings.max_length
    if limit is not None and len(encoded.prompt) >= limit:
        return receipt.PROMPT_TOO_LONG
    if limit is not None and _length(encoded) > limit:
        if settings.on_overflow != "truncate_response":
            return receipt.TOO_LONG
        room = limit - len(encoded.prompt)
        notes = (*encoded.notes, receipt.TRUNCATED)
        encoded = Encoded(encoded.prompt, encoded.chosen[:room], encoded.rejected[:room], notes)
    # Different texts can become the same tokens, by truncation or by what the tokenizer normalises away.
    return receipt.IDENTICAL_TOKENS if encoded.chosen == encoded.rejected else encoded


def _length(encoded: Encoded) -> int:
    return len(encoded.prompt) + max(len(encoded.chosen), len(encoded.rejected))


def _closed(
    before: Sequence[SourceReceipt], tallies: Mapping[str, Tally], pairs: Sequence[Pair]
) -> list[SourceReceipt]:
    rows: dict[str, int] = dict.fromkeys(tallies, 0)
    kept = dict(rows)
    for pair in pairs:
        rows[pair.source] += 1
        kept[pair.source] += pair.repeat == 1
    return [
        tallies[record.source].receipt(record.source, record.format, kept[record.source], rows[record.source])
        for record in before
    ]


def _columns(pairs: Sequence[Pair], ids: Mapping[str, _Ids]) -> dict[str, list[np.ndarray]]:
    return {column: [ids[pair.row_id][side] for pair in pairs] for side, column in enumerate(COLUMNS)}


def _dataset(pairs: Sequence[Pair], columns: Mapping[str, list[np.ndarray]]) -> datasets.Dataset:
    """An in-memory table of flat arrays: lists of Python ints would take ten times the memory."""
    lists = {
        name: pa.LargeListArray.from_arrays([0, *accumulate(map(len, rows))], np.concatenate(rows))
        for name, rows in columns.items()
    }
    table = pa.table({"pair_id": [pair.pair_id for pair in pairs], **lists})
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def _fingerprint(columns: Mapping[str, list[np.ndarray]]) -> str:
    digest = hashlib.sha256()
    for rows in columns.values():
        # Lengths first: the same tokens cut at other places are other data.
        digest.update(np.fromiter(map(len, rows), dtype="<i8", count=len(rows)).tobytes())
        for row in rows:
            digest.update(row.astype("<i4", copy=False).tobytes())
    return digest.hexdigest()


def _with_lengths(record: SetReceipt, columns: Mapping[str, list[np.ndarray]]) -> SetReceipt:
    """Adds length percentiles in tokens, and how often the chosen response is the longer one."""
    counts = {
        name.removesuffix("_ids"): np.array([len(row) for row in rows]) for name, rows in columns.items()
    }
    return replace(
        record,
        lengths={name: _summary(lengths) for name, lengths in counts.items()},
        chosen_longer=float(np.mean(counts["chosen"] > counts["rejected"])),
        same_length=float(np.mean(counts["chosen"] == counts["rejected"])),
    )


def _summary(lengths: np.ndarray) -> dict[str, int]:
    points = {f"p{q}": int(np.percentile(lengths, q, method="nearest")) for q in (5, 50, 95)}
    return {**points, "max": int(lengths.max()), "total": int(lengths.sum())}
