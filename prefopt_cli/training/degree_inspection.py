"""One response of a tokenised set at all its levels, for a person to judge."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from prefopt_cli.training.degree_extent import versions_in
from prefopt_cli.training.row_text import side_of, text_after

_WORDS = re.compile(r"\s*(?:\w+|[^\w\s])|\s+")
"""Words and marks, each with the blanks before it: few enough for long texts."""

_FINER = re.compile(r"\w+|\W")


class Cut(NamedTuple):
    """What a level lacks: characters `start` to `end` of the response's text."""

    start: int
    end: int
    instead: str
    """What stands there now: as a rule nothing, now and then a blank, or a word that could not be traced."""


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


def removed(text: str, left: str, parts: re.Pattern[str] = _WORDS) -> Iterator[Cut]:
    """What was removed from a text, where so much of it is left.

    Args:
        text, left: before and after.
        parts: what both are compared by.
    """
    before, after = parts.findall(text), parts.findall(left)
    start = 0
    # Not autojunk: it would overlook the commonest words.
    steps = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    for operation, first, last, left_first, left_last in steps:
        gone, instead = "".join(before[first:last]), "".join(after[left_first:left_last])
        if operation == "replace" and parts is _WORDS:
            # With another blank before it, a word that stayed looks like another one.
            yield from (Cut(start + a, start + b, new) for a, b, new in removed(gone, instead, _FINER))
        elif operation != "equal":
            yield Cut(start, start + len(gone), instead)
        start += len(gone)
