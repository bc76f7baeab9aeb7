"""Verdicts to win rates: both orders, ties, what the judge does not say."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from prefopt_cli.evaluation.judges.judging import (
    NoVerdict,
    Outcome,
    Question,
    Ruling,
    Verdict,
    rule,
    tally,
)
from prefopt_cli.training.reporting import Silent

FIRST, SECOND, TIE = Verdict.FIRST, Verdict.SECOND, Verdict.TIE


class By:
    """A judge by a function of the two replies."""

    def __init__(self, decide: Callable[[str, str], Verdict | NoVerdict]) -> None:
        self.decide = decide
        self.asked: list[Question] = []

    def verdicts(self, questions: Sequence[Question], *_: Any) -> list[Verdict | NoVerdict]:
        self.asked += questions
        return [self.decide(each.first, each.second) for each in questions]

    def check(self) -> None:
        pass

    def to_dict(self) -> dict[str, Any]:
        return {}


def longer(first: str, second: str) -> Verdict:
    return TIE if len(first) == len(second) else FIRST if len(first) > len(second) else SECOND


def rulings(decide: Callable[[str, str], Verdict | NoVerdict], *pairs: tuple[str, str]) -> list[Ruling]:
    return rule(By(decide), [Question("?", *pair) for pair in pairs], Silent())


def test_every_pair_is_asked_in_both_orders() -> None:
    judge = By(longer)
    found = rule(judge, [Question("?", "aaa", "b"), Question("?", "a", "bb")], Silent())

    assert judge.asked == [
        Question("?", "aaa", "b"),
        Question("?", "b", "aaa"),
        Question("?", "a", "bb"),
        Question("?", "bb", "a"),
    ]
    assert [each.outcome for each in found] == [Outcome.WON, Outcome.LOST]
    assert all(each.agrees for each in found)


def test_swapping_the_policies_swaps_the_outcomes() -> None:
    pairs = [("aaa", "b"), ("a", "bb"), ("a", "b"), ("same", "same")]
    own = tally(rulings(longer, *pairs), range(4))
    other = tally(rulings(longer, *[pair[::-1] for pair in pairs]), range(4))

    assert (own.won, own.lost, own.tied) == (other.lost, other.won, other.tied) == (1, 1, 2)
    assert own.win_rate is not None
    assert other.win_rate is not None
    assert own.win_rate.value == other.win_rate.value == 0.5


def test_a_judge_of_positions_decides_nothing() -> None:
    found = tally(rulings(lambda *_: FIRST, ("a", "b"), ("c", "d")), [0, 1])

    assert (found.won, found.lost, found.tied, found.inconsistent, found.asked) == (0, 0, 2, 2, 2)
    assert found.first_position == 1.0
    assert found.win_rate is not None
    assert found.win_rate.value == 0.5
    assert tally(rulings(longer, ("aa", "b")), [0]).first_position == 0.5


def test_half_a_verdict_is_a_tie_and_counts_as_changed() -> None:
    found = tally(rulings(lambda first, _: FIRST if first == "a" else TIE, ("a", "b")), [0])
    assert (found.tied, found.inconsistent) == (1, 1)


def test_identical_replies_tie_without_the_judge() -> None:
    judge = By(lambda *_: FIRST)
    found = rule(judge, [Question("?", "a", "a")], Silent())

    assert judge.asked == []
    assert found == [Ruling(Outcome.TIED, asked=False)]
    counted = tally(found, [0])
    assert (counted.identical, counted.tied, counted.inconsistent, counted.asked) == (1, 1, 0, 0)
    assert counted.first_position is None


def test_what_has_no_verdict_is_counted_and_is_in_no_win_rate() -> None:
    def unsure(first: str, second: str) -> Verdict | NoVerdict:
        return NoVerdict("too hard") if "?" in first else longer(first, second)

    found = tally(rulings(unsure, ("aa", "b"), ("aa", "?"), ("aa", "c")), [0, 1, 2])

    assert (found.won, found.no_verdict, found.pairs) == (2, 1, 3)
    assert found.win_rate is not None
    assert found.win_rate.value == 1.0
    assert tally(rulings(lambda *_: NoVerdict(), ("a", "b")), [0]).win_rate is None


def test_the_interval_is_of_prompts() -> None:
    """Ten replies to each of four prompts that decide alike say no more than four."""
    pairs = [("aa", "b"), ("a", "bb"), ("aa", "b"), ("a", "bb")]
    many = tally(rulings(longer, *(pair for pair in pairs for _ in range(10))), [n // 10 for n in range(40)])
    few = tally(rulings(longer, *pairs), range(4))

    assert many.win_rate is not None
    assert few.win_rate is not None
    assert many.win_rate.value == few.win_rate.value == 0.5
    assert many.win_rate.low < 0.3
    alone = tally(rulings(longer, *(pair for pair in pairs for _ in range(10))), range(40))
    assert alone.win_rate is not None
    assert alone.win_rate.low > 0.3


def test_a_few_wins_are_no_certainty() -> None:
    found = tally(rulings(longer, *[("aa", "b")] * 4), range(4))
    assert found.win_rate is not None
    assert found.win_rate.value == 1.0
    assert found.win_rate.low < 0.7


@pytest.mark.parametrize("found", [tally([], []), tally([Ruling(Outcome.NO_VERDICT)], [0])])
def test_nothing_judged_has_no_rate(found: Any) -> None:
    told = found.to_dict()
    assert told["win_rate"] is None
    assert not any(isinstance(each, float) and math.isnan(each) for each in told.values())


def test_why_there_is_no_verdict_is_kept() -> None:
    def unsure(first: str, second: str) -> Verdict | NoVerdict:
        return NoVerdict("too hard") if first == "b" else FIRST

    (found,) = rulings(unsure, ("a", "b"))
    assert (found.outcome, found.own_first, found.own_second) == (Outcome.NO_VERDICT, FIRST, None)
    assert found.to_dict()["reason"] == "too hard"


def test_one_prompt_has_no_interval() -> None:
    found = tally(rulings(longer, ("aa", "b"), ("a", "bb"), ("aa", "b")), [0, 0, 0])
    rate = found.to_dict()["win_rate"]
    assert rate == {"value": pytest.approx(2 / 3), "low": None, "high": None}
    two = tally(rulings(longer, ("aa", "b"), ("a", "bb")), [0, 1]).to_dict()["win_rate"]
    assert two["low"] < 0.5 < two["high"]


def test_identical_replies_alone_have_no_interval_and_do_not_stand_in_for_verdicts() -> None:
    same = tally(rulings(longer, ("a", "a"), ("b", "b")), [0, 1])
    assert same.to_dict()["win_rate"] == {"value": 0.5, "low": None, "high": None}
    assert not same.failed
    failing = tally(rulings(lambda *_: NoVerdict(), ("a", "a"), ("a", "b")), [0, 1])
    assert failing.win_rate is None
    assert failing.failed


def test_a_judge_of_single_replies_has_no_bias_to_positions() -> None:
    found = rulings(longer, ("aa", "b"))
    assert "first_position" in tally(found, [0]).to_dict()
    assert "first_position" not in tally(found, [0], sees_order=False).to_dict()
