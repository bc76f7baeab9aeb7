"""One response of a tokenised set at all its levels, for a person to judge."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from os.path import commonprefix
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from prefopt_cli.training.degree_extent import versions_in
from prefopt_cli.training.row_text import side_of, text_after

_WORDS = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")


class Cut(NamedTuple):
    """What a level lacks: characters `start` to `end` of the response's text."""

    start: int
    end: int
    instead: str
    """What stands there; nothing, or now and then a blank or a word that was read as another one's neighbour."""


@dataclass(frozen=True)
class DegradedVersion:
    """A response without some of its key phrases."""

    level: int
    tokens: int
    text: str
    removed: list[Cut]
    """In their order; made at once in the response's text, they give `text`."""


@dataclass(frozen=True)
class DegradedResponse:
    """A response and its degraded versions, as they will be read: from the stored tokens."""

    row_id: str
    side: str
    """As in a `MaskedResponse`."""
    tokens: int
    text: str
    levels: list[DegradedVersion]
    """From level 1 on; levels that came out alike are missing."""


def first_degraded(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> DegradedResponse | None:
    """The first response of a set that takes part; None where none does, or nothing was to be degraded."""
    if "degraded_ids" not in rows.column_names or not len((found := versions_in(rows)).rows):
        return None
    row = rows[int(found.rows[0])]
    response = next(number for number, levels in enumerate(row["degraded_levels"]) if len(levels))
    ids = row["response_ids"][response]
    text = text_after(tokenizer, row["prompt_ids"], ids)
    versions = []
    for level, version in zip(row["degraded_levels"][response], row["degraded_ids"][response], strict=True):
        left = text_after(tokenizer, row["prompt_ids"], version)
        versions.append(DegradedVersion(level, len(version), left, list(removed(text, left))))
    return DegradedResponse(row["row_id"], side_of(row["ranks"], response), len(ids), text, versions)


def removed(text: str, left: str) -> Iterator[Cut]:
    """What was removed from a text, word by word, where so much of it is left."""
    words, kept = _WORDS.findall(text), _WORDS.findall(left)
    start = 0
    for operation, first, last, kept_first, kept_last in SequenceMatcher(
        None, words, kept, autojunk=False
    ).get_opcodes():
        before, after = "".join(words[first:last]), "".join(kept[kept_first:kept_last])
        if operation != "equal":
            # The blank before a word belongs to it, so the next word may seem to be another one.
            same = len(commonprefix((before, after)))
            ending = len(commonprefix((before[same:][::-1], after[same:][::-1])))
            yield Cut(start + same, start + len(before) - ending, after[same : len(after) - ending])
        start += len(before)
