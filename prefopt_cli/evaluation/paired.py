"""One held-out set under several policies: what each gets right, and how far it is from the first, pair by pair."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from prefopt_cli.data.examples import plain_text
from prefopt_cli.errors import UserError
from prefopt_cli.evaluation.figures import pair_quantities, won
from prefopt_cli.evaluation.scored import LOGP, REWARD, ScoredSet
from prefopt_cli.evaluation.statistics.bootstrap import Estimate, estimates, mean
from prefopt_cli.evaluation.statistics.calibration import Calibration, calibration
from prefopt_cli.evaluation.statistics.significance import holm, paired_p_value

MEASURES = ("accuracy/main", "accuracy/logp", "margin/main", "margin/logp")
"""What is compared, pair by pair; the margin of the main score only where it is the same thing for all."""

Decode = Callable[[Sequence[int]], str]

SHOWN = 20
"""Pairs that changed sides, for each policy in a report."""


@dataclass(frozen=True)
class Difference:
    """A policy minus the first one, over the same pairs."""

    estimate: Estimate
    p: float
    """Two-sided, prompts permuted."""
    p_holm: float
    """Adjusted for all policies and sets of the comparison."""

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return {**self.estimate.to_dict(), "p": self.p, "p_holm": self.p_holm}


@dataclass(frozen=True)
class Change:
    """A pair that another policy orders otherwise than the first one."""

    row: int
    responses: tuple[int, int]
    """Places of chosen and rejected in the row."""
    to: str
    """chosen or rejected."""
    baseline_margin: float
    margin: float


@dataclass(frozen=True)
class PairedSet:
    """One set under all policies."""

    name: str
    main: str
    """The score that all are compared by: the implicit reward where every policy has one, else the log-probability."""
    margin: str
    """The score whose margins are the same thing for all: the main one where all rewards are alike."""
    scored: dict[str, ScoredSet]
    """By label, the first one's first: all of the same pairs."""
    figures: dict[str, dict[str, Estimate]]
    """By label."""
    calibration: dict[str, Calibration]
    """By label, where there is an implicit reward."""
    differences: dict[str, dict[str, Difference]]
    """By label and measure; not of the first one."""
    changes: dict[str, tuple[Change, ...]]
    """By label; not of the first one. The largest change first."""
    left_out: int
    """Rows that not every policy could be asked about."""

    @property
    def prompts(self) -> int:
        """How many there are."""
        return len(set(self.first.prompts.tolist()))

    @property
    def first(self) -> ScoredSet:
        """Under the first policy."""
        return next(iter(self.scored.values()))

    def change_records(self, label: str, decode: Decode, limit: int | None = None) -> list[dict[str, Any]]:
        """The pairs that changed sides, with their texts, for JSON; `decode` turns tokens into text."""
        rows = self.first.held_out
        found = []
        for change in self.changes[label][:limit]:
            row = rows.tokens[change.row]
            chosen, rejected = (row["response_ids"][place] for place in change.responses)
            found.append(
                {
                    "set": self.name,
                    "id": row["row_id"],
                    "policy": label,
                    "to": change.to,
                    "baseline_margin": change.baseline_margin,
                    "margin": change.margin,
                    "prompt": plain_text(rows.texts[row["row_id"]].prompt),
                    "chosen": decode(chosen),
                    "rejected": decode(rejected),
                }
            )
        return found


def paired_set(name: str, scored: Mapping[str, ScoredSet], *, seed: int = 0) -> PairedSet:
    """A set under several policies.

    Args:
        name: of the set.
        scored: by label, the first policy's first.
        seed: of the resampling.

    Raises:
        UserError: no row is left that all policies could be asked about.
    """
    aligned, left_out = _aligned(name, scored)
    first, *others = aligned.items()
    quantities = {
        f"{label}|{figure}": quantity
        for label, each in aligned.items()
        for figure, quantity in pair_quantities(each).items()
    }
    main = REWARD if all(each.reward for each in aligned.values()) else LOGP
    same = main == LOGP or len({each.reward for each in aligned.values()}) == 1
    apart = {label: _apart(first[1], each, main, same=same) for label, each in others}
    quantities |= {
        f"{label}|difference {measure}": mean(values)
        for label, measures in apart.items()
        for measure, values in measures.items()
    }
    clusters = first[1].clusters
    found = estimates(quantities, clusters, seed=seed)
    return PairedSet(
        name=name,
        main=main,
        margin=main if same else LOGP,
        scored=aligned,
        figures={
            label: {figure: found[f"{label}|{figure}"] for figure in pair_quantities(each)}
            for label, each in aligned.items()
        },
        calibration={
            label: calibration(each.margins(each.scores[REWARD]), clusters, seed=seed)
            for label, each in aligned.items()
            if each.reward
        },
        differences={
            label: {
                measure: Difference(
                    found[f"{label}|difference {measure}"],
                    p := paired_p_value(values, clusters, seed=seed),
                    p,
                )
                for measure, values in measures.items()
            }
            for label, measures in apart.items()
        },
        changes={label: _changes(first[1], each, main) for label, each in others},
        left_out=left_out,
    )


def adjusted(sets: Mapping[str, PairedSet]) -> dict[str, PairedSet]:
    """The sets with p-values adjusted by Holm's procedure, for each measure over all policies and sets."""
    places = [
        (measure, name, label)
        for measure in MEASURES
        for name, each in sets.items()
        for label, found in each.differences.items()
        if measure in found
    ]
    p_values: dict[tuple[str, str, str], float] = {}
    for measure in MEASURES:
        own = [place for place in places if place[0] == measure]
        raw = [sets[name].differences[label][measure].p for _, name, label in own]
        p_values |= dict(zip(own, holm(raw), strict=True)) if own else {}
    return {
        name: replace(
            each,
            differences={
                label: {
                    measure: replace(difference, p_holm=p_values[measure, name, label])
                    for measure, difference in found.items()
                }
                for label, found in each.differences.items()
            },
        )
        for name, each in sets.items()
    }


def _aligned(name: str, scored: Mapping[str, ScoredSet]) -> tuple[dict[str, ScoredSet], int]:
    """Every policy's scores of the rows that all were asked about in full, and how many others there are."""
    if len({each.held_out.fingerprint for each in scored.values()}) == 1:  # the same tokens in the same order
        return dict(scored), 0
    full = {label: _full_rows(each) for label, each in scored.items()}
    first = next(iter(full.values()))
    every = {row for each in scored.values() for row in each.held_out.ids}
    common = [row for row in first if all(row in each for each in full.values())]
    if not common:
        raise UserError(f"eval set {name}: no row is left that all policies can be asked about.")
    aligned = {}
    for label, each in scored.items():
        aligned[label] = each.select([full[label][row] for row in common])
    return aligned, len(every) - len(common)


def _full_rows(scored: ScoredSet) -> dict[str, int]:
    """By id, the places of the rows of which no response was too long for the policy."""
    texts = scored.held_out.texts
    found = zip(scored.held_out.ids, scored.row_ranks, strict=True)
    return {row: place for place, (row, ranks) in enumerate(found) if ranks == tuple(texts[row].ranks)}


def _apart(first: ScoredSet, other: ScoredSet, main: str, *, same: bool) -> dict[str, np.ndarray]:
    """By measure, (P,) the other policy minus the first."""
    own = [each.margins(each.scores[main]) for each in (other, first)]
    logp = [each.margins(each.scores[LOGP]) for each in (other, first)]
    found = {
        "accuracy/main": won(own[0]) - won(own[1]),
        "accuracy/logp": won(logp[0]) - won(logp[1]),
        "margin/logp": logp[0] - logp[1],
    }
    if same:
        found["margin/main"] = own[0] - own[1]
    return found


def _changes(first: ScoredSet, other: ScoredSet, main: str) -> tuple[Change, ...]:
    before, after = (each.margins(each.scores[main]) for each in (first, other))
    places = np.flatnonzero(before * after < 0)
    starts = first.row_starts[first.pair_rows]
    found = [
        Change(
            row=int(first.pair_rows[place]),
            responses=(int(first.chosen[place] - starts[place]), int(first.rejected[place] - starts[place])),
            to="chosen" if after[place] > 0 else "rejected",
            baseline_margin=float(before[place]),
            margin=float(after[place]),
        )
        for place in places
    ]
    return tuple(sorted(found, key=lambda each: -abs(each.margin - each.baseline_margin)))
