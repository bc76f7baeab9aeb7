"""Compared responses as text, before any tokenizer has seen them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prefopt_cli.data.receipt import Receipt

Message = dict[str, Any]
"""``{"role": ..., "content": ...}``, as chat templates take it."""

HUMAN_TURN = "\n\nHuman:"
"""Begins a person's turn in Anthropic's transcripts."""

Text = str | list[Message]
"""Plain text, or a list of messages that goes through the tokenizer's chat template."""

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, rows done, rows in all)."""


class Example(NamedTuple):
    """What a row says: a prompt, its responses from the best on, and their ranks (see ``Comparison``)."""

    prompt: Text
    responses: tuple[Text, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Responses to one prompt, the best first.

    Prompt and responses are all strings or all message lists. ``ranks`` has one number per response:
    0 is best, no number is skipped, none is lower than the one before it, and equal ranks tie. A pair is
    ``(0, 1)``, the best of n ``(0, 1, ..., 1)``; a prompt to sample for has no responses. ``repeat``
    counts the occurrences of one row in a weighted mixture: 1 for the row itself, 2 for its first repeat.
    ``notes`` is what the receipt says was changed in it.
    """

    row_id: str
    source: str
    prompt: Text
    responses: tuple[Text, ...]
    ranks: tuple[int, ...]
    repeat: int = 1
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def occurrence_id(self) -> str:
        """Unique within a set: the row's id, with ``#2``, ``#3``, ... on repeats."""
        return self.row_id if self.repeat == 1 else f"{self.row_id}#{self.repeat}"

    @property
    def key(self) -> bytes:
        """Equal for rows that say the same: a digest of prompt, responses and ranks, in any order of what ties."""
        if len(set(self.ranks)) == len(self.ranks):
            return text_key(self.prompt, self.responses, self.ranks)
        tied = sorted(
            (rank, text_key(one).hex()) for rank, one in zip(self.ranks, self.responses, strict=True)
        )
        return text_key(self.prompt, tied)

    @property
    def is_chat(self) -> bool:
        """Whether the texts are message lists."""
        return not isinstance(self.prompt, str)

    @property
    def spans_turns(self) -> bool:
        """Whether a response goes on beyond its turn, so that a person's words would be trained too."""
        return any(HUMAN_TURN in side if isinstance(side, str) else len(side) > 1 for side in self.responses)


@dataclass(frozen=True)
class PreferenceData:
    """The sets of a recipe as text, in the order in which they are trained or evaluated on.

    ``prompts`` are those to sample responses for, None where none were asked for.
    """

    train: list[Comparison]
    eval: dict[str, list[Comparison]]
    receipt: Receipt
    prompts: list[Comparison] | None = None

    @property
    def sets(self) -> dict[str, list[Comparison]]:
        """Every set of comparisons by its name; the first is ``train``."""
        return {"train": self.train, **self.eval}


def text_key(*parts: Any) -> bytes:
    """A short digest of texts, ranks and sequences of them: equal exactly where these are equal."""
    canonical = json.dumps(parts, ensure_ascii=True, sort_keys=True)
    return hashlib.blake2b(canonical.encode(), digest_size=16).digest()


def plain_text(text: Text) -> str:
    """The words of a text without its roles, for looking at and for tests of emptiness."""
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def shared_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many leading items (characters, token ids) two sequences have in common."""
    shorter = min(len(first), len(second))
    if first[:shorter] == second[:shorter]:
        return shorter
    return next(n for n in range(shorter) if first[n] != second[n])
