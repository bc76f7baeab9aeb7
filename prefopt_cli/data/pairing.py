"""Lists of responses as pairs, for methods that compare two responses at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from typing import Literal

from prefopt_cli.data.tables import TokenRow

Pairing = Literal["all_pairs", "adjacent_pairs"]
"""Every response with every lower-ranked one, or only with those of the next rank."""


def pairs_of(rows: Sequence[TokenRow], pairing: Pairing) -> list[TokenRow]:
    """One row per couple, in the place of its list; rows of two responses stay as they are.

    The id of a couple is its row's id with ``[i>j]``: the positions of the better and the worse response
    in the row. Token ids are shared with the list, not copied.
    """
    made: list[TokenRow] = []
    for row in rows:
        if len(row.ranks) == 2:
            made.append(row)
            continue
        for better, worse in couples(row.ranks, pairing):
            sides = row.responses[better], row.responses[worse]
            degrees = (row.degrees[better], row.degrees[worse]) if row.degrees else ()
            row_id = f"{row.row_id}[{better}>{worse}]"
            made.append(TokenRow(row_id, row.prompt, sides, (0, 1), degrees))
    return made


@lru_cache(maxsize=4096)
def couples(ranks: tuple[int, ...], pairing: Pairing) -> tuple[tuple[int, int], ...]:
    """(better, worse) positions in a row of these dense ranks, none of them falling; ties give no couple."""
    both = combinations(range(len(ranks)), 2)
    if pairing == "adjacent_pairs":
        return tuple((one, other) for one, other in both if ranks[other] == ranks[one] + 1)
    return tuple((one, other) for one, other in both if ranks[other] > ranks[one])
