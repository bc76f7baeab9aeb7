"""One source's rows as usable pairs: filter, recognise the format, and leave out what teaches nothing."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets

from prefopt_cli.data import receipt
from prefopt_cli.data.examples import Pair, Progress, plain_text, text_key
from prefopt_cli.data.formats import FORMATS, Row, Unfit, detect, unfit_message
from prefopt_cli.data.receipt import Tally
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import Source

SAMPLE = 100
"""Rows that the format is detected from."""
BATCH = 1000
VALUES_SHOWN = 10


@dataclass
class SourceRows:
    """What one source gives: its usable pairs in the file's order, and the count of the others."""

    label: str
    format: str
    pairs: list[Pair]
    tally: Tally = field(default_factory=Tally)


def read_pairs(
    dataset: datasets.Dataset, source: Source, label: str, seen: set[bytes], progress: Progress | None = None
) -> SourceRows:
    """The pairs of ``dataset`` that survive ``where`` and are neither malformed, empty, identical nor known.

    Args:
        seen: keys of the pairs that earlier sources of the same set put into it.

    Raises:
        UserError: a column of ``where`` or ``columns`` does not exist, nothing passes ``where``, an id
            is not unique, or no row fits the format.
    """
    _check_columns(dataset, source, label)
    tally = Tally()
    tally.read = len(dataset)
    ids = _row_ids(dataset, source, label)
    kept = _matching(dataset, source, label)
    for number in sorted(set(range(len(dataset))) - set(kept)):
        tally.drop(receipt.FILTERED, ids[number])
    matching = dataset if len(kept) == len(dataset) else dataset.select(kept)

    sample = list(_rows(matching.select(range(min(SAMPLE, len(matching)))), source))
    format = detect(sample, label) if source.format == "auto" else source.format
    found = SourceRows(label, format, [], tally)
    known = set(seen)
    for done, (number, row) in enumerate(zip(kept, _rows(matching, source), strict=True), start=1):
        _take(row, ids[number], found, known)
        if progress and (done % BATCH == 0 or done == len(kept)):
            progress(f"reading {label}", done, len(kept))
    _refuse_if_all_unfit(found, sample, len(kept))
    return found


def _take(row: Row, row_id: str, found: SourceRows, known: set[bytes]) -> None:
    """Add the row's pair to ``found``, or count why not."""
    try:
        prompt, chosen, rejected = FORMATS[found.format].read(row)
    except Unfit as reason:
        found.tally.drop(str(reason), row_id)
        return
    if chosen == rejected:
        found.tally.drop(receipt.IDENTICAL, row_id)
    elif not plain_text(chosen).strip() or not plain_text(rejected).strip():
        found.tally.drop(receipt.EMPTY_SIDE, row_id)
    elif (key := text_key(prompt, chosen, rejected)) in known:
        found.tally.drop(receipt.DUPLICATE, row_id)
    else:
        known.add(key)
        found.pairs.append(Pair(row_id, found.label, prompt, chosen, rejected))


def _refuse_if_all_unfit(found: SourceRows, sample: Sequence[Row], rows: int) -> None:
    unfit = {
        reason: count
        for reason, count in found.tally.dropped.items()
        if reason.startswith((receipt.MALFORMED, receipt.NO_SHARED_PROMPT))
    }
    if sum(unfit.values()) == rows:
        commonest = max(unfit, key=lambda reason: unfit[reason])
        raise UserError(unfit_message(sample, found.label, found.format, commonest))


def _rows(dataset: datasets.Dataset, source: Source) -> Iterator[dict[str, Any]]:
    """Rows with the source's own column names and, beside them, the roles given by ``columns``."""
    for batch in dataset.iter(BATCH):
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            yield {**row, **{role: row[column] for role, column in source.columns.items()}}


def _check_columns(dataset: datasets.Dataset, source: Source, label: str) -> None:
    asked = [("columns", column) for column in source.columns.values()] + [
        ("where", name) for name in source.where
    ]
    for setting, column in asked:
        if column not in dataset.column_names:
            near = difflib.get_close_matches(column, dataset.column_names, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            found = ", ".join(dataset.column_names)
            raise UserError(
                f"{label}: `{setting}` names the column {column!r}{hint}\n  columns found: {found}"
            )


def _row_ids(dataset: datasets.Dataset, source: Source, label: str) -> list[str]:
    """Ids by row number, or by the column that ``columns: {id: ...}`` names."""
    if "id" not in source.columns:
        return [f"{label}:{number}" for number in range(len(dataset))]
    values = dataset[source.columns["id"]][:]
    value, count = Counter(map(str, values)).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{label}: column {source.columns['id']!r} is given as id, but {value!r} occurs {count} times\n"
            "  leave `id` out of `columns` to number the rows"
        )
    return [f"{label}:{value}" for value in values]


def _matching(dataset: datasets.Dataset, source: Source, label: str) -> list[int]:
    """Numbers of the rows that have all the values asked for."""
    if not source.where:
        return list(range(len(dataset)))
    columns = dataset.select_columns(list(source.where))
    numbers = [number for number, row in enumerate(_rows_as_they_are(columns)) if _matches(row, source.where)]
    if not numbers:
        raise UserError(f"{label} is empty after filtering\n" + "\n".join(_values(columns, source.where)))
    return numbers


def _rows_as_they_are(dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
    for batch in dataset.iter(BATCH):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _matches(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    return all(any(_same(row[name], one) for one in _as_list(wanted)) for name, wanted in where.items())


def _same(value: Any, wanted: Any) -> bool:
    """Equal, or, as every cell of a CSV file is text, written alike."""
    if isinstance(value, str) and wanted is not None and not isinstance(wanted, str):
        return value.strip().lower() == str(wanted).lower()
    return value == wanted


def _as_list(wanted: Any) -> list[Any]:
    return wanted if isinstance(wanted, list) else [wanted]


def _values(dataset: datasets.Dataset, where: Mapping[str, Any]) -> Iterator[str]:
    """For each filtered column what was wanted and what is there, the commonest first."""
    for name, wanted in where.items():
        counts = Counter(str(value) for value in dataset[name][:])
        there = ", ".join(f"{value} ({count})" for value, count in counts.most_common(VALUES_SHOWN))
        more = f", and {len(counts) - VALUES_SHOWN} more" if len(counts) > VALUES_SHOWN else ""
        yield f"  where {name} is {' or '.join(map(str, _as_list(wanted)))}: the column has {there}{more}"
