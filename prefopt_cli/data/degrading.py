"""What is degraded of a set, and what the receipt says about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from prefopt_cli.data.degrees import degrade
from prefopt_cli.data.examples import Text
from prefopt_cli.data.receipt import SetReceipt
from prefopt_cli.data.tables import TokenRow
from prefopt_cli.errors import UserError

Sides = Literal["both", "chosen", "rejected"]


@dataclass(frozen=True)
class Degrading:
    """How responses are degraded (Li et al., EMNLP 2024 Findings, arXiv 2409.17791)."""

    stopwords: frozenset[str]
    levels: int
    """Degrees of a response, itself included."""
    apply_to: Sides = "both"
    """Responses that nothing is preferred to, the others, or both."""

    def of(self, response: Text) -> list[tuple[int, Text]]:
        """The degraded versions of a response, each with its level; empty where it takes no part."""
        return degrade(response, self.stopwords, self.levels)

    def wants(self, rank: int) -> bool:
        """Whether a response of this rank takes part."""
        return self.apply_to == "both" or (rank == 0) == (self.apply_to == "chosen")

    def applied(self, row: TokenRow) -> TokenRow:
        """The row with the degraded versions of those of its responses that are to take part."""
        kept = tuple(
            each if self.wants(rank) else () for each, rank in zip(row.degrees, row.ranks, strict=True)
        )
        return replace(row, degrees=kept)

    def misses(self, rows: Sequence[TokenRow]) -> bool:
        """Whether a response of the rows that is to take part has no degraded version."""
        return any(
            self.wants(rank) and not each
            for row in rows
            for each, rank in zip(row.degrees, row.ranks, strict=True)
        )

    def figures(self, rows: Sequence[TokenRow]) -> dict[str, Any]:
        """``degrees`` of a ``SetReceipt``, of rows that this was applied to."""
        wanted = [
            each
            for row in rows
            for each, rank in zip(row.degrees, row.ranks, strict=True)
            if self.wants(rank)
        ]
        taking_part = [each for each in wanted if each]
        counts = Counter(level for each in taking_part for level, _ in each)
        counts[0] = len(taking_part)
        return {
            "degrees": {
                "responses": len(wanted),
                "taking_part": len(taking_part),
                "levels": {str(level): counts[level] for level in range(self.levels)},
            }
        }


def require_degrees(record: SetReceipt, degrading: Degrading) -> None:
    """Raise UserError where no response of a set takes part."""
    counts = record.degrees
    if counts and not counts["taking_part"]:
        raise UserError(
            f"dataset.train: none of the {counts['responses']} responses has key phrases to remove, so there are no "
            f"degrees to learn. Key phrases are what stands between stop words ({len(degrading.stopwords)} of them) "
            "and punctuation: check that method.stopwords are those of the data's language."
        )
