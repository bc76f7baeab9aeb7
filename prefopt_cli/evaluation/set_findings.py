"""What the figures of one policy on one set mean."""

from collections.abc import Iterator

from prefopt_cli.evaluation.figures import GAIN_LENGTH, LENGTH_ONLY, SetFigures
from prefopt_cli.evaluation.findings import (
    TOO_FEW,
    Finding,
    Weight,
    dropped_rows,
    few_prompts,
    in_order,
    percent,
    points,
    train_overlap,
)
from prefopt_cli.evaluation.scored import PER_TOKEN

OVERCONFIDENT, UNDERCONFIDENT = 0.8, 1.25
"""Scales of the margins that fit the held-out choices best; between them they are about right."""

SPREAD = 0.15
"""Between the accuracies of the best and the worst bucket of lengths."""


def findings_of(name: str, figures: SetFigures) -> list[Finding]:
    """What is worth saying of one set, what matters most first."""
    concluding = () if figures.prompts < TOO_FEW else CONCLUDING
    return in_order(
        [
            *train_overlap(name, figures.overlap, figures.prompts, figures.pairs),
            *(
                Finding(code, name, weight, text, figure, threshold)
                for rule in concluding
                for code, weight, text, figure, threshold in rule(figures)
            ),
            *dropped_rows(name, figures.scored),
            *few_prompts(name, figures.prompts),
        ]
    )


_Said = Iterator[tuple[str, Weight, str, float, float]]
"""Code, weight, text, figure, threshold."""


def _counts_tokens(of: SetFigures) -> bool:
    """Whether a score that every token lowers meets data in which longer responses are preferred."""
    return of.scored.sums_tokens and of.longer and of.figures[LENGTH_ONLY].low > 0.5


def _against_chance(of: SetFigures) -> _Said:
    accuracy = of.accuracy
    if accuracy.high < 0.5:
        said = f"The policy prefers rejected responses more often than chosen ones: accuracy {percent(accuracy)}. "
        if _counts_tokens(of):
            per_token = of.figures[f"accuracy/{PER_TOKEN}"]
            yield (
                "below_chance",
                "note",
                f"{said}Every token lowers a log-probability, and here longer responses are preferred more often; "
                f"per token the accuracy is {percent(per_token)}.",
                accuracy.value,
                0.5,
            )
            return
        yield (
            "below_chance",
            "warning",
            f"{said}Chosen and rejected may be swapped in the data, or it is about something else than the training "
            "data.",
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
            "note" if _counts_tokens(of) else "warning",
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
            "The policy orders every pair by log-probability as its reference does.",
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
    if len(of.buckets) < 2 or of.scored.sums_tokens:
        return  # it falls with every token: nothing to find out there
    best = max(of.buckets, key=lambda each: each.accuracy.value)
    worst = min(of.buckets, key=lambda each: each.accuracy.value)
    apart = best.accuracy.value - worst.accuracy.value
    if apart > SPREAD and best.accuracy.low > worst.accuracy.high:
        yield (
            "depends_on_length",
            "note",
            f"Accuracy depends on length: {percent(best.accuracy)} where chosen minus rejected is "
            f"{_range(best.low, best.high)} tokens, {percent(worst.accuracy)} where it is "
            f"{_range(worst.low, worst.high)}.",
            apart,
            SPREAD,
        )


def _confidence(of: SetFigures) -> _Said:
    if of.calibration is None or not (of.scored.reward and of.scored.reward.is_log_odds):
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


CONCLUDING = (
    _against_chance,
    _against_length,
    _displacement,
    _against_reference,
    _flips,
    _buckets,
    _confidence,
)
"""Rules that conclude something about the policy."""


def _nats(value: float) -> str:
    return f"{value:.2f} nats"


def _range(low: int, high: int) -> str:
    return f"{low:+d}" if low == high else f"{low:+d} to {high:+d}"
