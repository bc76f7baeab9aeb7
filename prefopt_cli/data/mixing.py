"""Which pairs make up a set, how often and in which order: everything here is decided by the seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

from prefopt_cli.data import receipt
from prefopt_cli.data.examples import Pair, Text, text_key
from prefopt_cli.data.rows import SourceRows
from prefopt_cli.recipe.schema import DatasetSettings, Source


@dataclass(frozen=True)
class Share:
    """What one source contributes: distinct pairs to train on, their repeats, and the held-out pairs."""

    train: list[Pair]
    repeats: list[Pair]
    holdout: list[Pair]


def share(rows: SourceRows, source: Source, position: int, settings: DatasetSettings) -> Share:
    """Shuffle, cut to ``limit``, set the held-out prompts aside, then apply ``weight`` to the rest.

    In this order ``limit`` bounds what is used of the source at all, and held-out pairs are a fair
    sample of that, whatever the weight. ``position`` of the source, not its path, enters the seed: data
    that was moved keeps its order.
    """
    order = list(range(len(rows.pairs)))
    if settings.shuffle:
        _random(settings, position, "shuffle").shuffle(order)
    used = limited(order, rows, source)
    held = {number for number in used if is_held_out(rows.pairs[number].prompt, settings)}
    for number in sorted(held):
        rows.tally.drop(receipt.HELD_OUT, rows.pairs[number].row_id)
    train = [rows.pairs[number] for number in used if number not in held]
    first, repeats = _weighted(train, source.weight, _random(settings, position, "weight"))
    for row_id in sorted({pair.row_id for pair in train} - {pair.row_id for pair in first}):
        rows.tally.drop(receipt.LEFT_OUT, row_id)
    return Share(first, repeats, [rows.pairs[number] for number in sorted(held)])


def limited(order: Sequence[int], rows: SourceRows, source: Source) -> list[int]:
    """The first ``limit`` of the row positions ``order``; the others are counted as dropped."""
    limit = len(order) if source.limit is None else source.limit
    for number in order[limit:]:
        rows.tally.drop(receipt.BEYOND_LIMIT, rows.pairs[number].row_id)
    return list(order[:limit])


def mixture(shares: Sequence[Share], settings: DatasetSettings) -> list[Pair]:
    """All sources' pairs and repeats, shuffled together; without shuffling, source after source."""
    pairs = [pair for one in shares for pair in (*one.train, *one.repeats)]
    if settings.shuffle:
        _random(settings, len(shares), "mixture").shuffle(pairs)
    return pairs


def is_held_out(prompt: Text, settings: DatasetSettings) -> bool:
    """Whether a prompt belongs to the holdout: by its own hash, so neither order nor other rows matter."""
    digest = hashlib.sha256(f"{settings.seed}:".encode() + text_key(prompt)).digest()
    return int.from_bytes(digest[:8], "big") < (settings.holdout or 0.0) * 2**64


def _weighted(pairs: list[Pair], weight: float, random: Random) -> tuple[list[Pair], list[Pair]]:
    """Every pair ``int(weight)`` times, a random rest of them once more: (first occurrences, repeats)."""
    whole = int(weight)
    drawn = sorted(random.sample(range(len(pairs)), round((weight - whole) * len(pairs))))
    extra = [pairs[number] for number in drawn]
    if not whole:
        return extra, []
    repeats = [replace(pair, repeat=repeat) for repeat in range(2, whole + 1) for pair in pairs]
    return pairs, repeats + [replace(pair, repeat=whole + 1) for pair in extra]


def _random(settings: DatasetSettings, position: int, purpose: str) -> Random:
    """Independent draws per source and purpose, so that one setting does not disturb another's."""
    return Random(f"{settings.seed}/{position}/{purpose}")
