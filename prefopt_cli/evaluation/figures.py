"""What a scored set of preferences says of a policy: every figure with its interval."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from prefopt_cli.evaluation.scored import REWARD, ScoredSet
from prefopt_cli.evaluation.statistics import Estimate, ranking
from prefopt_cli.evaluation.statistics.bootstrap import Quantity, estimates, mean, share
from prefopt_cli.evaluation.statistics.calibration import Calibration, calibration

BUCKETS = 5
"""Buckets of the difference in length, of about equal size."""

FEWEST = 5
"""Pairs; a bucket with less is not worth a row of its own."""


@dataclass(frozen=True)
class Bucket:
    """Pairs whose responses differ in length by about the same."""

    low: int
    high: int
    """Chosen minus rejected, in tokens, both inclusive."""
    pairs: int
    prompts: int
    accuracy: Estimate
    length_only: Estimate

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "from": self.low,
            "to": self.high,
            "pairs": self.pairs,
            "prompts": self.prompts,
            "accuracy": self.accuracy.to_dict(),
            "length_only": self.length_only.to_dict(),
        }


@dataclass(frozen=True)
class Ranking:
    """How well whole lists are ordered."""

    rows: int
    responses: int
    kendall_tau: dict[str, Estimate]
    """By score; tau-b, the mean over rows. Without scores that are equal throughout every row, which order nothing."""
    best_of_n: dict[str, Estimate]
    """By score; share of rows whose highest score is a best response."""
    chance: float
    """What a score that knows nothing would hit."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rows": self.rows,
            "responses": self.responses,
            "kendall_tau": _plain(self.kendall_tau),
            "best_of_n": _plain(self.best_of_n),
            "best_of_n_chance": self.chance,
        }


@dataclass(frozen=True)
class SetFigures:
    """One set; what the names mean is said in docs/evaluation.md."""

    scored: ScoredSet
    figures: dict[str, Estimate]
    longer: bool
    """Whether the better rule by length alone prefers the longer response."""
    calibration: Calibration | None
    buckets: tuple[Bucket, ...]
    ranking: Ranking | None
    overlap: dict[str, int] | None
    """Prompts and pairs that the training data has, too; None: not known."""
    notes: tuple[str, ...] = field(default=())

    @property
    def pairs(self) -> int:
        return len(self.scored.chosen)

    @property
    def prompts(self) -> int:
        return len(set(self.scored.prompts.tolist()))

    @property
    def accuracy(self) -> Estimate:
        """By the main score."""
        return self.figures[f"accuracy/{self.scored.main}"]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        own = {name: value for name, value in self.figures.items() if not name.startswith(BASELINES)}
        return {
            "data": self.scored.held_out.fingerprint,
            "rows": len(self.scored.prompts),
            "pairs": self.pairs,
            "prompts": self.prompts,
            "lists": self.ranking.rows if self.ranking else 0,
            "dropped": self.scored.held_out.dropped,
            "train_overlap": self.overlap,
            "main": self.scored.main,
            "figures": _plain(own),
            "baselines": {
                "length_only": {
                    "rule": "longer" if self.longer else "shorter",
                    "accuracy": self.figures[LENGTH_ONLY].to_dict(),
                },
                "majority": {"accuracy": self.figures[MAJORITY].to_dict()},
                "gain/length_only": self.figures[GAIN_LENGTH].to_dict(),
            },
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "by_length": [bucket.to_dict() for bucket in self.buckets],
            "ranking": self.ranking.to_dict() if self.ranking else None,
            "notes": list(self.notes),
        }


BASELINES = "baseline/"
LENGTH_ONLY, MAJORITY, GAIN_LENGTH = (
    f"{BASELINES}{name}" for name in ("length_only", "majority", "gain_length")
)


def figures_of(
    scored: ScoredSet, trained_on: Collection[bytes] | None, notes: tuple[str, ...] = (), *, seed: int = 0
) -> SetFigures:
    """All figures of a set.

    Args:
        scored: the set with its scores.
        trained_on: digests of the prompts that the policy was trained on; None: not known.
        notes: what the reader has to know.
        seed: of the resampling.
    """
    longer_wins = won(scored.margins(scored.tokens))
    longer = bool(longer_wins.mean() >= 0.5)
    by_length = longer_wins if longer else 1 - longer_wins
    quantities = {**pair_quantities(scored), **_baselines(scored, by_length)}
    return SetFigures(
        scored=scored,
        figures=estimates(quantities, scored.clusters, seed=seed),
        longer=longer,
        calibration=(
            calibration(scored.margins(scored.scores[REWARD]), scored.clusters, seed=seed)
            if scored.reward
            else None
        ),
        buckets=_buckets(scored, by_length, seed),
        ranking=_ranking(scored, seed),
        overlap=overlap_of(scored, trained_on),
        notes=notes,
    )


def won(margins: np.ndarray) -> np.ndarray:
    """(P,) 1 above zero, 0 below, one half at zero."""
    found: np.ndarray = (np.sign(margins) + 1) / 2
    return found


def pair_quantities(scored: ScoredSet) -> dict[str, Quantity]:
    """By name, what is said of pairs; see docs/evaluation.md."""
    found = {}
    for name, values in scored.scores.items():
        margins = scored.margins(values)
        found[f"accuracy/{name}"] = share(won(margins))
        found[f"margin/{name}"] = mean(margins)
    found["logp/chosen"] = mean(scored.logps[scored.chosen])
    found["logp/rejected"] = mean(scored.logps[scored.rejected])
    found["tokens/chosen"] = mean(scored.tokens[scored.chosen])
    found["tokens/rejected"] = mean(scored.tokens[scored.rejected])
    if scored.reference is None:
        return found
    own, its = scored.margins(scored.logps), scored.margins(scored.reference)
    change = scored.logps - scored.reference
    to_chosen, to_rejected = (its < 0) & (own > 0), (its > 0) & (own < 0)
    return {
        **found,
        "change/chosen": mean(change[scored.chosen]),
        "change/rejected": mean(change[scored.rejected]),
        "reference/accuracy/logp": share(won(its)),
        "reference/margin/logp": mean(its),
        "gain/accuracy/logp": mean(won(own) - won(its)),
        "gain/margin/logp": mean(own - its),
        "flipped": share(to_chosen | to_rejected),
        "flipped/to_chosen": share(to_chosen),
        "flipped/to_rejected": share(to_rejected),
    }


def _baselines(scored: ScoredSet, by_length: np.ndarray) -> dict[str, Quantity]:
    first = scored.first_listed
    majority = first if first.mean() >= 0.5 else ~first
    main = won(scored.margins(scored.scores[scored.main]))
    return {
        LENGTH_ONLY: share(by_length),
        MAJORITY: share(majority),
        GAIN_LENGTH: mean(main - by_length),
    }


def _buckets(scored: ScoredSet, by_length: np.ndarray, seed: int) -> tuple[Bucket, ...]:
    """Pairs by the difference of their lengths; differences that many pairs have stay together."""
    differences = scored.margins(scored.tokens).astype(int)
    places = np.searchsorted(_bucket_ends(differences), differences)
    main = won(scored.margins(scored.scores[scored.main]))
    masks = {number: places == number for number in np.unique(places).tolist()}
    quantities: dict[str, Quantity] = {}
    for number, mask in masks.items():
        quantities[f"accuracy {number}"] = share(main, mask)
        quantities[f"length {number}"] = share(by_length, mask)
    found = estimates(quantities, scored.clusters, seed=seed)
    return tuple(
        Bucket(
            low=int(differences[mask].min()),
            high=int(differences[mask].max()),
            pairs=int(mask.sum()),
            prompts=len(np.unique(scored.clusters[mask])),
            accuracy=found[f"accuracy {number}"],
            length_only=found[f"length {number}"],
        )
        for number, mask in masks.items()
    )


def _bucket_ends(differences: np.ndarray) -> list[int]:
    """The largest difference of each bucket, ascending. What would be a small bucket is part of a neighbour."""
    shares = np.arange(1, BUCKETS + 1) / BUCKETS
    ends: list[int] = []
    below = 0
    for end in np.quantile(differences, shares, method="inverted_cdf").tolist():
        reached = int((differences <= end).sum())
        if reached - below >= FEWEST:
            ends.append(end)
            below = reached
    return [*ends[:-1], int(differences.max())]


def _ranking(scored: ScoredSet, seed: int) -> Ranking | None:
    sizes = np.bincount(scored.rows)
    lists = np.flatnonzero(sizes > 2)
    if not len(lists):
        return None
    starts = np.concatenate([[0], np.cumsum(sizes)])
    quantities: dict[str, Quantity] = {}
    for name, values in scored.scores.items():
        own = [(values[starts[n] : starts[n + 1]], scored.ranks[starts[n] : starts[n + 1]]) for n in lists]
        taus = np.array([ranking.kendall_tau(scores, ranks) for scores, ranks in own])
        if not np.isnan(taus).all():
            quantities[f"tau {name}"] = mean(np.nan_to_num(taus), ~np.isnan(taus))
        quantities[f"best {name}"] = share(np.array([ranking.best_hit(*each) for each in own]))
    found = estimates(quantities, scored.prompts[lists], seed=seed)
    chances = [ranking.chance_of_best(scored.ranks[starts[n] : starts[n + 1]]) for n in lists]
    return Ranking(
        rows=len(lists),
        responses=int(sizes[lists].sum()),
        kendall_tau={name: found[f"tau {name}"] for name in scored.scores if f"tau {name}" in found},
        best_of_n={name: found[f"best {name}"] for name in scored.scores},
        chance=float(np.mean(chances)),
    )


def overlap_of(scored: ScoredSet, trained_on: Collection[bytes] | None) -> dict[str, int] | None:
    """Prompts of a set, and their pairs, that are among these; None where these are not known."""
    if trained_on is None:
        return None
    known = np.array([key in trained_on for key in scored.held_out.prompt_keys()])
    return {
        "prompts": len(np.unique(scored.prompts[known])),
        "pairs": int(known[scored.pair_rows].sum()),
    }


def _plain(figures: Mapping[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: value.to_dict() for name, value in figures.items()}
