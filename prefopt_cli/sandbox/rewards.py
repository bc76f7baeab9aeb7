"""The gold rewards: what a reply is truly worth, by code.

All are in units of log-odds: under Bradley-Terry at temperature 1, a reply that is worth 1 more is preferred in
73 of 100 comparisons.
"""

from functools import cache

import numpy as np

from prefopt_cli.sandbox.grammar import CHOICES, GRADES, ITEMS, PROBLEMS, SLOTS, Choice, Prompt, reply_text

REMEDY_POINTS, NAMING_POINTS = 3.0, 1.0
WORDS_PER_POINT = 5.0


@cache
def words(choice: Choice) -> int:
    """Number of words of a reply."""
    # All items are one word. A slot alone will not do: a full stop belongs to the word before it.
    return len(reply_text(Prompt(ITEMS[0], "", ""), choice).split())


@cache
def longest() -> int:
    """Number of words of the longest reply."""
    return max(map(words, CHOICES))


def gold_rewards(prompt: Prompt, choice: Choice) -> dict[str, float]:
    """What the reply is worth as an answer to ``prompt``, by dimension.

    helpful: 3 x grade of the remedy + 1 for the item's name + promptness; polite: the sum of its sentences'
    politeness; concise: (longest reply's words - own words) / 5.
    """
    options = [slot[number] for slot, number in zip(SLOTS, choice, strict=True)]
    grade = sum(GRADES[prompt.problem][option.remedy] for option in options if option.remedy)
    named = any(option.names_item for option in options)
    helpful = REMEDY_POINTS * grade + NAMING_POINTS * named + sum(option.promptness for option in options)
    return {
        "helpful": round(helpful, 6),
        "polite": round(sum(option.politeness for option in options), 6),
        "concise": (longest() - words(choice)) / WORDS_PER_POINT,
    }


@cache
def reward_range(dimension: str) -> tuple[float, float]:
    """The least and the most that a well-formed reply can be worth."""
    found = [
        gold_rewards(Prompt("", problem, ""), choice)[dimension] for problem in PROBLEMS for choice in CHOICES
    ]
    return min(found), max(found)


def malformed_reward(dimension: str) -> float:
    """What a text is worth that is no reply at all: one point less than the worst reply."""
    return reward_range(dimension)[0] - 1.0


@cache
def reward_table(problem: str, dimension: str) -> np.ndarray:
    """(2304,) float64: the gold reward of every well-formed reply to a prompt with this problem."""
    prompt = Prompt("", problem, "")
    table = np.array([gold_rewards(prompt, choice)[dimension] for choice in CHOICES])
    table.setflags(write=False)
    return table
