"""How figures are named, written and explained on the pages of `prefopt eval` and `prefopt compare`."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

NOTHING = "–"
"""Where a figure is not defined or not known."""

SCORES = {
    "reward": "reward",
    "log_ratio": "log-ratio to the reference",
    "logp": "log-probability",
    "logp_per_token": "log-probability per token",
}

FIGURES = {
    "Accuracy": {
        "accuracy/reward": "by reward",
        "accuracy/log_ratio": "by log-ratio to the reference",
        "accuracy/logp": "by log-probability",
        "accuracy/logp_per_token": "by log-probability per token",
        "reference/accuracy/logp": "reference, by log-probability",
        "length_only": "length alone",
        "majority": "majority",
    },
    "Difference in accuracy, in points": {
        "gain/accuracy/logp": "policy - reference, by log-probability",
        "gain/length_only": "policy - length alone",
    },
    "Pairs in another order than the reference's": {
        "flipped": "all",
        "flipped/to_chosen": "chosen now first",
        "flipped/to_rejected": "rejected now first",
    },
    "Margin, chosen - rejected": {
        "margin/reward": "reward",
        "margin/log_ratio": "log-ratio to the reference, nats",
        "margin/logp": "log-probability, nats",
        "margin/logp_per_token": "log-probability per token, nats",
        "reference/margin/logp": "reference's log-probability, nats",
        "gain/margin/logp": "policy - reference, log-probability, nats",
    },
    "Change, policy - reference, in nats": {
        "change/chosen": "log-probability of chosen",
        "change/rejected": "log-probability of rejected",
    },
    "Log-probability of a response, in nats": {
        "logp/chosen": "chosen",
        "logp/rejected": "rejected",
    },
    "Length, in tokens": {"tokens/chosen": "chosen", "tokens/rejected": "rejected"},
}
"""Group -> figure -> what it is called there."""

OTHERS = "Other figures"

GLOSSARY = {
    "pair": "A prompt with a chosen and a rejected response. A row with a list of responses gives a pair for any two "
    "responses of different rank.",
    "log-probability": "The sum over a response's tokens of their log-probabilities given the prompt, in nats. Per "
    "token: divided by the number of tokens.",
    "reward": "The implicit reward that a method trains: a scale times the policy's log-probability, with most methods "
    "less the reference's. An evaluation's page begins with the formula.",
    "log-ratio": "The policy's log-probability of a response - the reference's.",
    "accuracy": "Share of pairs in which the chosen response scores higher; a tie counts one half.",
    "margin": "Score of the chosen response - score of the rejected one, as a mean over pairs.",
    "interval": "From a bootstrap that resamples prompts: pairs of one prompt are not independent of one another. "
    "Differences are taken pair by pair, so that an interval without 0 is a difference that chance hardly explains.",
    "length alone": "The rule “the longer response wins”, or “the shorter one wins”, whichever is right more often "
    "on this set. A policy that is no better may have learned no more than length.",
    "majority": "The rule that always picks the same side, when the responses of a pair are ordered by a hash of "
    "their text: what can be had without reading.",
    "change": "The policy's log-probability - the reference's. Where that of chosen responses falls, too, "
    "probability has gone to responses that neither side of a pair shows (likelihood displacement).",
    "another order": "Pairs that policy and reference order differently by log-probability.",
    "KL": "How far a policy has moved from its reference, over replies that it samples itself, in nats per response.",
    "calibration": "A reward margin m says that the chosen response is better with probability sigma(m). Confidence is "
    "that probability, or its complement where it is below one half.",
    "ECE": "Expected calibration error: the mean distance between confidence and accuracy, over bins of confidence. "
    "Noise alone makes it greater than zero; beside it stands what a calibrated policy would rarely exceed.",
    "log loss, Brier score": "Mean of -log p and of (1 - p)², where p = sigma(m) is the probability given to the "
    "chosen response. A policy that knows nothing has 0.693 and 0.25.",
    "scale": "The factor c for which sigma(c m) fits best: 1 is calibrated, below 1 is too confident, above 1 too "
    "cautious.",
    "Kendall's tau": "Agreement of two orders, from -1 (reversed) to 1 (the same), as a mean over lists; tau-b, which "
    "allows for ties.",
    "best of n": "Share of lists in which the response with the highest score is one of the best.",
}
"""Term -> definition."""


def grouped(names: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, str]]]:
    """(group, {figure: its label}) of the figures that there are; those without a label come last."""
    known: set[str] = set()
    for group, members in FIGURES.items():
        known |= members.keys()
        if found := {name: said for name, said in members.items() if name in names}:
            yield group, found
    if rest := {name: name for name in names if name not in known}:
        yield OTHERS, rest


def is_share(name: str) -> bool:
    """Whether a figure is a share or a difference of shares."""
    return any(part in ("accuracy", "flipped", "length_only", "majority") for part in name.split("/"))


def value(estimate: Mapping[str, Any] | None, *, share: bool = False, digits: int = 2) -> str:
    """The figure without its interval."""
    return _parts(estimate, share, digits)[0] if estimate else NOTHING


def points(estimate: Mapping[str, Any] | None) -> str:
    """A difference of shares without its interval, in percentage points, with its sign."""
    shown = value(estimate, share=True).removesuffix("%")
    return f"+{shown}" if estimate and shown[0].isdigit() and float(shown) else shown


def is_difference(name: str) -> bool:
    """Whether a figure is a difference of shares, to be read in percentage points."""
    return name.startswith("gain/") and is_share(name)


def interval(estimate: Mapping[str, Any] | None, *, share: bool = False, digits: int = 2) -> str:
    """The interval in brackets."""
    if not estimate or estimate.get("low") is None or estimate.get("high") is None:
        return NOTHING
    _, low, high = _parts(estimate, share, digits)
    return f"[{low}, {high}]"


def both(estimate: Mapping[str, Any] | None, *, share: bool = False, digits: int = 2) -> str:
    """The figure and its interval, in one line."""
    if not estimate:
        return NOTHING
    return f"{value(estimate, share=share, digits=digits)} {interval(estimate, share=share, digits=digits)}"


def percent(part: float | None) -> str:
    """A share with one digit."""
    return NOTHING if part is None or not math.isfinite(part) else f"{_rounded(100 * part, 1)}%"


def number(figure: float | None, digits: int = 2) -> str:
    """A figure alone; small ones keep four digits."""
    if figure is None or not math.isfinite(figure):
        return NOTHING
    return _rounded(figure, 4 if digits == 2 and 0 < abs(figure) < 0.1 else digits)


def p_value(p: float | None) -> str:
    """Three digits, or that it is less than they can show."""
    if p is None or not math.isfinite(p):
        return NOTHING
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def count(figure: int, one: str, many: str | None = None) -> str:
    """A number with its noun."""
    return f"{figure} {one if figure == 1 else many or one + 's'}"


def method(found: Mapping[str, Any] | None) -> str:
    """A method's name and settings, in one line."""
    if not found:
        return NOTHING
    settings = [
        f"{key} {said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)}"
        for key, said in found.items()
        if key != "name" and said is not None
    ]
    return str(found.get("name", "")) + (f" ({', '.join(settings)})" if settings else "")


def _parts(estimate: Mapping[str, Any], share: bool, digits: int) -> list[str]:
    """Value, low, high, with as many digits each; the value of a share carries the sign of percent."""
    parts = [estimate.get(key) for key in ("value", "low", "high")]
    known = [part for part in parts if part is not None and math.isfinite(part)]
    if share:
        digits, known = 1, []
    elif digits == 2 and 0 < max(map(abs, known), default=0) < 0.1:
        digits = 4
    shown = [
        NOTHING
        if part is None or not math.isfinite(part)
        else _rounded(100 * part if share else part, digits)
        for part in parts
    ]
    if share and shown[0] != NOTHING:
        shown[0] += "%"
    return shown


def _rounded(figure: float, digits: int) -> str:
    """Zero has no sign."""
    return f"{round(figure, digits) + 0.0:.{digits}f}"
