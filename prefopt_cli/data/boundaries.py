"""Where a prompt ends and its responses begin, in tokens: decided here, once, for every method.

Prompt and response are tokenised together, as the policy sees them. The response starts where the
tokens of the prompt alone and of prompt + response stop agreeing, on whichever side that comes
first (the rule of TRL's DPOTrainer), so both responses share one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from prefopt_cli.data.examples import Pair, shared_length
from prefopt_cli.data.receipt import BOS_IN_TEXT, BOUNDARY, TURN_IN_TEXT, TURN_INSIDE
from prefopt_cli.data.special_tokens import SpecialTokens, encode, render


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of one pair, responses with their end-of-turn, and what the receipt has to say about it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Written:
    """One pair as three texts; end-of-turn is left out of the plain ones."""

    prompt: str
    chosen: str
    rejected: str
    turn_in_text: bool


def encode_pairs(pairs: Sequence[Pair], tokenizer: Any, special: SpecialTokens) -> list[Encoded | None]:
    """Token ids of ``pairs``, in one call of the tokenizer; None where the chat template refuses a row."""
    written = [_write(pair, tokenizer, special) for pair in pairs]
    texts = [text for one in written if one for text in (one.prompt, one.chosen, one.rejected)]
    ids = iter(encode(tokenizer, texts)) if texts else iter(())
    return [
        _split(one, next(ids), next(ids), next(ids), pair, special) if one else None
        for pair, one in zip(pairs, written, strict=True)
    ]


def _write(pair: Pair, tokenizer: Any, special: SpecialTokens) -> _Written | None:
    turns = {special.eos, special.chat.turn} if special.chat and pair.is_chat else {special.eos}
    chosen, chosen_had = _without_turn(pair.chosen, turns)
    rejected, rejected_had = _without_turn(pair.rejected, turns)
    prompt: Any = pair.prompt
    had = chosen_had or rejected_had
    if not (pair.is_chat and special.chat):
        return _Written(prompt, prompt + chosen, prompt + rejected, had)
    noise = special.chat.noise
    try:
        return _Written(
            render(tokenizer, prompt, generation_prompt=True),
            render(tokenizer, prompt + chosen, generation_prompt=False).removesuffix(noise),
            render(tokenizer, prompt + rejected, generation_prompt=False).removesuffix(noise),
            had,
        )
    except jinja2.TemplateError:
        return None


def _without_turn(response: Any, turns: set[str]) -> tuple[Any, bool]:
    """The text or messages without end-of-turn tokens written out at the end, and whether there were any."""
    if not isinstance(response, str):
        content, had = _without_turn(response[-1]["content"], turns)
        return ([*response[:-1], {**response[-1], "content": content}], True) if had else (response, False)
    for turn in turns:
        if response.rstrip().endswith(turn):
            return _without_turn(response.rstrip().removesuffix(turn), turns)[0], True
    return response, False


def _split(
    written: _Written,
    prompt: list[int],
    chosen: list[int],
    rejected: list[int],
    pair: Pair,
    special: SpecialTokens,
) -> Encoded:
    prompt, prefixes = special.with_prefix(prompt)
    chosen = _ended(special.with_prefix(chosen)[0], pair, special)
    rejected = _ended(special.with_prefix(rejected)[0], pair, special)
    cut = min(shared_length(prompt, chosen), shared_length(prompt, rejected))
    notes = {
        BOUNDARY: cut < len(prompt),
        TURN_IN_TEXT: written.turn_in_text,
        TURN_INSIDE: chosen[-1] in chosen[cut:-1] or rejected[-1] in rejected[cut:-1],
        BOS_IN_TEXT: prefixes > bool(pair.is_chat and special.chat and special.chat.writes_bos),
    }
    applying = tuple(note for note, applies in notes.items() if applies)
    return Encoded(prompt[:cut], chosen[cut:], rejected[cut:], applying)


def _ended(ids: list[int], pair: Pair, special: SpecialTokens) -> list[int]:
    """``ids`` with exactly one end-of-turn at their end."""
    if not pair.is_chat or special.chat is None:
        return [*ids, special.eos_id]
    turn = special.chat.turn_id
    return ids if special.chat.from_template and ids[-1:] == [turn] else [*ids, turn]
