"""Which of two replies is better: every pair is put to a judge in both orders, and verdicts become a win rate.

A judge that prefers whatever it sees first would otherwise decide by the order. A verdict counts where both orders
agree; else the pair is a tie.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Protocol

from prefopt_cli.data.examples import Text
from prefopt_cli.evaluation.statistics.bootstrap import Estimate, estimates, share
from prefopt_cli.training.reporting import Reporter


class Verdict(StrEnum):
    """What a judge says about two replies."""

    FIRST = "first"
    SECOND = "second"
    TIE = "tie"


class Outcome(StrEnum):
    """What became of a pair, seen from the policy's own reply."""

    WON = "won"
    LOST = "lost"
    TIED = "tied"
    NO_VERDICT = "no verdict"


VALUE = {Outcome.WON: 1.0, Outcome.TIED: 0.5, Outcome.LOST: 0.0}
"""Of a pair in the win rate; without a verdict it has none."""

_SWAPPED = {Verdict.FIRST: Verdict.SECOND, Verdict.SECOND: Verdict.FIRST, Verdict.TIE: Verdict.TIE}
_OUTCOME = {Verdict.FIRST: Outcome.WON, Verdict.SECOND: Outcome.LOST, Verdict.TIE: Outcome.TIED}


@dataclass(frozen=True)
class NoVerdict:
    """A judge has been asked and has not decided."""

    reason: str = "the judge's answers were not clear"


@dataclass(frozen=True)
class Question:
    """Two replies to one prompt, in the order in which the judge sees them."""

    prompt: Text
    first: str
    second: str


class JudgingStopped(Exception):
    """A signal came while replies were judged."""


class Judge(Protocol):
    """Whatever can say which of two replies is better."""

    def check(self) -> None:
        """Find out, before there is anything to judge, whether it can judge.

        Raises:
            PrefoptError: it cannot.
        """

    def verdicts(
        self, questions: Sequence[Question], reporter: Reporter, stopping: Callable[[], bool]
    ) -> Sequence[Verdict | NoVerdict]:
        """A verdict on each question, or why there is none.

        Raises:
            JudgingStopped: a signal came.
        """

    def to_dict(self) -> dict[str, Any]:
        """Who it is and what its verdicts took, for JSON."""


@dataclass(frozen=True)
class Ruling:
    """A pair with the verdicts on it."""

    outcome: Outcome
    own_first: Verdict | None = None
    """The verdict where the policy's own reply is shown first; None where there was none."""
    own_second: Verdict | None = None
    asked: bool = True
    """Identical replies tie without the judge."""
    reason: str | None = None
    """Why there is no verdict."""

    @property
    def agrees(self) -> bool:
        """Whether the verdict is the same in both orders."""
        return self.own_second is not None and self.own_first == _SWAPPED[self.own_second]

    @property
    def is_complete(self) -> bool:
        """Whether there is a verdict in both orders."""
        return self.own_first is not None and self.own_second is not None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "outcome": str(self.outcome)}


@dataclass(frozen=True)
class Tally:
    """What the rulings come to."""

    win_rate: Estimate | None
    """Share of pairs won, ties one half, of those with a verdict; None where there is none, or where the judge was
    asked and gave none."""
    won: int
    lost: int
    tied: int
    no_verdict: int
    identical: int
    """Of the tied: pairs of identical replies, which the judge was not asked about."""
    inconsistent: int
    """Of the tied: pairs whose verdict changed with the order."""
    asked: int
    """Pairs that the judge gave a verdict on in both orders."""
    first_position: float | None
    """Share of verdicts for one side that were for the reply shown first; 0.5 shows no bias. None where there are no
    such verdicts, or the judge sees one reply at a time."""

    @property
    def pairs(self) -> int:
        """All of them."""
        return self.won + self.lost + self.tied + self.no_verdict

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        told = {"pairs": self.pairs, **asdict(self), "win_rate": as_json(self.win_rate)}
        if self.first_position is None:
            del told["first_position"]
        return told

    @property
    def failed(self) -> bool:
        """Whether the judge was asked, and gave no verdict at all."""
        return self.no_verdict > 0 and not self.asked


def rule(
    judge: Judge,
    pairs: Sequence[Question],
    reporter: Reporter,
    stopping: Callable[[], bool] = lambda: False,
) -> list[Ruling]:
    """Have every pair judged in both orders.

    Args:
        judge: who is asked.
        pairs: the policy's own reply first.
        reporter: told of progress.
        stopping: whether a signal has asked to stop.

    Raises:
        JudgingStopped: a signal came.
    """
    asked = [number for number, pair in enumerate(pairs) if pair.first != pair.second]
    # Both orders of a pair stand side by side, so that an interrupted judging leaves whole pairs.
    questions = [
        question
        for pair in (pairs[number] for number in asked)
        for question in (pair, Question(pair.prompt, pair.second, pair.first))
    ]
    found = judge.verdicts(questions, reporter, stopping) if questions else []
    rulings = [Ruling(Outcome.TIED, asked=False)] * len(pairs)
    for place, number in enumerate(asked):
        rulings[number] = _ruling(found[2 * place], found[2 * place + 1])
    return rulings


def _ruling(own_first: Verdict | NoVerdict, own_second: Verdict | NoVerdict) -> Ruling:
    if isinstance(own_first, NoVerdict):
        other = None if isinstance(own_second, NoVerdict) else own_second
        return Ruling(Outcome.NO_VERDICT, None, other, reason=own_first.reason)
    if isinstance(own_second, NoVerdict):
        return Ruling(Outcome.NO_VERDICT, own_first, None, reason=own_second.reason)
    agreed = own_first == _SWAPPED[own_second]
    return Ruling(_OUTCOME[own_first] if agreed else Outcome.TIED, own_first, own_second)


def across(estimate: Estimate, clusters: Sequence[Hashable]) -> Estimate:
    """The estimate, without its interval (nan) where one prompt alone has nothing to say of others."""
    return estimate if len(set(clusters)) > 1 else Estimate(estimate.value, math.nan, math.nan)


def as_json(estimate: Estimate | None) -> dict[str, float | None] | None:
    """For JSON, with null where there is no interval."""
    if estimate is None:
        return None
    return {name: None if math.isnan(each) else each for name, each in estimate.to_dict().items()}


def tally(
    rulings: Sequence[Ruling],
    clusters: Sequence[Hashable],
    *,
    seed: int = 0,
    sees_order: bool = True,
) -> Tally:
    """Count the rulings; the interval resamples whole clusters.

    Pairs of identical replies alone have a rate of one half, without an interval: nothing was judged.

    Args:
        rulings: (N,) of the pairs.
        clusters: (N,) the prompt of each.
        seed: of the resampling.
        sees_order: whether the judge sees both replies, in an order.
    """
    counts = {outcome: sum(each.outcome == outcome for each in rulings) for outcome in Outcome}
    judged = [number for number, each in enumerate(rulings) if each.outcome in VALUE]
    complete = [each for each in rulings if each.is_complete]
    sided = [
        verdict
        for each in rulings
        for verdict in (each.own_first, each.own_second)
        if verdict in (Verdict.FIRST, Verdict.SECOND)
    ]
    rate = None
    fails = counts[Outcome.NO_VERDICT] > 0 and not complete
    if judged and not fails:
        values = [VALUE[rulings[number].outcome] for number in judged]
        prompts = [clusters[number] for number in judged]
        rate = across(estimates({"": share(values)}, prompts, seed=seed)[""], prompts if complete else ())
    return Tally(
        win_rate=rate,
        won=counts[Outcome.WON],
        lost=counts[Outcome.LOST],
        tied=counts[Outcome.TIED],
        no_verdict=counts[Outcome.NO_VERDICT],
        identical=sum(not each.asked for each in rulings),
        inconsistent=sum(not each.agrees for each in complete),
        asked=len(complete),
        first_position=sided.count(Verdict.FIRST) / len(sided) if sided and sees_order else None,
    )
