"""A preference pair as text, before any tokenizer has seen it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefopt_cli.data.receipt import Receipt

Message = dict[str, Any]
"""``{"role": ..., "content": ...}``, as chat templates take it."""

HUMAN_TURN = "\n\nHuman:"
"""Begins a person's turn in Anthropic's transcripts."""

Text = str | list[Message]
"""Plain text, or a list of messages that goes through the tokenizer's chat template."""

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, rows done, rows in all)."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One comparison: ``chosen`` was preferred to ``rejected`` as an answer to ``prompt``.

    Either all three are strings or all three are message lists. ``repeat`` counts the occurrences of
    one row in a weighted mixture: 1 for the row itself, 2 for its first repeat.
    """

    row_id: str
    source: str
    prompt: Text
    chosen: Text
    rejected: Text
    repeat: int = 1

    @property
    def pair_id(self) -> str:
        """Unique within a set: the row's id, with ``#2``, ``#3``, ... on repeats."""
        return self.row_id if self.repeat == 1 else f"{self.row_id}#{self.repeat}"

    @property
    def is_chat(self) -> bool:
        """Whether the texts are message lists."""
        return not isinstance(self.prompt, str)

    @property
    def spans_turns(self) -> bool:
        """Whether a response goes on beyond its turn, so that a person's words would be trained too."""
        sides = (self.chosen, self.rejected)
        return any(HUMAN_TURN in side if isinstance(side, str) else len(side) > 1 for side in sides)


@dataclass(frozen=True)
class PreferenceData:
    """The sets of a recipe as text, in the order in which they are trained or evaluated on."""

    train: list[Pair]
    eval: dict[str, list[Pair]]
    receipt: Receipt

    @property
    def sets(self) -> dict[str, list[Pair]]:
        """Every set by its name; the first is ``train``."""
        return {"train": self.train, **self.eval}


def text_key(*texts: Text) -> bytes:
    """A short digest of texts: equal exactly where the texts are equal."""
    canonical = json.dumps(texts, ensure_ascii=True, sort_keys=True)
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
