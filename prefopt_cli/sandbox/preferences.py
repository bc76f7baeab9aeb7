"""Preference rows: replies of the base policy, compared by a simulated person who follows one gold reward.

The person errs: pairs are labelled by Bradley-Terry, lists by Plackett-Luce, both on reward / temperature. The
randomness of a row depends on the world's seed, the dimension and the row alone, so that two temperatures
differ in as few labels as they can. Rows carry the gold rewards of every dimension; no format reads them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

from prefopt_cli.sandbox.grammar import Prompt, parse_reply
from prefopt_cli.sandbox.names import DIMENSIONS, PreferencesName
from prefopt_cli.sandbox.rewards import gold_rewards, malformed_reward
from prefopt_cli.sandbox.world import PoolRow

Row = dict[str, Any]

MATCHES = {
    "helpful": ((0, 1), (2, 3)),
    "polite": ((0, 2), (1, 3)),
    "concise": ((0, 3), (1, 2)),
}
"""Which of a prompt's replies are compared: a mixture of dimensions must not hold a pair twice."""


def text_rewards(prompt: Prompt, text: str) -> dict[str, float]:
    """Gold rewards of any text, by dimension; one that is no well-formed reply is worth less than the worst."""
    choice = parse_reply(prompt, text)
    if choice is None:
        return {dimension: malformed_reward(dimension) for dimension in DIMENSIONS}
    return gold_rewards(prompt, choice)


def pairs(rows: Sequence[PoolRow], split: str, name: PreferencesName) -> Iterator[Row]:
    """Two comparisons per prompt that share no reply; no two dimensions compare the same replies.

    P(first preferred) = sigmoid((r_first - r_second) / temperature).
    """
    for number, row in enumerate(rows):
        for part, places in enumerate(MATCHES[name.dimension]):
            if max(places) >= len(row.replies):
                continue
            first, second = (row.replies[place] for place in places)
            row_id = f"{split}-{number:05}-{part}"
            gold = [text_rewards(row.prompt, text) for text in (first, second)]
            rewards = [each[name.dimension] for each in gold]
            won, lost = _order(rewards, name, f"pair/{row_id}")
            texts = (first, second)
            yield {
                **_about(row_id, row.prompt, name),
                "chosen": texts[won],
                "rejected": texts[lost],
                "chosen_gold": gold[won],
                "rejected_gold": gold[lost],
            }


def ranked(rows: Sequence[PoolRow], split: str, name: PreferencesName) -> Iterator[Row]:
    """All replies to a prompt with their ranks, 0 the best, by Plackett-Luce."""
    for number, row in enumerate(rows):
        row_id = f"{split}-{number:05}"
        gold = [text_rewards(row.prompt, text) for text in row.replies]
        order = _order([each[name.dimension] for each in gold], name, f"list/{row_id}")
        ranking = [order.index(position) for position in range(len(row.replies))]
        yield {
            **_about(row_id, row.prompt, name),
            "responses": list(row.replies),
            "ranking": ranking,
            "gold": gold,
        }


def best_of_n(rows: Sequence[PoolRow], split: str, name: PreferencesName) -> Iterator[Row]:
    """All replies to a prompt and the number of the best one: the winner of `ranked`."""
    for row in ranked(rows, split, name):
        row["best"] = row.pop("ranking").index(0)
        yield row


BY_KIND: dict[str, Callable[[Sequence[PoolRow], str, PreferencesName], Iterator[Row]]] = {
    "pairs": pairs,
    "best_of_n": best_of_n,
    "ranked": ranked,
}
"""Every kind of `names.KINDS`."""


def _about(row_id: str, prompt: Prompt, name: PreferencesName) -> Row:
    return {
        "id": row_id,
        "prompt": prompt.text,
        "dimension": name.dimension,
        "problem": prompt.problem,
        "item": prompt.item,
    }


def _order(rewards: Sequence[float], name: PreferencesName, row: str) -> list[int]:
    """Positions from the best to the worst: Plackett-Luce by Gumbel noise, which for two is Bradley-Terry."""
    random = Random(f"{name.seed}/{name.dimension}/{row}")
    noise = [-math.log(-math.log(random.random() or 0.5)) for _ in rewards]
    # A multiple of reward / temperature + noise, whose order is the same down to temperature 0. Where no noise is
    # left in the labels, it still decides ties.
    keys = [(reward + name.temperature * each, each) for reward, each in zip(rewards, noise, strict=True)]
    return sorted(range(len(rewards)), key=lambda position: keys[position], reverse=True)
