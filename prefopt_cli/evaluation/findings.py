"""Findings: what figures mean, in plain words, each with its figure and the threshold it passed."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from prefopt_cli.evaluation.scored import ScoredSet
from prefopt_cli.evaluation.statistics import Estimate

Weight = Literal["warning", "note", "good"]

FEW_PROMPTS, TOO_FEW = 50, 5
"""Below the one an interval is a rough guide, below the other it says nothing, and nothing is concluded from it."""

DROPPED = 0.05
"""Share of a set's rows."""

WANTED_AWAY = ("filtered by where", "beyond limit", "moved to holdout", "left out by weight", "duplicate")
"""Reasons that the user gave, and rows that are there once already."""


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


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """Warnings, then notes, then good news."""
    order: dict[Weight, int] = {"warning": 0, "note": 1, "good": 2}
    return sorted(findings, key=lambda each: order[each.weight])


def train_overlap(
    name: str, overlap: Mapping[str, int] | None, prompts: int, pairs: int, whose: str = ""
) -> Iterator[Finding]:
    """Whether prompts of a set are in the training data, too; `whose` says of which policy."""
    if overlap and overlap["prompts"]:
        yield Finding(
            "train_overlap",
            name,
            "warning",
            f"{whose}{overlap['prompts']:,} of the {prompts:,} prompts ({overlap['pairs']:,} pairs, "
            f"{overlap['pairs'] / pairs:.1%}) occur in the training data, too, so they are not held out: the figures "
            "are too good by what was learnt by heart.",
            float(overlap["prompts"]),
            0.0,
        )


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


def few_prompts(name: str, prompts: int) -> Iterator[Finding]:
    """Whether the intervals of a set are worth anything."""
    if prompts >= FEW_PROMPTS:
        return
    too_few = prompts < TOO_FEW
    only = f"Only {prompts} prompt{'' if prompts == 1 else 's'}"
    yield Finding(
        "few_prompts",
        name,
        "warning" if too_few else "note",
        f"{only}: the intervals say nothing, and nothing is concluded from them."
        if too_few
        else f"{only}: intervals are wide, and rough themselves.",
        float(prompts),
        float(TOO_FEW if too_few else FEW_PROMPTS),
    )


def percent(estimate: Estimate) -> str:
    """A share with its interval, `61.9% [54.4, 68.9]`."""
    return f"{estimate.value:.1%} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def points(estimate: Estimate) -> str:
    """A difference of shares with its interval, in percentage points: `+1.5 [-5.4, 8.6]`."""
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"
