"""Which levels are drawn, and where a batch has them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from prefopt_cli.scoring.layout import Layout
from prefopt_cli.training.batches import ComparisonCollator
from prefopt_cli.training.degree_batches import DegreeCollator, EpochCount, versions_of

PADDED, PIECES, MASKS = Layout(), Layout("pieces"), Layout("mask", width_cost=1.0)
LAYOUTS = [pytest.param(layout, id=layout.way or "padded") for layout in (PADDED, PIECES, MASKS)]

Told = tuple[int, int, tuple[int, ...]]
"""A version in a batch: its row's number in the data, its level, its tokens."""


def row(index: int, *levels: Sequence[int]) -> dict[str, Any]:
    """A row whose tokens say what they are: thousands the row, hundreds the response, tens the level.

    Response r has 9 tokens, its version of level k 8 - k.
    """

    def tokens(response: int, level: int, count: int) -> list[int]:
        return [1000 * (index + 1) + 100 * response + 10 * level + place for place in range(count)]

    return {
        "row_index": index,
        "prompt_ids": [1, 2, 3 + index % 2],
        "response_ids": [tokens(response, 0, 9) for response in range(len(levels))],
        "ranks": list(range(len(levels))),
        "degraded_levels": [list(own) for own in levels],
        "degraded_ids": [
            [tokens(response, level, 8 - level) for level in own] for response, own in enumerate(levels)
        ],
    }


ROWS = [
    row(0, [1, 2, 3], [2, 3]),
    row(1, [], [1]),
    row(2, [], []),
    row(3, [3], [1, 2], [1, 2, 3]),
    row(4, [1, 2], []),
]


def collator(layout: Layout = PIECES, *, drawn: int | None = 1, seed: int = 0) -> DegreeCollator:
    return DegreeCollator(layout, 0, levels_per_step=drawn, seed=seed)


def told(batch: dict[str, Tensor]) -> list[Told]:
    """What the batch's tensors say about the versions in it."""
    flat = batch["input_ids"].flatten()
    spans = batch["passages"][batch["degree_passages"]].tolist()
    rows = batch["row_index"][batch["degree_rows"]].tolist()
    texts = [tuple(flat[start : start + length].tolist()) for start, length in spans]
    return list(zip(rows, batch["degree_levels"].tolist(), texts, strict=True))


def everything(rows: Sequence[dict[str, Any]]) -> list[Told]:
    """All versions of all responses that take part, by hand."""
    found: list[Told] = []
    for one in rows:
        for ids, levels, versions in zip(
            one["response_ids"], one["degraded_levels"], one["degraded_ids"], strict=True
        ):
            texts = zip([0, *levels] if levels else [], [ids, *versions], strict=False)
            found += [(one["row_index"], level, tuple(text)) for level, text in texts]
    return found


def response_of(version: Told) -> tuple[int, int]:
    return version[0], version[2][0] // 100 % 10


def test_versions_of_a_row() -> None:
    """Levels that were merged are not there; a response without any takes no part, not even as itself."""
    found = [[(each.response, each.level) for each in own] for own in versions_of(row(0, [2], [], [1, 3]))]
    assert found == [[(0, 0), (0, 2)], [(2, 0), (2, 1), (2, 3)]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_levels_are_where_the_batch_says(layout: Layout) -> None:
    batch = collator(layout, drawn=None)(ROWS)
    assert told(batch) == everything(ROWS)
    assert len(told(batch)) == 21


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("drawn", [1, 2, 3, 9])
def test_a_draw_takes_so_many_different_levels_of_each_response(layout: Layout, drawn: int) -> None:
    available = everything(ROWS)
    counts = Counter(map(response_of, available))
    collate = collator(layout, drawn=drawn)
    for epoch in range(5):
        collate.begin_epoch(epoch)
        found = told(collate(ROWS))
        assert set(found) <= set(available)
        assert len(set(found)) == len(found)
        expected = {response: min(drawn, count) for response, count in counts.items()}
        assert Counter(map(response_of, found)) == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_comparisons_are_those_of_a_batch_without_degrees(layout: Layout) -> None:
    """Same targets at the same place of each response, in the same order; only more passages, after the others."""
    plain = ComparisonCollator(layout, 0)(ROWS)
    batch = collator(layout, drawn=2)(ROWS)
    for name in ("row_index", "targets", "slots", "responses", "ranks"):
        assert batch[name].equal(plain[name]), name
    scored = len(plain["passages"])
    assert batch["passages"][:scored, 1].equal(plain["passages"][:, 1])
    degraded = [length for _, level, text in told(batch) if level for length in [len(text)]]
    assert batch["passages"][scored:, 1].tolist() == degraded


def test_a_batch_in_which_nothing_takes_part() -> None:
    batch = collator()(ROWS[2:3])
    assert [len(batch[name]) for name in ("degree_rows", "degree_levels", "degree_passages")] == [0, 0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_response_itself_costs_no_more_tokens(layout: Layout) -> None:
    """A packed version costs its own tokens; a padded one those of its prompt too."""
    prompt = 3 if layout is PADDED else 0
    plain = ComparisonCollator(layout, 0)(ROWS)
    collate = collator(layout)
    costs = set()
    for epoch in range(20):
        collate.begin_epoch(epoch)
        batch = collate(ROWS)
        more = [len(text) + prompt for _, level, text in told(batch) if level]
        assert int(batch["num_tokens"]) - int(plain["num_tokens"]) == sum(more)
        costs.add(sum(more))
    assert len(costs) > 5


@pytest.mark.parametrize(("drawn", "share"), [(1, 1 / 4), (2, 2 / 4), (3, 3 / 4)])
def test_every_level_of_a_response_is_as_likely_as_any_other(drawn: int, share: float) -> None:
    """Chi-squared of 4 counts out of 4000 draws: above 16.27 once in a thousand for 3 degrees of freedom.

    Without replacement counts vary less than the statistic supposes, so this holds the more.
    """
    collate, one = collator(drawn=drawn, seed=7), [row(5, [1, 2, 3], [])]
    counts: Counter[int] = Counter()
    epochs = 4000
    for epoch in range(epochs):
        collate.begin_epoch(epoch)
        counts.update(level for _, level, _ in told(collate(one)))
    expected = epochs * share
    assert sum((counts[level] - expected) ** 2 / expected for level in range(4)) < 16.27


def test_levels_of_a_rows_responses_are_drawn_independently() -> None:
    """16 equally likely couples in 3200 draws: chi-squared with 15 degrees of freedom is above 37.7 once in 1000."""
    collate, one = collator(), [row(0, [1, 2, 3], [1, 2, 3])]
    couples: Counter[tuple[int, ...]] = Counter()
    for epoch in range(3200):
        collate.begin_epoch(epoch)
        couples[tuple(level for _, level, _ in told(collate(one)))] += 1
    assert len(couples) == 16
    assert sum((count - 200) ** 2 / 200 for count in couples.values()) < 37.7


def test_merged_levels_are_not_drawn_twice_as_often() -> None:
    """Of a response with the levels 0 and 3 each is drawn half the time: 4 standard deviations of 2000 draws are 89."""
    collate, one = collator(), [row(0, [3], [])]
    drawn: Counter[int] = Counter()
    for epoch in range(2000):
        collate.begin_epoch(epoch)
        drawn.update(level for _, level, _ in told(collate(one)))
    assert set(drawn) == {0, 3}
    assert abs(drawn[3] - 1000) < 90


MANY = [row(index, [1, 2, 3], [1, 2, 3]) for index in range(40)]


def test_a_draw_follows_from_the_row_the_epoch_and_the_seed_alone() -> None:
    def levels(batches: Sequence[Sequence[dict[str, Any]]], epoch: int = 0, seed: int = 0) -> dict[Any, int]:
        collate = collator(seed=seed)
        collate.begin_epoch(epoch)
        return {response_of(each): each[1] for batch in batches for each in told(collate(list(batch)))}

    whole = levels([MANY])
    assert levels([MANY[index : index + 7] for index in range(0, 40, 7)]) == whole
    assert levels([MANY[::-1]]) == whole
    for other in (levels([MANY], epoch=1), levels([MANY], seed=1)):
        # 80 draws of 4 levels: about 60 differ, and fewer than 40 would be 5 standard deviations off.
        assert sum(other[key] != whole[key] for key in whole) >= 40


def test_repeats_of_a_row_are_drawn_on_their_own() -> None:
    """Rows that a weight repeats have places of their own in the data, by which they are drawn."""
    repeated = [{**MANY[0], "row_index": index} for index in range(40)]
    assert {level for _, level, _ in told(collator()(repeated))} == {0, 1, 2, 3}


def test_an_evaluation_draws_nothing() -> None:
    found = [told(collator(seed=seed).of_all_levels()(ROWS)) for seed in (0, 1)]
    assert found[0] == found[1] == everything(ROWS)


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_what_one_process_draws(persistent: bool) -> None:
    """Workers are copies of this process, and those that stay alive must hear of the next epoch too."""
    collates = [collator(), collator()]
    alone = DataLoader(MANY, batch_size=8, collate_fn=collates[0])  # type: ignore[arg-type]
    shared = DataLoader(
        MANY,  # type: ignore[arg-type]
        batch_size=8,
        collate_fn=collates[1],
        num_workers=2,
        persistent_workers=persistent,
    )
    epochs = []
    for epoch in range(3):
        for collate in collates:
            collate.begin_epoch(epoch)
        ours, theirs = list(shared), list(alone)
        for left, right in zip(ours, theirs, strict=True):
            assert left.keys() == right.keys()
            assert all(left[name].equal(right[name]) for name in left)
        epochs.append([each for batch in theirs for each in told(batch)])
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(
    ("epoch", "number"), [(None, 0), (0.0, 0), (0.99, 0), (1.0, 1), (1 - 1e-12, 1), (2.5, 2), (3 + 1e-9, 3)]
)
def test_the_epoch_is_counted_in_whole_ones(epoch: float | None, number: int) -> None:
    """A resumed run begins within an epoch; a sum of fractions may come out a trifle short of a whole one."""
    from transformers import TrainerControl, TrainerState, TrainingArguments

    collate, expected = collator(), collator()
    expected.begin_epoch(number)
    state = TrainerState()
    state.epoch = epoch
    EpochCount(collate).on_epoch_begin(TrainingArguments(use_cpu=True), state, TrainerControl())
    assert told(collate(MANY)) == told(expected(MANY))


def test_known_reference_scores_pass_through() -> None:
    scored = [
        {**one, "ref_chosen_logps": -1.0 - one["row_index"], "ref_rejected_logps": -9.0} for one in MANY[:3]
    ]
    batch = collator()(scored)
    assert torch.equal(batch["ref_chosen_logps"], torch.tensor([-1.0, -2.0, -3.0]))
