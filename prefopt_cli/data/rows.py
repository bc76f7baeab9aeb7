"""One source's rows as usable comparisons: filter, recognise the format, and leave out what teaches nothing."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets

from prefopt_cli.data import receipt
from prefopt_cli.data.examples import Comparison, Example, Progress, Text, plain_text
from prefopt_cli.data.fields import Row, Unfit
from prefopt_cli.data.formats import FORMATS, PROMPT, PROMPT_FORMATS, Format, detect, unfit_message
from prefopt_cli.data.formats_lists import scores_contradict_ranking
from prefopt_cli.data.lists import first_of_each, nothing_to_compare, subset
from prefopt_cli.data.receipt import Tally
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import Source

SAMPLE = 100
"""Rows that the format is detected from."""
BATCH = 1000
VALUES_SHOWN = 10


@dataclass
class SourceRows:
    """What one source gives: its usable rows in the file's order, and the count of the others."""

    label: str
    format: str
    comparisons: list[Comparison]
    tally: Tally = field(default_factory=Tally)


def read_rows(
    dataset: datasets.Dataset,
    source: Source,
    label: str,
    seen: set[bytes],
    progress: Progress | None = None,
    *,
    prompts_only: bool = False,
) -> SourceRows:
    """The rows of ``dataset`` that survive ``where`` and are neither malformed, useless nor known.

    Args:
        seen: keys of the comparisons that earlier sources of the same set put into it.
        prompts_only: read prompts to sample for; responses need not be there, nor be comparable.

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
    formats, use = (PROMPT_FORMATS, _prompt_alone) if prompts_only else (FORMATS, _comparable)
    given = source.format if source.format in formats else PROMPT
    format = detect(sample, label, formats) if source.format == "auto" else given
    if source.format == "auto" and format == "ranked" and _is_order(matching, source):
        format = "scored"
    found = SourceRows(label, format, [], tally)
    known = set(seen)
    for done, (number, row) in enumerate(zip(kept, _rows(matching, source), strict=True), start=1):
        _take(row, ids[number], found, known, formats[format], use)
        if progress and (done % BATCH == 0 or done == len(kept)):
            progress(f"reading {label}", done, len(kept))
    if reason := _all_unfit(found, len(kept)):
        raise UserError(unfit_message(sample, label, format, reason, formats))
    return found


def _is_order(dataset: datasets.Dataset, source: Source) -> bool:
    """Whether the rows' ``ranking`` are numbers of responses in order, and not ranks, as the scores beside it say."""
    names = {role: source.columns.get(role, role) for role in ("prompt", "responses", "ranking", "scores")}
    if not set(names.values()) <= set(dataset.column_names):
        return False
    columns = dataset.select_columns(list(dict.fromkeys(names.values())))
    return any(
        scores_contradict_ranking(row) for row in _rows(columns, source.model_copy(update={"columns": names}))
    )


def _take(
    row: Row,
    row_id: str,
    found: SourceRows,
    known: set[bytes],
    format: Format,
    use: Callable[[Example, Format], tuple[Example, list[str]]],
) -> None:
    """Add what the row says to ``found``, or count why not."""
    try:
        example, notes = use(format.read(row), format)
    except Unfit as reason:
        found.tally.drop(str(reason), row_id)
        return
    comparison = Comparison(row_id, found.label, *example, notes=tuple(notes))
    if (key := comparison.key) in known:
        found.tally.drop(receipt.DUPLICATE, row_id)
    else:
        known.add(key)
        found.comparisons.append(comparison)


def _comparable(example: Example, format: Format) -> tuple[Example, list[str]]:
    """What of a row teaches something, and what was left out to get there. Raises Unfit if nothing does."""
    prompt, responses, ranks = example
    filled = [number for number, one in enumerate(responses) if not _is_empty(one)]
    if not format.lists:
        if responses[0] == responses[1]:
            raise Unfit(receipt.IDENTICAL)
        if len(filled) < len(responses):
            raise Unfit(receipt.EMPTY_SIDE)
        return example, []
    notes = [receipt.EMPTY_LEFT_OUT] if len(filled) < len(responses) else []
    responses, ranks = subset(responses, ranks, filled)
    distinct = first_of_each(responses)
    notes += [receipt.REPEATED_LEFT_OUT] if len(distinct) < len(responses) else []
    responses, ranks = subset(responses, ranks, distinct)
    if reason := nothing_to_compare(ranks):
        raise Unfit(reason)
    return Example(prompt, responses, ranks), notes


def _prompt_alone(example: Example, _: Format) -> tuple[Example, list[str]]:
    """The row's prompt without its responses. Raises Unfit where there is nothing to answer."""
    if example.responses and example.responses[0] == example.responses[1]:
        raise Unfit(receipt.IDENTICAL)  # the prompt is what both share, and here that is everything
    if _is_empty(example.prompt):
        raise Unfit(receipt.EMPTY_PROMPT)
    if not isinstance(example.prompt, str) and example.prompt[-1]["role"] == "assistant":
        raise Unfit(f"{receipt.MALFORMED}: prompt ends with an assistant message")
    return Example(example.prompt, (), ()), []


def _is_empty(text: Text) -> bool:
    return not plain_text(text).strip()


def _all_unfit(found: SourceRows, rows: int) -> str | None:
    """The commonest reason, if every one of ``rows`` was malformed."""
    unfit = {
        reason: count
        for reason, count in found.tally.dropped.items()
        if reason.startswith((receipt.MALFORMED, receipt.NO_SHARED_PROMPT))
    }
    return max(unfit, key=lambda reason: unfit[reason]) if sum(unfit.values()) == rows else None


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
