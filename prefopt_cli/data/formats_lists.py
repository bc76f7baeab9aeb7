"""Rows that hold several responses to one prompt: ranked, scored, or with the best one named.

The prompt is text and so is each response, or the prompt is a message list and each response another
one (which may repeat the prompt in front) or a single message.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

from prefopt_cli.data.examples import Example, Text
from prefopt_cli.data.fields import Row, Unfit, kind, messages, numbers, position, response, text
from prefopt_cli.data.lists import in_order
from prefopt_cli.data.receipt import MALFORMED

ENTRY = "a response"
"""What an entry of ``responses`` is called in reasons."""


def ranked(row: Row) -> Example:
    """``ranking`` has one number per response: lower is better, equal numbers tie, only the order counts."""
    prompt, responses = _listed(row)
    return in_order(prompt, responses, numbers(row.get("ranking"), "ranking", len(responses)))


def scored(row: Row) -> Example:
    """``scores`` has one number per response: higher is better, equal numbers tie."""
    prompt, responses = _listed(row)
    scores = numbers(row.get("scores"), "scores", len(responses))
    return in_order(prompt, responses, [-score for score in scores])


def best_of_n(row: Row) -> Example:
    """``best`` is the number, from 0, of the response that beats all others, which tie."""
    prompt, responses = _listed(row)
    best = position(row.get("best"), "best", len(responses))
    return in_order(prompt, responses, [number != best for number in range(len(responses))])


def scores_contradict_ranking(row: Row) -> bool:
    """Whether a row has both, and ``ranking``, read as ranks, puts a response above one of a higher score.

    Some data sets use the name for the responses' numbers from best to worst. A permutation does not
    tell which of the two it is; the scores beside it do.
    """
    try:
        count = len(_listed(row)[1])
        ranking = numbers(row.get("ranking"), "ranking", count)
        scores = numbers(row.get("scores"), "scores", count)
    except Unfit:
        return False
    both = list(zip(ranking, scores, strict=True))
    return any(rank < other and score < higher for (rank, score), (other, higher) in permutations(both, 2))


def _listed(row: Row) -> tuple[Text, list[Text]]:
    prompt, listed = row.get("prompt"), row.get("responses")
    if not isinstance(listed, list):
        raise Unfit(f"{MALFORMED}: responses is {kind(listed)}, not a list")
    if isinstance(prompt, list):
        asked = messages(prompt, "prompt")
        return asked, [_answer(one, asked) for one in listed]
    return text(prompt, "prompt"), [text(one, ENTRY) for one in listed]


def _answer(value: Any, prompt: Text) -> Text:
    found = messages([value] if isinstance(value, dict) else value, ENTRY)
    repeats = found[: len(prompt)] == prompt
    return response(found[len(prompt) :] if repeats else found, ENTRY)
