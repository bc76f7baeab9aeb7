"""What ``max_length`` leaves of a row in tokens, or the reason why it is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefopt_cli.data import receipt
from prefopt_cli.data.boundaries import Encoded
from prefopt_cli.data.lists import first_of_each, nothing_to_compare, subset
from prefopt_cli.recipe.schema import DatasetSettings


@dataclass(frozen=True, slots=True)
class Fitted:
    """Token ids of a row that stays, the ranks of the responses left in it, and notes for the receipt."""

    prompt: list[int]
    responses: tuple[list[int], ...]
    ranks: tuple[int, ...]
    notes: tuple[str, ...]
    numbers: tuple[int, ...]
    """Which responses of the row these are."""


def longest(encoded: Encoded) -> int:
    """Tokens of the prompt and its longest response."""
    return len(encoded.prompt) + max(map(len, encoded.responses), default=0)


def fit(encoded: Encoded | None, ranks: Sequence[int], settings: DatasetSettings) -> Fitted | str:
    """The row within ``max_length`` tokens, or the receipt's reason for dropping it.

    ``ranks`` are those of the responses, or empty for a prompt to sample for. Of a pair both responses
    stay or none; of more than two those that fit stay, as far as they are still worth comparing.
    """
    if encoded is None:
        return receipt.REFUSED
    if not encoded.prompt:
        return receipt.EMPTY_PROMPT
    limit = settings.max_length
    if limit is not None and len(encoded.prompt) >= limit:
        return receipt.PROMPT_TOO_LONG
    responses = tuple(encoded.responses)
    fitted = Fitted(encoded.prompt, responses, tuple(ranks), encoded.notes, tuple(range(len(responses))))
    if limit is not None and longest(encoded) > limit:
        shortened = _shorten(fitted, limit - len(encoded.prompt), settings.on_overflow)
        if shortened is None:
            return receipt.TOO_LONG
        fitted = shortened
    return _distinct(fitted) if fitted.ranks else fitted


def _shorten(fitted: Fitted, room: int, on_overflow: str) -> Fitted | None:
    """The row with no response over ``room`` tokens; None where it cannot be had."""
    if on_overflow == "truncate_response":
        cut = tuple(one[:room] for one in fitted.responses)
        return replace(fitted, responses=cut, notes=(*fitted.notes, receipt.TRUNCATED))
    if on_overflow == "error" or len(fitted.ranks) <= 2:
        return None
    fits = [number for number, one in enumerate(fitted.responses) if len(one) <= room]
    fitted = _kept(fitted, fits, receipt.TOO_LONG_LEFT_OUT)
    return None if nothing_to_compare(fitted.ranks) else fitted


def _distinct(fitted: Fitted) -> Fitted | str:
    """Different texts can become the same tokens, by truncation or by what the tokenizer normalises away."""
    different = first_of_each(fitted.responses)
    if len(different) == len(fitted.responses):
        return fitted
    if len(fitted.responses) == 2:
        return receipt.IDENTICAL_TOKENS
    fitted = _kept(fitted, different, receipt.REPEATED_LEFT_OUT)
    return nothing_to_compare(fitted.ranks) or fitted


def _kept(fitted: Fitted, keep: list[int], note: str) -> Fitted:
    responses, ranks = subset(fitted.responses, fitted.ranks, keep)
    numbers = tuple(fitted.numbers[each] for each in keep)
    return Fitted(fitted.prompt, responses, ranks, (*fitted.notes, note), numbers)


def degrees(encoded: Encoded, fitted: Fitted) -> tuple[tuple[tuple[int, list[int]], ...], ...]:
    """Of every response that stays its degraded versions with their levels, the mildest first.

    A version must be shorter than its response in tokens too, and differ from the milder ones. A response that was
    truncated has none: it ends in the middle, which would tell it from all that are whole.
    """
    return tuple(
        _distinct_levels(response, encoded.responses[number], encoded.degraded[number])
        for number, response in zip(fitted.numbers, fitted.responses, strict=True)
    )


def _distinct_levels(
    response: list[int], whole: list[int], levels: list[tuple[int, list[int]]]
) -> tuple[tuple[int, list[int]], ...]:
    if len(response) < len(whole):
        return ()
    kept: list[tuple[int, list[int]]] = []
    for level, ids in levels:
        if len(ids) < len(response) and all(ids != other for _, other in kept):
            kept.append((level, ids))
    return tuple(kept)
