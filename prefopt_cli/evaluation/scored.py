"""A held-out set with the log-probabilities of its responses, and the pairs that they make."""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset

from prefopt_cli.evaluation.held_out import HeldOutSet
from prefopt_cli.evaluation.targets import Reward

REWARD, LOG_RATIO, LOGP, PER_TOKEN = "reward", "log_ratio", "logp", "logp_per_token"


@dataclass(frozen=True)
class ScoredSet:
    """Responses of a set, one after the other, K in all; rows of the set are pairs or lists."""

    held_out: HeldOutSet
    logps: np.ndarray
    """(K,) under the policy, in nats."""
    reference: np.ndarray | None
    """(K,) under the reference, in nats."""
    tokens: np.ndarray
    """(K,) lengths."""
    rows: np.ndarray
    """(K,) the row that a response belongs to."""
    ranks: np.ndarray
    """(K,) 0 is best; equal ranks tie."""
    prompts: np.ndarray
    """(rows,) number of each row's prompt: what is resampled together."""
    reward: Reward | None

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """By name, (K,) what responses can be ordered by."""
        found = {LOGP: self.logps, PER_TOKEN: self.logps / self.tokens}
        if self.reward is None:
            return found
        own = {REWARD: self.reward.of(self.logps, self.reference, self.tokens)}
        if self.reference is not None and not self.reward.is_log_ratio:
            own[LOG_RATIO] = self.logps - self.reference
        return {**own, **found}

    @property
    def main(self) -> str:
        """The score that matters most: the implicit reward where there is one."""
        return REWARD if self.reward else LOGP

    @property
    def sums_tokens(self) -> bool:
        """Whether the main score is a sum over tokens of log-probabilities, which every further token lowers."""
        return self.reward is None or not (self.reward.relative or self.reward.per_token)

    @cached_property
    def row_starts(self) -> np.ndarray:
        """(rows,) the place of each row's first response."""
        return np.searchsorted(self.rows, np.arange(len(self.prompts)))

    @property
    def row_ranks(self) -> list[tuple[int, ...]]:
        """For every row the ranks of its responses."""
        return [tuple(part.tolist()) for part in np.split(self.ranks, self.row_starts[1:])]

    @cached_property
    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(P,) and (P,): places of chosen and rejected responses, from every row all that do not tie."""
        chosen, rejected = [], []
        for start, end in itertools.pairwise([*self.row_starts, len(self.rows)]):
            ranks = self.ranks[start:end]
            better, worse = np.nonzero(ranks[:, None] < ranks[None, :])
            chosen.append(better + start)
            rejected.append(worse + start)
        return np.concatenate(chosen), np.concatenate(rejected)

    @property
    def chosen(self) -> np.ndarray:
        """(P,) places among the K responses."""
        return self._pairs[0]

    @property
    def rejected(self) -> np.ndarray:
        """(P,) places among the K responses."""
        return self._pairs[1]

    @cached_property
    def pair_rows(self) -> np.ndarray:
        """(P,) the row that a pair is of."""
        return self.rows[self.chosen]

    @cached_property
    def clusters(self) -> np.ndarray:
        """(P,) the prompt of every pair."""
        return self.prompts[self.pair_rows]

    def margins(self, values: np.ndarray) -> np.ndarray:
        """(P,) chosen minus rejected, of values (K,)."""
        difference: np.ndarray = values[self.chosen] - values[self.rejected]
        return difference

    @cached_property
    def first_listed(self) -> np.ndarray:
        """(P,) whether the chosen response comes first in an order that knows nothing of the preference.

        The order is that of a hash of the responses' tokens.
        """
        digests = [
            hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=8).digest()
            for listed in self.held_out.tokens["response_ids"][:]
            for ids in listed
        ]
        return np.array([digests[a] < digests[b] for a, b in zip(self.chosen, self.rejected, strict=True)])

    def select(self, rows: Sequence[int]) -> "ScoredSet":
        """Only these rows, in this order."""
        ends = [*self.row_starts[1:].tolist(), len(self.rows)]
        parts = [np.arange(self.row_starts[row], ends[row]) for row in rows]
        kept = np.concatenate(parts)
        return replace(
            self,
            held_out=replace(self.held_out, tokens=self.held_out.tokens.select(rows)),
            logps=self.logps[kept],
            reference=None if self.reference is None else self.reference[kept],
            tokens=self.tokens[kept],
            rows=np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
            ranks=self.ranks[kept],
            prompts=self.prompts[list(rows)],
        )

    def records(self) -> list[dict[str, Any]]:
        """One for every pair, for JSON."""
        ids = self.held_out.ids
        starts = self.row_starts
        margins = self.margins(self.scores[self.main])
        found = []
        for number, (chosen, rejected, row) in enumerate(
            zip(self.chosen.tolist(), self.rejected.tolist(), self.pair_rows.tolist(), strict=True)
        ):
            record: dict[str, Any] = {
                "set": self.held_out.name,
                "id": ids[row],
                "prompt": int(self.prompts[row]),
                "responses": [chosen - int(starts[row]), rejected - int(starts[row])],
                "chosen_logp": float(self.logps[chosen]),
                "rejected_logp": float(self.logps[rejected]),
            }
            if self.reference is not None:
                record["reference_chosen_logp"] = float(self.reference[chosen])
                record["reference_rejected_logp"] = float(self.reference[rejected])
            record["chosen_tokens"] = int(self.tokens[chosen])
            record["rejected_tokens"] = int(self.tokens[rejected])
            record["margin"] = float(margins[number])
            found.append(record)
        return found


def scored_set(
    held_out: HeldOutSet,
    logps: Sequence[Sequence[float]],
    reference: Sequence[Sequence[float]] | None,
    reward: Reward | None,
) -> ScoredSet:
    """A set with its scores.

    Args:
        held_out: the set.
        logps: for every row the log-probabilities of its responses under the policy, in nats.
        reference: the same under the reference.
        reward: of the policy.
    """
    rows: Dataset = held_out.tokens
    keys: dict[bytes, int] = {}
    return ScoredSet(
        held_out=held_out,
        logps=_flat(logps),
        reference=None if reference is None else _flat(reference),
        tokens=np.array([len(ids) for listed in rows["response_ids"][:] for ids in listed]),
        rows=np.repeat(np.arange(len(rows)), [len(each) for each in rows["ranks"][:]]),
        ranks=_flat(rows["ranks"][:]).astype(int),
        prompts=np.array([keys.setdefault(key, len(keys)) for key in held_out.prompt_keys()]),
        reward=reward,
    )


def _flat(listed: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([value for each in listed for value in each], dtype=float)
