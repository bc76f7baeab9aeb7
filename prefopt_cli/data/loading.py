"""``load``: the recipe's ``dataset`` section -> text pairs and the first half of the receipt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefopt_cli.data import sources
from prefopt_cli.data.examples import Pair, PreferenceData, Progress, text_key
from prefopt_cli.data.mixing import Share, limited, mixture, share
from prefopt_cli.data.receipt import Receipt, SetReceipt, SourceReceipt, Tally
from prefopt_cli.data.rows import SourceRows, read_pairs
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import DatasetSettings, Source

HOLDOUT = "holdout"
"""The eval set made of held-out training prompts."""


def load(settings: DatasetSettings, progress: Progress | None = None) -> PreferenceData:
    """Read, check, filter and mix all sources; nothing is tokenised yet.

    The result depends on the data and on ``settings`` alone. Reads the network only for hub ids.

    Raises:
        UserError: a source cannot be read, does not fit, or leaves a set empty.
    """
    _check_names(settings)
    train, holdout = _train_sets(settings, progress)
    found = {"train": train}
    found |= {name: _eval_set(name, listed, progress) for name, listed in settings.eval.items()}
    if settings.holdout is not None:
        found[HOLDOUT] = holdout
    for name, one in found.items():
        require_pairs(name, one.pairs, one.sources, settings)
    pairs = {name: one.pairs for name, one in found.items()}
    record = Receipt(
        set_receipts(pairs, {name: one.sources for name, one in found.items()}),
        settings.max_length,
        settings.on_overflow,
    )
    record.check()
    return PreferenceData(pairs.pop("train"), pairs, record)


@dataclass(frozen=True)
class _Set:
    pairs: list[Pair]
    sources: list[SourceReceipt]


def _train_sets(settings: DatasetSettings, progress: Progress | None) -> tuple[_Set, _Set]:
    """The training mixture and what ``holdout`` sets aside from it."""
    read: list[SourceRows] = []
    shares: list[Share] = []
    seen: set[bytes] = set()
    for position, source in enumerate(settings.train):
        rows = _read(settings.train, position, seen, progress)
        part = share(rows, source, position, settings)
        seen |= {text_key(pair.prompt, pair.chosen, pair.rejected) for pair in (*part.train, *part.holdout)}
        read.append(rows)
        shares.append(part)
    train = [
        rows.tally.receipt(rows.label, rows.format, len(part.train), len(part.train) + len(part.repeats))
        for rows, part in zip(read, shares, strict=True)
    ]
    aside = [
        _moved(len(part.holdout)).receipt(rows.label, rows.format, len(part.holdout), len(part.holdout))
        for rows, part in zip(read, shares, strict=True)
    ]
    held_out = [pair for part in shares for pair in part.holdout]
    return _Set(mixture(shares, settings), train), _Set(held_out, aside)


def _moved(rows: int) -> Tally:
    tally = Tally()
    tally.read = rows
    return tally


def _eval_set(name: str, listed: Sequence[Source], progress: Progress | None) -> _Set:
    """An eval set in its files' own order: every run sees the same pairs at the same place."""
    pairs: list[Pair] = []
    receipts: list[SourceReceipt] = []
    for position, source in enumerate(listed):
        if source.weight != 1.0:
            raise UserError(
                f"eval set {name}: {source.source} has a weight; only training sources are weighted"
            )
        seen = {text_key(pair.prompt, pair.chosen, pair.rejected) for pair in pairs}
        rows = _read(listed, position, seen, progress)
        kept = [rows.pairs[number] for number in limited(range(len(rows.pairs)), rows, source)]
        pairs += kept
        receipts.append(rows.tally.receipt(rows.label, rows.format, len(kept), len(kept)))
    return _Set(pairs, receipts)


def _read(listed: Sequence[Source], position: int, seen: set[bytes], progress: Progress | None) -> SourceRows:
    """One source of a set. Row ids are made of its label, so labels that occur again get a number."""
    source = listed[position]
    label = sources.label(source)
    if before := sum(sources.label(other) == label for other in listed[:position]):
        label = f"{label}~{before + 1}"
    return read_pairs(sources.open_source(source, progress), source, label, seen, progress)


def _check_names(settings: DatasetSettings) -> None:
    if "train" in settings.eval:
        raise UserError("an eval set cannot be named train")
    if HOLDOUT in settings.eval and settings.holdout is not None:
        raise UserError(f"the eval set {HOLDOUT} is made by `holdout`; give the other one another name")


def require_pairs(
    name: str, pairs: Sequence[Pair], records: Sequence[SourceReceipt], settings: DatasetSettings
) -> None:
    """Raise UserError, with the reasons in numbers, if nothing is left of a set."""
    if pairs:
        return
    if name == HOLDOUT and not sum(record.read for record in records):
        raise UserError(
            f"holdout: {settings.holdout} sets aside none of the training prompts; raise it or add data"
        )
    dropped = SetReceipt(list(records), 0, 0).dropped()
    reasons = ", ".join(f"{reason} {count}" for reason, count in dropped.items())
    raise UserError(f"the set {name} has no usable rows left ({reasons})")


def set_receipts(
    pairs: Mapping[str, Sequence[Pair]], records: Mapping[str, list[SourceReceipt]]
) -> dict[str, SetReceipt]:
    """Row and prompt counts of every set; for eval sets also the prompts that train has too."""
    prompts = {name: {text_key(pair.prompt) for pair in listed} for name, listed in pairs.items()}
    return {
        name: SetReceipt(
            records[name],
            len(listed),
            len(prompts[name]),
            None if name == "train" else len(prompts[name] & prompts["train"]),
        )
        for name, listed in pairs.items()
    }
