"""Gold rewards, against arithmetic written out by hand and against brute force."""

import itertools

import numpy as np
import pytest

from prefopt_cli.sandbox.facts import conflict_share
from prefopt_cli.sandbox.grammar import CHOICES, ITEMS, PROBLEMS, Prompt, parse_reply
from prefopt_cli.sandbox.names import DIMENSIONS
from prefopt_cli.sandbox.preferences import text_rewards
from prefopt_cli.sandbox.rewards import gold_rewards, malformed_reward, reward_range, reward_table

CONFLICTING = 0.40

LONGEST = 39
"""Words of: Good morning and thank you for your message. (8) We are very sorry for the trouble. (7) We will send the
missing part of your order (9) within two days. (3) Please let us know if we can do anything else for you. (12)"""


@pytest.mark.parametrize(
    ("problem", "reply", "helpful", "polite", "words"),
    [
        # Right remedy 3 x 1.0, item named + 1; nothing polite; We will trace your lamp. = 5 words.
        ("late", " We will trace your lamp.", 3.0 + 1.0, 0.0, 5),
        # The same without the item.
        ("late", " We will trace your order.", 3.0, 0.0, 5),
        # 3 x 0.5 + 1 + 0.3; 0.4 + 0.5; 1 + 3 + 6 words.
        ("late", " Hello. Sorry about that. We will refund your lamp soon.", 1.5 + 1.0 + 0.3, 0.4 + 0.5, 10),
        # 3 x 0.6 + 1 + 0.3: the same reply to another problem.
        ("broken", " Hello. Sorry about that. We will refund your lamp soon.", 1.8 + 1.0 + 0.3, 0.9, 10),
        # As useless and as rude as can be: 0; -0.8 - 1.0 - 1.2; 4 + 6 + 10 + 6 words.
        (
            "late",
            " What is it now? You should have been more careful. We will explain how to use your order."
            " Do not write to us again.",
            0.0,
            -0.8 - 1.0 - 1.2,
            4 + 6 + 8 + 6,
        ),
        # As kind and as long as can be: 3 x 1.0 + 0.8; 1.0 + 1.0 + 1.2.
        (
            "incomplete",
            " Good morning and thank you for your message. We are very sorry for the trouble. We will send the missing"
            " part of your order within two days. Please let us know if we can do anything else for you.",
            3.0 + 0.8,
            3.2,
            LONGEST,
        ),
    ],
)
def test_by_hand(problem: str, reply: str, helpful: float, polite: float, words: int) -> None:
    assert len(reply.split()) == words
    prompt = Prompt("lamp", problem, "")
    expected = {"helpful": helpful, "polite": polite, "concise": (LONGEST - words) / 5}
    assert text_rewards(prompt, reply) == pytest.approx(expected)
    choice = parse_reply(prompt, reply)
    assert choice is not None
    assert gold_rewards(prompt, choice) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("dimension", "least", "most"),
    [("helpful", 0.0, 3 + 1 + 0.8), ("polite", -3.0, 3.2), ("concise", 0.0, (LONGEST - 6 + 1) / 5)],
)
def test_ranges_by_hand(dimension: str, least: float, most: float) -> None:
    # The shortest reply, We will refund your lamp., has five words.
    assert reward_range(dimension) == pytest.approx((least, most))


def test_items_count_one_word() -> None:
    """Conciseness counts the words of a reply without looking at its item."""
    assert all(len(item.split()) == 1 for item in ITEMS)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_rewards_are_degrees(dimension: str) -> None:
    for problem in PROBLEMS:
        table = reward_table(problem, dimension)
        levels = len(set(table.round(6)))
        assert levels >= 15
        # No single value stands for most replies.
        assert max(np.unique(table.round(6), return_counts=True)[1]) < len(table) / 5


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_table_agrees_with_the_function(problem: str, dimension: str) -> None:
    table = reward_table(problem, dimension)
    assert table.shape == (len(CHOICES),)
    for item in ("lamp", "wardrobe"):
        prompt = Prompt(item, problem, "")
        assert table.tolist() == [gold_rewards(prompt, choice)[dimension] for choice in CHOICES]
    with pytest.raises(ValueError, match="read-only"):
        table[0] = 1.0


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("text", ["", " Hello.", "We will refund your lamp.", " We will refund your clock."])
def test_malformed_text_is_worth_less_than_the_worst_reply(dimension: str, text: str) -> None:
    worth = text_rewards(Prompt("lamp", "late", ""), text)[dimension]
    assert worth == malformed_reward(dimension)
    assert worth < min(reward_table(problem, dimension).min() for problem in PROBLEMS)


@pytest.mark.parametrize("dimensions", list(itertools.combinations(DIMENSIONS, 2)))
def test_conflicts_over_all_replies(dimensions: tuple[str, str]) -> None:
    """Brute force over all pairs of replies, not by levels as in `facts`."""
    shares = []
    for problem in PROBLEMS:
        first, second = (reward_table(problem, dimension) for dimension in dimensions)
        opposed = np.sign(np.subtract.outer(first, first).round(6)) * np.sign(
            np.subtract.outer(second, second).round(6)
        )
        shares.append(np.mean(opposed[np.triu_indices(len(first), 1)] < 0))
    share = float(np.mean(shares))
    assert share > CONFLICTING
    assert conflict_share(*dimensions) == pytest.approx(share)


def test_politeness_costs_words() -> None:
    """polite and concise conflict more often than they agree, which chance alone would not do."""
    polite, concise = reward_table("late", "polite"), reward_table("late", "concise")
    assert np.corrcoef(polite, concise)[0, 1] < -0.1
    assert conflict_share("polite", "concise") > 0.5
