"""Which rows make up a set, how often and in which order: everything here is decided by the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from prefopt_cli.data import receipt
from prefopt_cli.data.examples import Comparison, Text, text_key
from prefopt_cli.data.rows import SourceRows
from prefopt_cli.recipe.schema import DatasetSettings, Source


@dataclass(frozen=True)
class Share:
    """What one source contributes: distinct rows to train on, their repeats, and the held-out rows."""

    train: list[Comparison]
    repeats: list[Comparison]
    holdout: list[Comparison]


def share(rows: SourceRows, source: Source, position: int, settings: DatasetSettings) -> Share:
    """Shuffle, cut to ``limit``, set the held-out prompts aside, then apply ``weight`` to the rest.

    In this order ``limit`` bounds what is used of the source at all, and held-out rows are a fair
    sample of that, whatever the weight. ``position`` of the source, not its path, enters the seed: data
    that was moved keeps its order.
    """
    used = sampled(rows, source, position, settings)
    held = {number for number in used if is_held_out(rows.comparisons[number].prompt, settings)}
    for number in sorted(held):
        rows.tally.drop(receipt.HELD_OUT, rows.comparisons[number].row_id)
    train = [rows.comparisons[number] for number in used if number not in held]
    first, repeats = _weighted(train, source.weight, _random(settings, position, "weight"))
    for row_id in sorted({row.row_id for row in train} - {row.row_id for row in first}):
        rows.tally.drop(receipt.LEFT_OUT, row_id)
    return Share(first, repeats, [rows.comparisons[number] for number in sorted(held)])


def sampled(
    rows: SourceRows, source: Source, position: int, settings: DatasetSettings, purpose: str = "shuffle"
) -> list[int]:
    """Row positions in the order of the shuffle (if there is one), up to ``limit``."""
    order = list(range(len(rows.comparisons)))
    if settings.shuffle:
        _random(settings, position, purpose).shuffle(order)
    return limited(order, rows, source)


def limited(order: Sequence[int], rows: SourceRows, source: Source) -> list[int]:
    """The first ``limit`` of the row positions ``order``; the others are counted as dropped."""
    limit = len(order) if source.limit is None else source.limit
    for number in order[limit:]:
        rows.tally.drop(receipt.BEYOND_LIMIT, rows.comparisons[number].row_id)
    return list(order[:limit])


def mixture(shares: Sequence[Share], settings: DatasetSettings) -> list[Comparison]:
    """All sources' rows and repeats, shuffled together; without shuffling, source after source."""
    rows = [row for one in shares for row in (*one.train, *one.repeats)]
    if settings.shuffle:
        _random(settings, len(shares), "mixture").shuffle(rows)
    return rows


def is_held_out(prompt: Text, settings: DatasetSettings) -> bool:
    """Whether a prompt belongs to the holdout: by its own hash, so neither order nor other rows matter."""
    digest = hashlib.sha256(f"{settings.seed}:".encode() + text_key(prompt)).digest()
    return int.from_bytes(digest[:8], "big") < (settings.holdout or 0.0) * 2**64


def _weighted(
    rows: list[Comparison], weight: float, random: Random
) -> tuple[list[Comparison], list[Comparison]]:
    """Every row ``int(weight)`` times, a random rest of them once more: (first occurrences, repeats)."""
    whole = int(weight)
    drawn = sorted(random.sample(range(len(rows)), round((weight - whole) * len(rows))))
    extra = [rows[number] for number in drawn]
    if not whole:
        return extra, []
    repeats = [replace(row, repeat=repeat) for repeat in range(2, whole + 1) for row in rows]
    return rows, repeats + [replace(row, repeat=whole + 1) for row in extra]


def _random(settings: DatasetSettings, position: int, purpose: str) -> Random:
    """Independent draws per source and purpose, so that one setting does not disturb another's."""
    return Random(f"{settings.seed}/{position}/{purpose}")
