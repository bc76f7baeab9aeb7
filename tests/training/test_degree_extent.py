"""What degraded versions add to batches, against arithmetic done by hand and against real draws."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from prefopt_cli.data.tables import TokenRow, as_dataset, columns_of
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.savings import draw_batches
from prefopt_cli.training.degree_batches import DegreeCollator
from prefopt_cli.training.degree_extent import expected_versions, longest_versions, versions_in


def row(prompt: int, responses: list[int], versions: list[dict[int, int]]) -> TokenRow:
    """Lengths to a row: `versions` has the length by level for each response."""
    ids = [np.ones(length, dtype=np.int32) for length in (prompt, *responses)]
    degrees = tuple(
        tuple((level, np.ones(length, dtype=np.int32)) for level, length in each.items()) for each in versions
    )
    return TokenRow("a:1", ids[0], tuple(ids[1:]), tuple(range(len(responses))), degrees)


ROWS = [
    row(5, [10, 8], [{1: 8, 2: 6, 3: 4}, {}]),
    row(3, [2, 1], [{}, {}]),
    row(3, [6, 4], [{2: 3}, {1: 2, 2: 3}]),
]


@pytest.fixture
def rows() -> Dataset:
    """A pair of one response with three versions and one with none, one with nothing, one with one and two."""
    return as_dataset(columns_of(ROWS))


def test_one_version_a_step_is_expected_by_hand(rows: Dataset) -> None:
    """Row 0: each of three versions at 1/4; row 2: one at 1/2, and two at 1/3. n tokens have n (n + 1) / 2 pairs."""
    found = expected_versions(versions_in(rows), 3, 1)

    assert found.texts.tolist() == pytest.approx([3 / 4, 0, 1 / 2 + 2 / 3])
    assert found.tokens.tolist() == pytest.approx([18 / 4, 0, 3 / 2 + 5 / 3])
    assert found.pairs.tolist() == pytest.approx([(36 + 21 + 10) / 4, 0, 6 / 2 + (3 + 6) / 3])


def test_no_more_versions_are_drawn_than_there_are(rows: Dataset) -> None:
    """Three of four in row 0; in row 2 both of two, and all three of three."""
    found = expected_versions(versions_in(rows), 3, 3)

    assert found.tokens.tolist() == pytest.approx([18 * 3 / 4, 0, 3 + 5])


def test_the_longest_that_may_be_drawn(rows: Dataset) -> None:
    found = versions_in(rows)

    assert longest_versions(found, 3, 1).tolist() == [[8, 0], [0, 0], [3, 3]]
    assert longest_versions(found, 3, 2).tolist() == [[8, 6, 0], [0, 0, 0], [3, 3, 2]]
    assert longest_versions(found, 3, 9).tolist() == [[8, 6, 4], [0, 0, 0], [3, 3, 2]]


def test_a_part_of_a_set_is_counted_alone(rows: Dataset) -> None:
    for part in (rows.select(range(1, 3)), rows.select([1, 2])):
        found = versions_in(part)
        assert found.lengths.tolist() == [3, 2, 3]
        assert found.rows.tolist() == [1, 1, 1]
        assert found.responses.tolist() == [2, 3, 3]
        assert found.counts.tolist() == [0, 0, 1, 2]


def test_a_set_without_versions_has_none() -> None:
    bare = as_dataset(columns_of([ROWS[1]]))
    found = versions_in(bare)

    assert expected_versions(found, 1, 1).tokens.tolist() == [0]
    assert longest_versions(found, 1, 1).shape == (1, 0)


@pytest.mark.parametrize("levels_per_step", [1, 2])
def test_draws_are_as_long_as_expected_and_never_longer(rows: Dataset, levels_per_step: int) -> None:
    """Means over 2,000 epochs; the spread of a mean is below 0.06 tokens."""
    collator = DegreeCollator(Layout("pieces"), 0, levels_per_step=levels_per_step, seed=0)
    numbered: list[Any] = [dict(each, row_index=number) for number, each in enumerate(rows)]
    scored = (5 + 10 + 8) + (3 + 2 + 1) + (3 + 6 + 4)
    drawn = []
    for epoch in range(2000):
        collator.begin_epoch(epoch)
        drawn.append(int(collator(numbered)["num_tokens"]) - scored)

    found = versions_in(rows)
    assert np.mean(drawn) == pytest.approx(expected_versions(found, 3, levels_per_step).tokens.sum(), abs=0.2)
    assert max(drawn) == longest_versions(found, 3, levels_per_step).sum()


def test_figures_come_in_the_order_of_the_batches() -> None:
    lengths = np.arange(30).reshape(10, 3)
    assert (draw_batches(lengths[:, 0], 4) == draw_batches(lengths, 4)[:, :, 0]).all()
