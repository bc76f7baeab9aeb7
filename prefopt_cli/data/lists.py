"""Ranked responses, be they texts or tokens: bring them in order, take some of them, see what is left."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from prefopt_cli.data.examples import Example, Text
from prefopt_cli.data.receipt import ALL_TIED, FEW

Response = TypeVar("Response")


def in_order(prompt: Text, responses: Sequence[Text], places: Sequence[float]) -> Example:
    """The example whose ``responses`` have these ``places``: lower is better, equal places tie."""
    order = sorted(range(len(places)), key=places.__getitem__)
    ranks = dense_ranks([places[number] for number in order])
    return Example(prompt, tuple(responses[number] for number in order), ranks)


def dense_ranks(places: Iterable[float]) -> tuple[int, ...]:
    """``places`` numbered anew from 0 without gaps, in the same order and with the same ties."""
    places = list(places)
    ranks = {place: rank for rank, place in enumerate(sorted(set(places)))}
    return tuple(ranks[place] for place in places)


def subset(
    responses: Sequence[Response], ranks: Sequence[int], keep: Iterable[int]
) -> tuple[tuple[Response, ...], tuple[int, ...]]:
    """The responses at the positions ``keep``, and their ranks among themselves."""
    keep = list(keep)
    return tuple(responses[number] for number in keep), dense_ranks(ranks[number] for number in keep)


def first_of_each(responses: Sequence[Response]) -> list[int]:
    """Positions of the responses that equal none before them."""
    return [number for number, one in enumerate(responses) if one not in responses[:number]]


def nothing_to_compare(ranks: Sequence[int]) -> str | None:
    """Why responses of these ranks teach nothing, in the receipt's words; None where they do."""
    if len(ranks) < 2:
        return FEW
    return ALL_TIED if len(set(ranks)) == 1 else None
