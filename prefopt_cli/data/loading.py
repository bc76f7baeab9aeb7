"""``load``: the recipe's ``dataset`` section -> comparisons as text and the first half of the receipt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt_cli.data import sources
from prefopt_cli.data.examples import Comparison, PreferenceData, Progress, text_key
from prefopt_cli.data.mixing import Share, limited, mixture, sampled, share
from prefopt_cli.data.receipt import Receipt, SetReceipt, SourceReceipt, Tally
from prefopt_cli.data.rows import SourceRows, read_rows
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import DatasetSettings, Source

HOLDOUT = "holdout"
"""The eval set made of held-out training prompts."""
PROMPTS = "prompts"
"""The receipt's name for the prompts to sample for."""


def load(
    settings: DatasetSettings, progress: Progress | None = None, *, prompts: Sequence[Source] | None = None
) -> PreferenceData:
    """Read, check, filter and mix all sources; nothing is tokenised yet.

    The result depends on the data, on ``settings`` and on ``prompts`` alone. Reads the network only for
    hub ids.

    Args:
        prompts: sources of prompts to sample responses for. Rows of any format will do, and rows with
            nothing but a ``prompt``; their responses are not looked at.

    Raises:
        UserError: a source cannot be read, does not fit, or leaves a set empty.
    """
    _check_names(settings, prompts)
    train, holdout = _train_sets(settings, progress)
    found = {"train": train}
    found |= {name: _eval_set(name, listed, progress) for name, listed in settings.eval.items()}
    if settings.holdout is not None:
        found[HOLDOUT] = holdout
    if prompts is not None:
        found[PROMPTS] = _prompt_set(prompts, settings, progress)
    for name, one in found.items():
        require_rows(name, one.rows, one.sources, settings)
    rows = {name: one.rows for name, one in found.items()}
    asked = rows[PROMPTS] if prompts is not None else None
    record = Receipt(
        set_receipts(rows, {name: one.sources for name, one in found.items()}, asked),
        settings.max_length,
        settings.on_overflow,
    )
    record.check()
    sets = {name: listed for name, listed in rows.items() if listed is not asked}
    return PreferenceData(sets.pop("train"), sets, record, asked)


@dataclass(frozen=True)
class _Set:
    rows: list[Comparison]
    sources: list[SourceReceipt]


def _train_sets(settings: DatasetSettings, progress: Progress | None) -> tuple[_Set, _Set]:
    """The training mixture and what ``holdout`` sets aside from it."""
    read: list[SourceRows] = []
    shares: list[Share] = []
    seen: set[bytes] = set()
    for position, source in enumerate(settings.train):
        rows = _read(settings.train, position, seen, progress)
        part = share(rows, source, position, settings)
        seen |= {row.key for row in (*part.train, *part.holdout)}
        read.append(rows)
        shares.append(part)
    train = [
        closed(rows.tally, rows.label, rows.format, (*part.train, *part.repeats))
        for rows, part in zip(read, shares, strict=True)
    ]
    aside = [
        closed(_moved(len(part.holdout)), rows.label, rows.format, part.holdout)
        for rows, part in zip(read, shares, strict=True)
    ]
    held_out = [row for part in shares for row in part.holdout]
    return _Set(mixture(shares, settings), train), _Set(held_out, aside)


def _moved(rows: int) -> Tally:
    tally = Tally()
    tally.read = rows
    return tally


def _eval_set(name: str, listed: Sequence[Source], progress: Progress | None) -> _Set:
    """An eval set in its files' own order: every run sees the same rows at the same place."""

    def take(rows: SourceRows, position: int) -> list[int]:
        return limited(range(len(rows.comparisons)), rows, listed[position])

    return _unweighted_set(f"eval set {name}", listed, take, progress)


def _prompt_set(listed: Sequence[Source], settings: DatasetSettings, progress: Progress | None) -> _Set:
    """Prompts to sample for, one source after the other; ``limit`` takes a sample as in training."""

    def take(rows: SourceRows, position: int) -> list[int]:
        return sampled(rows, listed[position], position, settings, PROMPTS)

    return _unweighted_set(PROMPTS, listed, take, progress, prompts_only=True)


def _unweighted_set(
    title: str,
    listed: Sequence[Source],
    take: Callable[[SourceRows, int], list[int]],
    progress: Progress | None,
    *,
    prompts_only: bool = False,
) -> _Set:
    """The rows that ``take`` chooses of every source, given its place in ``listed``."""
    found: list[Comparison] = []
    receipts: list[SourceReceipt] = []
    for position, source in enumerate(listed):
        if source.weight != 1.0:
            raise UserError(f"{title}: {source.source} has a weight; only training sources are weighted")
        seen = {row.key for row in found}
        rows = _read(listed, position, seen, progress, prompts_only=prompts_only)
        kept = [rows.comparisons[number] for number in take(rows, position)]
        found += kept
        receipts.append(closed(rows.tally, rows.label, rows.format, kept))
    return _Set(found, receipts)


def closed(tally: Tally, source: str, format: str, rows: Iterable[Comparison]) -> SourceReceipt:
    """The receipt of a source of which ``rows``, repeats among them, stay in the set."""
    kept = occurrences = 0
    for row in rows:
        occurrences += 1
        if row.repeat == 1:
            kept += 1
            for note in row.notes:
                tally.change(note, row.row_id)
    return tally.receipt(source, format, kept, occurrences)


def _read(
    listed: Sequence[Source],
    position: int,
    seen: set[bytes],
    progress: Progress | None,
    *,
    prompts_only: bool = False,
) -> SourceRows:
    """One source of a set. Row ids are made of its label, so labels that occur again get a number."""
    source = listed[position]
    label = sources.label(source)
    if before := sum(sources.label(other) == label for other in listed[:position]):
        label = f"{label}~{before + 1}"
    dataset = sources.open_source(source, progress)
    return read_rows(dataset, source, label, seen, progress, prompts_only=prompts_only)


def _check_names(settings: DatasetSettings, prompts: Sequence[Source] | None) -> None:
    if "train" in settings.eval:
        raise UserError("an eval set cannot be named train")
    if HOLDOUT in settings.eval and settings.holdout is not None:
        raise UserError(f"the eval set {HOLDOUT} is made by `holdout`; give the other one another name")
    if PROMPTS in settings.eval and prompts is not None:
        raise UserError(f"the eval set {PROMPTS} stands beside prompts to sample for; give it another name")


def require_rows(
    name: str, rows: Sequence[object], records: Sequence[SourceReceipt], settings: DatasetSettings
) -> None:
    """Raise UserError, with the reasons in numbers, if nothing is left of a set."""
    if rows:
        return
    if name == HOLDOUT and not sum(record.read for record in records):
        raise UserError(
            f"holdout: {settings.holdout} sets aside none of the training prompts; raise it or add data"
        )
    dropped = SetReceipt(list(records), 0, 0).dropped()
    reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
    raise UserError(f"the set {name} has no usable rows left ({reasons})")


def set_receipts(
    rows: Mapping[str, Sequence[Comparison]],
    records: Mapping[str, list[SourceReceipt]],
    asked: Sequence[Comparison] | None = None,
) -> dict[str, SetReceipt]:
    """Row, prompt and response counts of every set; for eval sets also the prompts that train has too.

    ``asked`` is the one among ``rows`` that holds prompts to sample for, if one does.
    """
    prompts = {name: {text_key(row.prompt) for row in listed} for name, listed in rows.items()}
    return {
        name: SetReceipt(
            records[name],
            len(listed),
            len(prompts[name]),
            None if name == "train" or listed is asked else len(prompts[name] & prompts["train"]),
            **list_figures([len(row.responses) for row in listed]),
        )
        for name, listed in rows.items()
    }


def list_figures(sizes: Sequence[int]) -> dict[str, Any]:
    """``responses`` and ``list_sizes`` of a set whose rows have ``sizes`` responses; empty for pairs."""
    most = max(sizes, default=0)
    if not most:
        return {"responses": 0}
    if most <= 2:
        return {}
    return {"responses": sum(sizes), "list_sizes": [min(sizes), max(sizes)]}
