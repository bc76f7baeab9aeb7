"""What the figures of an evaluation mean, in plain words, each with its figure and the threshold it passed."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prefopt_cli.evaluation.figures import GAIN_LENGTH, LENGTH_ONLY, SetFigures
from prefopt_cli.evaluation.scored import REWARD, ScoredSet
from prefopt_cli.evaluation.statistics import Estimate

Weight = Literal["warning", "note", "good"]

FEW_PROMPTS = 50
"""Below it an interval is a rough guide."""

OVERCONFIDENT, UNDERCONFIDENT = 0.8, 1.25
"""Scales of the margins that fit the held-out choices best; between them they are about right."""

DROPPED = 0.05
"""Share of a set's rows."""

SPREAD = 0.15
"""Between the accuracies of the best and the worst bucket of lengths."""


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing."""

    code: str
    set: str
    weight: Weight
    text: str
    figure: float
    threshold: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def findings_of(name: str, figures: SetFigures) -> list[Finding]:
    """What is worth saying of one set, what matters most first."""
    found = [
        Finding(code, name, weight, text, figure, threshold)
        for rule in (
            _overlap,
            _against_chance,
            _against_length,
            _displacement,
            _against_reference,
            _flips,
            _buckets,
            _confidence,
            _dropped,
            _few,
        )
        for code, weight, text, figure, threshold in rule(figures)
    ]
    return in_order(found)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Warnings, then notes, then good news."""
    order: dict[Weight, int] = {"warning": 0, "note": 1, "good": 2}
    return sorted(findings, key=lambda each: order[each.weight])


_Said = Iterator[tuple[str, Weight, str, float, float]]
"""Code, weight, text, figure, threshold."""


def _overlap(of: SetFigures) -> _Said:
    if of.overlap and of.overlap["prompts"]:
        share = of.overlap["pairs"] / of.pairs
        yield (
            "train_overlap",
            "warning",
            f"{of.overlap['prompts']:,} of the {of.prompts:,} prompts ({of.overlap['pairs']:,} pairs, {share:.1%}) "
            "occur in the training data, too, so they are not held out: the figures are too good by what was learnt by "
            "heart.",
            float(of.overlap["prompts"]),
            0.0,
        )


def _against_chance(of: SetFigures) -> _Said:
    accuracy = of.accuracy
    if accuracy.high < 0.5:
        yield (
            "below_chance",
            "warning",
            f"The policy prefers the rejected response more often than the chosen one: accuracy {percent(accuracy)}. "
            "Chosen and rejected may be swapped in the data, or it is about something else than the training data.",
            accuracy.value,
            0.5,
        )
    elif not accuracy.excludes(0.5):
        yield (
            "at_chance",
            "warning",
            f"Accuracy {percent(accuracy)} cannot be told from guessing (50 %).",
            accuracy.value,
            0.5,
        )


def _against_length(of: SetFigures) -> _Said:
    gain, baseline = of.figures[GAIN_LENGTH], of.figures[LENGTH_ONLY]
    rule = "longer" if of.longer else "shorter"
    told = f"always taking the {rule} response gets {percent(baseline)}"
    if gain.low > 0:
        yield (
            "above_length_only",
            "good",
            f"Accuracy {percent(of.accuracy)} is more than length explains: {told}.",
            gain.value,
            0.0,
        )
    else:
        less = "is below" if gain.high < 0 else "is not above"
        yield (
            "not_above_length_only",
            "warning",
            f"Accuracy {percent(of.accuracy)} {less} what length alone gives: {told} "
            f"(difference {points(gain)} points).",
            gain.value,
            0.0,
        )


def _displacement(of: SetFigures) -> _Said:
    if of.scored.reference is None:
        return
    chosen, grown = of.figures["change/chosen"], of.figures["gain/margin/logp"]
    if chosen.high < 0 and grown.low > 0:
        yield (
            "likelihood_displacement",
            "warning",
            f"Chosen responses lost {_nats(-chosen.value)} of log-probability on average while the margin grew by "
            f"{_nats(grown.value)}: the policy mostly learnt what to avoid, and part of the probability went to "
            "responses that are neither (likelihood displacement). A lower learning rate, a higher beta or fewer steps "
            "keep more of it.",
            chosen.value,
            0.0,
        )


def _against_reference(of: SetFigures) -> _Said:
    if of.scored.reference is None:
        return
    gain = of.figures["gain/accuracy/logp"]
    before, after = of.figures["reference/accuracy/logp"], of.figures["accuracy/logp"]
    told = f"accuracy by log-probability {percent(after)}, the reference's {percent(before)}"
    if gain.high < 0:
        yield (
            "worse_than_reference",
            "warning",
            f"The policy tells chosen from rejected worse than its reference: {told} ({points(gain)} points).",
            gain.value,
            0.0,
        )
    elif not gain.excludes(0.0):
        yield (
            "like_reference",
            "note",
            f"No difference to the reference is certain: {told}; the interval of the difference, {points(gain)} "
            "points, includes 0.",
            gain.value,
            0.0,
        )
    else:
        yield (
            "better_than_reference",
            "good",
            f"Better than the reference: {told} ({points(gain)} points).",
            gain.value,
            0.0,
        )


def _flips(of: SetFigures) -> _Said:
    if of.scored.reference is None:
        return
    right, wrong = of.figures["flipped/to_chosen"], of.figures["flipped/to_rejected"]
    if right.value + wrong.value == 0:
        yield (
            "nothing_flipped",
            "note",
            "The policy orders every pair by log-probability as its reference does: it hardly moved.",
            0.0,
            0.0,
        )
    elif wrong.value >= right.value:
        yield (
            "flips_to_rejected",
            "note",
            f"Of the pairs that the policy orders otherwise than its reference, no fewer went to the rejected response "
            f"({wrong.value:.1%} of all pairs) than to the chosen one ({right.value:.1%}).",
            wrong.value,
            right.value,
        )


def _buckets(of: SetFigures) -> _Said:
    if len(of.buckets) < 2 or of.scored.main != REWARD:
        return  # a log-probability falls with every token: nothing to find out there
    best = max(of.buckets, key=lambda each: each.accuracy.value)
    worst = min(of.buckets, key=lambda each: each.accuracy.value)
    apart = best.accuracy.value - worst.accuracy.value
    if apart > SPREAD and best.accuracy.low > worst.accuracy.high:
        yield (
            "depends_on_length",
            "note",
            f"Accuracy depends on length: {percent(best.accuracy)} where chosen is {_range(best.low, best.high)} "
            f"tokens longer than rejected, {percent(worst.accuracy)} where it is {_range(worst.low, worst.high)}.",
            apart,
            SPREAD,
        )


def _confidence(of: SetFigures) -> _Said:
    if of.calibration is None:
        return
    scale = of.calibration.scale
    if scale.high < OVERCONFIDENT:
        yield (
            "overconfident",
            "warning",
            f"Margins are too large for how often they are right: multiplied by {scale.value:.2f} "
            f"[{scale.low:.2f}, {scale.high:.2f}] they would fit the held-out choices best (expected calibration error "
            f"{of.calibration.ece.value:.1%}). As probabilities or rewards they overstate.",
            scale.value,
            OVERCONFIDENT,
        )
    elif scale.low > UNDERCONFIDENT:
        yield (
            "underconfident",
            "note",
            f"Margins are small for how often they are right: multiplied by {scale.value:.1f} "
            f"[{scale.low:.1f}, {scale.high:.1f}] they would fit the held-out choices best. The policy could be "
            "trained further, or with a lower beta.",
            scale.value,
            UNDERCONFIDENT,
        )


def _dropped(of: SetFigures) -> _Said:
    for each in dropped_rows("", of.scored):
        yield each.code, each.weight, each.text, each.figure, each.threshold


def dropped_rows(name: str, scored: ScoredSet) -> Iterator[Finding]:
    """Whether many rows of a set were left out, for other reasons than that the user wanted it so."""
    dropped = {
        reason: count for reason, count in scored.held_out.dropped.items() if reason not in WANTED_AWAY
    }
    share = sum(dropped.values()) / (len(scored.prompts) + sum(dropped.values()))
    if share > DROPPED:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
        yield Finding(
            "dropped_rows",
            name,
            "warning",
            f"{share:.1%} of the rows could not be scored ({reasons}); the figures are about the others.",
            share,
            DROPPED,
        )


def _few(of: SetFigures) -> _Said:
    if of.prompts < FEW_PROMPTS:
        yield (
            "few_prompts",
            "note",
            f"Only {of.prompts} prompts: intervals are wide, and rough themselves.",
            float(of.prompts),
            float(FEW_PROMPTS),
        )


WANTED_AWAY = ("filtered by where", "beyond limit", "moved to holdout", "left out by weight", "duplicate")
"""Reasons that the user gave, and rows that are there once already."""


def percent(estimate: Estimate) -> str:
    """A share with its interval, `61.9% [54.4, 68.9]`."""
    return f"{estimate.value:.1%} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def points(estimate: Estimate) -> str:
    """A difference of shares with its interval, in percentage points: `+1.5 [-5.4, 8.6]`."""
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def _nats(value: float) -> str:
    return f"{value:.2f} nats"


def _range(low: int, high: int) -> str:
    return f"{low:+d}" if low == high else f"{low:+d} to {high:+d}"
