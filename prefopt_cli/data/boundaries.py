"""Where a prompt ends and its responses begin, in tokens: decided here, once, for every method.

Prompt and response are tokenised together, as the policy sees them. The response starts where the
tokens of the prompt alone and of prompt + response stop agreeing, with whichever response that comes
first (the rule of TRL's DPOTrainer), so all responses share one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import jinja2

from prefopt_cli.data.degrading import Degrading
from prefopt_cli.data.examples import Comparison, Text, shared_length
from prefopt_cli.data.receipt import BOS_IN_TEXT, BOUNDARY, TURN_IN_TEXT, TURN_INSIDE
from prefopt_cli.data.special_tokens import SpecialTokens, encode, render


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one row, responses with their end-of-turn, and what the receipt has to say about it."""

    prompt: list[int]
    responses: list[list[int]]
    notes: tuple[str, ...]
    degraded: list[list[tuple[int, list[int]]]] = field(default_factory=list)
    """For each response its degraded versions, each with its level; empty where none were asked for."""


@dataclass(frozen=True, slots=True)
class _Written:
    """A prompt, and it with each of its responses, as texts; end-of-turn is left out of the plain ones."""

    prompt: str
    responses: list[str]
    turn_in_text: bool
    degraded: list[list[tuple[int, str]]]


def encode_rows(
    rows: Sequence[Comparison], tokenizer: Any, special: SpecialTokens, degrading: Degrading | None = None
) -> list[Encoded | None]:
    """Token ids of ``rows``, in one call of the tokenizer; None where the chat template refuses a row."""
    written = [_write(row, tokenizer, special, degrading) for row in rows]
    texts = [text for one in written if one for text in _texts(one)]
    ids = iter(encode(tokenizer, texts)) if texts else iter(())
    return [_split(one, ids, row, special) if one else None for row, one in zip(rows, written, strict=True)]


def _write(
    row: Comparison, tokenizer: Any, special: SpecialTokens, degrading: Degrading | None
) -> _Written | None:
    turns = {special.eos, special.chat.turn} if special.chat and row.is_chat else {special.eos}
    bare = [_without_turn(response, turns) for response in row.responses]
    degraded = [degrading.of(response) for response, _ in bare] if degrading else []
    prompt: Any = row.prompt

    def whole(response: Text) -> str:
        if not (row.is_chat and special.chat):
            return str(prompt + response)
        text = render(tokenizer, prompt + response, generation_prompt=False)
        return text.removesuffix(special.chat.noise)

    try:
        return _Written(
            render(tokenizer, prompt, generation_prompt=True) if row.is_chat and special.chat else prompt,
            [whole(response) for response, _ in bare],
            any(had for _, had in bare),
            [_accepted(levels, whole) for levels in degraded],
        )
    except jinja2.TemplateError:
        return None


def _accepted(levels: list[tuple[int, Text]], whole: Callable[[Text], str]) -> list[tuple[int, str]]:
    """The versions that the chat template takes: it may refuse a message of which nothing is left."""
    accepted = []
    for level, response in levels:
        with suppress(jinja2.TemplateError):
            accepted.append((level, whole(response)))
    return accepted


def _texts(written: _Written) -> Iterator[str]:
    """All that is tokenised of a row, in the order in which `_split` takes it up."""
    yield written.prompt
    yield from written.responses
    for levels in written.degraded:
        yield from (text for _, text in levels)


def _without_turn(response: Any, turns: set[str]) -> tuple[Any, bool]:
    """The text or messages without end-of-turn tokens written out at the end, and whether there were any."""
    if not isinstance(response, str):
        content, had = _without_turn(response[-1]["content"], turns)
        return ([*response[:-1], {**response[-1], "content": content}], True) if had else (response, False)
    for turn in turns:
        if response.rstrip().endswith(turn):
            return _without_turn(response.rstrip().removesuffix(turn), turns)[0], True
    return response, False


def _split(written: _Written, ids: Iterator[list[int]], row: Comparison, special: SpecialTokens) -> Encoded:
    def next_whole() -> list[int]:
        return _ended(special.with_prefix(next(ids))[0], row, special)

    prompt, prefixes = special.with_prefix(next(ids))
    wholes = [next_whole() for _ in written.responses]
    degraded = [[(level, next_whole()) for level, _ in levels] for levels in written.degraded]
    # The degraded have no say in where the prompt ends: the data is the same with them and without.
    cut = min((shared_length(prompt, whole) for whole in wholes), default=len(prompt))
    notes = {
        BOUNDARY: cut < len(prompt),
        TURN_IN_TEXT: written.turn_in_text,
        TURN_INSIDE: any(whole[-1] in whole[cut:-1] for whole in wholes),
        BOS_IN_TEXT: prefixes > bool(row.is_chat and special.chat and special.chat.writes_bos),
    }
    applying = tuple(note for note, applies in notes.items() if applies)
    return Encoded(
        prompt[:cut],
        [whole[cut:] for whole in wholes],
        applying,
        [
            [(level, whole[cut:]) for level, whole in levels if whole[:cut] == prompt[:cut]]
            for levels in degraded
        ],
    )


def _ended(ids: list[int], row: Comparison, special: SpecialTokens) -> list[int]:
    """``ids`` with exactly one end-of-turn at their end."""
    if not row.is_chat or special.chat is None:
        return [*ids, special.eos_id]
    turn = special.chat.turn_id
    return ids if special.chat.from_template and ids[-1:] == [turn] else [*ids, turn]
