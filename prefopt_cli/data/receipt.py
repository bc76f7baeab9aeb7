"""What happened to the data: rows read, kept, dropped and changed, with the reason of each."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

FILTERED = "filtered by where"
MALFORMED = "malformed"
NO_SHARED_PROMPT = "no shared prompt"
IDENTICAL = "identical pair"
EMPTY_SIDE = "empty side"
FEW = "fewer than two responses"
ALL_TIED = "all responses tied"
DUPLICATE = "duplicate"
BEYOND_LIMIT = "beyond limit"
HELD_OUT = "moved to holdout"
LEFT_OUT = "left out by weight"
EMPTY_PROMPT = "empty prompt"
IDENTICAL_TOKENS = "identical in tokens"
REFUSED = "refused by the chat template"
PROMPT_TOO_LONG = "prompt too long"
TOO_LONG = "response too long"

EMPTY_LEFT_OUT = "empty response left out"
REPEATED_LEFT_OUT = "repeated response left out"
TOO_LONG_LEFT_OUT = "overlong response left out of its list"
TRUNCATED = "response truncated"
SPANS_TURNS = "response spans several turns"
BOUNDARY = "boundary inside a token"
TURN_IN_TEXT = "end-of-turn already in the text"
TURN_INSIDE = "end-of-turn inside a response"
BOS_IN_TEXT = "BOS already in the text"
NO_DEGREES = "response without degrees"

EXAMPLES_SHOWN = 3
"""How many row ids a receipt keeps per reason."""


class Tally:
    """Counts one source's rows while they are read and tokenised; ends as a ``SourceReceipt``.

    Counting goes on from a receipt, except that changes are counted anew: rows that were changed may
    be dropped now, and those that stay bring their notes along.
    """

    def __init__(self, start: SourceReceipt | None = None) -> None:
        self.read = start.read if start else 0
        self.dropped: Counter[str] = Counter(start.dropped if start else {})
        self.changed: Counter[str] = Counter()
        self.examples: defaultdict[str, list[str]] = defaultdict(list)
        for reason in self.dropped:
            self.examples[reason] = list(start.examples[reason]) if start else []

    def drop(self, reason: str, row_id: str) -> None:
        """The row goes no further."""
        self.dropped[reason] += 1
        self._show(reason, row_id)

    def change(self, reason: str, row_id: str) -> None:
        """The row stays, but not as it was, or with something worth knowing."""
        self.changed[reason] += 1
        self._show(reason, row_id)

    def _show(self, reason: str, row_id: str) -> None:
        if len(self.examples[reason]) < EXAMPLES_SHOWN:
            self.examples[reason].append(row_id)

    def receipt(self, source: str, format: str, kept: int, rows: int) -> SourceReceipt:
        """Close the count. ``kept`` distinct rows occur ``rows`` times in the set, repeats included."""
        return SourceReceipt(
            source, format, self.read, kept, rows, dict(self.dropped), dict(self.changed), dict(self.examples)
        )


@dataclass(frozen=True)
class SourceReceipt:
    """One source's share of one set.

    ``read`` rows came from the source; ``kept`` of them are in the set, ``rows`` times in all (weights
    repeat rows); the rest is in ``dropped``, by reason. ``changed`` counts kept rows. ``examples`` has
    the first row ids of every reason.
    """

    source: str
    format: str
    read: int
    kept: int
    rows: int
    dropped: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class SetReceipt:
    """One set. Everything in tokens, and ``lengths`` with it, is empty before tokenisation.

    ``rows`` counts comparisons, repeats included, pairs and whole lists alike. ``prompts`` counts
    distinct prompts; ``leaked_prompts`` those of an eval set that also occur in train (None for train
    itself and for prompts to sample for).

    Where a row has more than two responses, ``responses`` counts those of all rows (0 where there are
    prompts alone) and ``list_sizes`` is [fewest, most] of a row; where such rows were made into pairs
    (``pairing``: all_pairs or adjacent_pairs), ``pairs`` is how many the set has then. ``lengths`` has,
    for prompt, chosen and rejected of every pair (for prompt and responses where rows stay lists),
    percentiles, maximum and total in tokens; ``chosen_longer`` and ``same_length`` are shares of the
    pairs, None for lists.

    ``degrees``, where responses were degraded: how many ``responses`` were to be, how many of them are
    ``taking_part``, and how many have each of the ``levels`` (0 being themselves).
    """

    sources: list[SourceReceipt]
    rows: int
    prompts: int
    leaked_prompts: int | None = None
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)
    chosen_longer: float | None = None
    same_length: float | None = None
    responses: int | None = None
    list_sizes: list[int] | None = None
    pairs: int | None = None
    pairing: str | None = None
    degrees: dict[str, Any] | None = None

    def dropped(self) -> dict[str, int]:
        """Dropped rows by reason, over all sources."""
        return dict(sum((Counter(source.dropped) for source in self.sources), Counter()))


@dataclass(frozen=True)
class Receipt:
    """All sets by name, and what was found out about the tokenizer."""

    sets: dict[str, SetReceipt]
    max_length: int | None
    on_overflow: str
    special_tokens: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for the run folder's manifest."""
        return asdict(self)

    def check(self) -> None:
        """Raise AssertionError unless every row that was read is kept or dropped for a counted reason."""
        for name, record in self.sets.items():
            for source in record.sources:
                accounted = source.kept + sum(source.dropped.values())
                if source.read != accounted:
                    raise AssertionError(
                        f"{name}/{source.source}: {source.read} rows read, {accounted} accounted for"
                    )
            if record.rows != sum(source.rows for source in record.sources):
                raise AssertionError(f"{name}: its {record.rows} rows are not the sum of its sources")
