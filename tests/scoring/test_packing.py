"""The layout of packed rows, judged by a definition of who sees whom that is written down here again."""

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from prefopt_cli.scoring.attention import BLOCK, attention_input, block_mask, dense_mask
from prefopt_cli.scoring.batches import packed_batch, padded_batch
from prefopt_cli.scoring.packing import Example, Packed, first_fit, pack, rows_for_masks, token_slots
from tests.scoring.build import examples, random_lengths

PADDING = 0
"""An id that `examples` never draws."""


def layouts(count: int = 60, multiple: int = 1) -> list[tuple[list[Example], list[list[int]], Packed]]:
    """Random examples, the rows that they are put into, and their layout."""
    draw = random.Random(7)
    found = []
    for number in range(count):
        given = examples(random_lengths(draw, draw.randrange(1, 9)), seed=number)
        lengths = [example.tokens for example in given]
        rows = first_fit(lengths, draw.choice([max(lengths), 2 * max(lengths), sum(lengths)]))
        found.append((given, rows, pack(given, rows=rows, multiple=multiple, padding_id=PADDING)))
    return found


def in_one_row(count: int = 60) -> list[tuple[list[Example], Packed]]:
    """Random examples in one row, some of which are filled up."""
    draw = random.Random(3)
    found = []
    for number in range(count):
        given = examples(random_lengths(draw, draw.randrange(1, 6)), seed=number)
        found.append((given, pack(given, multiple=draw.choice([1, 1, 7, 64]), padding_id=PADDING)))
    return found


Token = tuple[int, int, int]
"""Example, response (-1 for its prompt), place in it."""


def places(given: Sequence[Example], rows: Sequence[Sequence[int]], width: int) -> list[list[Token | None]]:
    """Which token lies where, None being padding: the picture at the head of `packing`, spelt out."""
    found: list[list[Token | None]] = []
    for members in rows:
        row: list[Token | None] = []
        for index in members:
            row += [(index, -1, i) for i in range(len(given[index].prompt))]
            for number, response in enumerate(given[index].responses):
                row += [(index, number, i) for i in range(len(response))]
        found.append(row + [None] * (width - len(row)))
    return found


def sees(query: Token, key: Token) -> bool:
    """A response sees its prompt and what it has said so far; a prompt sees itself so far."""
    if query[0] != key[0]:
        return False
    if key[1] == query[1]:
        return key[2] <= query[2]
    return key[1] == -1


def expected_mask(row: Sequence[Token | None]) -> np.ndarray:
    """(W, W) who sees whom among tokens; nobody asks what padding sees."""
    return np.array([[bool(q and k and sees(q, k)) for k in row] for q in row])


def test_every_token_lies_where_the_picture_says() -> None:
    for given, rows, packed in layouts(multiple=4):
        width = packed.input_ids.shape[1]
        assert width % 4 == 0
        assert sum(example.tokens for example in given) == packed.tokens
        for row, members in enumerate(places(given, rows, width)):
            for at, token in enumerate(members):
                if token is None:
                    assert packed.input_ids[row, at] == PADDING
                    continue
                index, response, place = token
                prompt = given[index].prompt
                text = prompt if response < 0 else given[index].responses[response]
                assert packed.input_ids[row, at] == text[place]
                assert packed.position_ids[row, at] == place + (len(prompt) if response >= 0 else 0)


def test_no_position_lies_beyond_the_longest_sequence() -> None:
    """A model with learned positions has no more of them than sequences are long; padding must not ask for one."""
    for given, _, packed in layouts(multiple=64):
        assert packed.position_ids.max() < max(example.longest for example in given)
        assert packed.position_ids.min() == 0


def test_every_response_token_is_predicted_by_the_token_before_it() -> None:
    """The last token of the prompt predicts the first of every response; without a prompt nothing does."""
    for given, rows, packed in layouts():
        flat = [token for row in places(given, rows, packed.input_ids.shape[1]) for token in row]
        most = max(len(example.responses) for example in given)
        expected = [
            (index, number, place)
            for number in range(most)
            for index, example in enumerate(given)
            if number < len(example.responses)
            for place in range(0 if len(example.prompt) else 1, len(example.responses[number]))
        ]
        assert len(packed.predicting) == len(packed.targets) == len(expected)
        for (index, number, place), predicting, target in zip(
            expected, packed.predicting, packed.targets, strict=True
        ):
            before = (index, number, place - 1) if place else (index, -1, len(given[index].prompt) - 1)
            assert flat[predicting] == before
            assert target == given[index].responses[number][place]


def test_slots_share_the_scored_tokens_out_to_the_responses_in_their_order() -> None:
    for given, _, packed in layouts():
        most = max(len(example.responses) for example in given)
        lengths = [
            len(example.responses[number]) - (len(example.prompt) == 0)
            for number in range(most)
            for example in given
            if number < len(example.responses)
        ]
        count = len(packed.targets)
        assert (packed.slots < count).sum(1).tolist() == lengths
        assert packed.slots[packed.slots < count].tolist() == list(range(count))
        assert packed.slots.max() <= count


def test_responses_come_in_the_same_order_packed_and_padded() -> None:
    for given, _, packed in layouts():
        padded = padded_batch(given, PADDING)
        assert padded["targets"].tolist() == packed.targets.tolist()
        assert padded["slots"].tolist() == packed.slots.tolist()
        assert int(padded["completion_mask"].sum()) == sum(
            len(response) for example in given for response in example.responses
        )


def test_token_slots() -> None:
    assert token_slots([2, 3]).tolist() == [[0, 1, 5], [2, 3, 4]]
    assert token_slots([0, 1]).tolist() == [[1], [0]]
    assert token_slots([0, 0]).tolist() == [[0], [0]]
    assert token_slots([1]).tolist() == [[0]]


def test_a_pair_by_hand() -> None:
    packed = pack([Example([5, 6], [[7, 8], [9]]), Example([], [[3, 4]])], multiple=4, padding_id=0)

    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 3, 4, 0]]
    assert packed.position_ids[0, :7].tolist() == [0, 1, 2, 3, 2, 0, 1]
    assert packed.segments.tolist() == [[0, 0, 0, 0, 0, 1, 1, 2]]
    assert packed.branches.tolist() == [[0, 0, 1, 1, 2, 1, 1, 0]]
    assert packed.predicting.tolist() == [1, 2, 5, 1]
    assert packed.targets.tolist() == [7, 8, 4, 9]
    assert packed.slots.tolist() == [[0, 1], [2, 4], [3, 4]]
    assert packed.calls.tolist() == [[0, 4, 0, 0], [4, 1, 0, 2], [5, 2, 5, 0], [7, 1, 7, 0]]


def test_tokens_may_come_as_arrays() -> None:
    listed = examples([[3, 2, 4], [0, 1, 2]])
    arrays = [
        Example(np.array(e.prompt, np.int32), [np.array(r, np.int64) for r in e.responses]) for e in listed
    ]

    left, right = packed_batch(listed, "mask", 0), packed_batch(arrays, "mask", 0)

    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# Rows


def test_first_fit_keeps_to_the_capacity_and_loses_nothing() -> None:
    draw = random.Random(1)
    for _ in range(300):
        lengths = [draw.randrange(1, 50) for _ in range(draw.randrange(1, 30))]
        capacity = draw.randrange(max(lengths), 2 * sum(lengths) + 1)
        rows = first_fit(lengths, capacity)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        assert all(0 < sum(lengths[index] for index in row) <= capacity for row in rows)
        # Two rows that were less than half full would have been one.
        assert len(rows) <= max(1, 2 * sum(lengths) / capacity)


def test_first_fit_by_hand() -> None:
    assert first_fit([3, 5, 2, 4, 1], 6) == [[1, 4], [3, 2], [0]]
    assert first_fit([9, 2, 3], 5) == [[0], [2, 1]]


@pytest.mark.parametrize("width_cost", [0.0, 1e-3, 0.1, 1e6])
def test_rows_for_masks_cost_no_more_than_one_row_or_a_row_each(width_cost: float) -> None:
    draw = random.Random(2)
    for _ in range(100):
        lengths = [draw.randrange(1, 50) for _ in range(draw.randrange(1, 20))]

        def cost(rows: list[list[int]], lengths: list[int] = lengths) -> float:
            width = max(sum(lengths[index] for index in row) for row in rows)
            return len(rows) * width * (1 + width_cost * width)

        rows = rows_for_masks(lengths, width_cost)
        assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
        one, each = [list(range(len(lengths)))], [[index] for index in range(len(lengths))]
        assert cost(rows) <= min(cost(one), cost(each)) * (1 + 1e-12)


def test_cheap_attention_makes_one_row_and_dear_attention_many() -> None:
    assert len(rows_for_masks([9, 5, 4, 2], 0.0)) == 1  # any other way there is padding
    assert len(rows_for_masks([8] * 6, 1e6)) == 6


# Who sees whom


def test_the_dense_mask_is_the_definition() -> None:
    for given, rows, packed in layouts(multiple=4):
        mask = dense_mask(torch.from_numpy(packed.segments), torch.from_numpy(packed.branches)).numpy()
        for row, members in enumerate(places(given, rows, packed.input_ids.shape[1])):
            real = np.array([token is not None for token in members])
            assert (mask[row][real] == expected_mask(members)[real]).all()
            assert mask[row].diagonal().all()  # a query without any key has no softmax
            assert not mask[row][~real][:, real].any()


def test_calls_cover_the_row_once_and_allow_what_the_dense_mask_allows() -> None:
    for given, packed in in_one_row():
        width = packed.input_ids.shape[1]
        allowed = np.zeros((width, width), dtype=int)
        at = 0
        for start, length, before, seen in packed.calls:
            assert start == at
            assert length > 0
            assert before + seen <= start
            allowed[start : start + length, start : start + length] += np.tri(length, dtype=int)
            allowed[start : start + length, before : before + seen] += 1
            at += length
        assert at == width
        assert allowed.max() == 1
        (members,) = places(given, [range(len(given))], width)
        real = [token is not None for token in members]
        assert (allowed[real] == expected_mask(members)[real]).all()


def flex_layouts() -> list[tuple[list[Example], Packed]]:
    """Layouts of one row and of several, of one block and of many, with prompts that end at a block's border."""
    draw = random.Random(5)
    lengths = [
        [[40, 30, 20], [0, 90, 3], [1, 1, 1]],
        [[BLOCK, BLOCK, BLOCK], [7, 2 * BLOCK, 9]],
        [[1, 1]],
        [[300, 20, 30, 1], [5, 200]],
        random_lengths(draw, 20, most=60),
    ]
    return [
        (given, pack(given, rows=rows, multiple=BLOCK))
        for number, each in enumerate(lengths)
        for given in [examples(each, seed=number)]
        for rows in (None, first_fit([e.tokens for e in given], max(e.tokens for e in given)))
    ]


def test_the_block_mask_lists_every_block_that_is_needed_and_asks_the_definition() -> None:
    for _, packed in flex_layouts():
        segments, branches = torch.from_numpy(packed.segments), torch.from_numpy(packed.branches)
        rows, width = segments.shape
        dense, blocks = dense_mask(segments, branches), block_mask(segments, branches)
        asked = torch.stack(
            [
                blocks.mask_mod(
                    torch.tensor(row), torch.tensor(0), torch.arange(width)[:, None], torch.arange(width)
                )
                for row in range(rows)
            ]
        )
        assert torch.equal(asked, dense)
        needed = dense.view(rows, width // BLOCK, BLOCK, width // BLOCK, BLOCK).any(4).any(2)
        listed = blocks.to_dense()[:, 0].bool()
        assert not (needed & ~listed).any()
        assert not listed.triu(1).any()


def test_a_block_mask_of_many_segments_is_sparse() -> None:
    given = examples([[BLOCK // 2, BLOCK // 4, BLOCK // 4]] * 10)
    packed = pack(given, multiple=BLOCK)

    blocks = block_mask(torch.from_numpy(packed.segments), torch.from_numpy(packed.branches))

    assert int(blocks.kv_num_blocks.sum()) == 10


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@torch.no_grad()
def test_flex_attention_with_the_block_mask_is_masked_attention() -> None:
    """On the CPU there is no backward pass, and what is listed is not looked at; see the test above for that."""
    for number, (_, packed) in enumerate(flex_layouts()[:4]):
        batch = {name: torch.from_numpy(getattr(packed, name)) for name in ("segments", "branches")}
        generator = torch.Generator().manual_seed(number)
        shape = (packed.input_ids.shape[0], 2, packed.input_ids.shape[1], 8)
        query, key, value = (torch.randn(shape, generator=generator) for _ in range(3))

        found = flex_attention(query, key, value, block_mask=attention_input("blocks", batch))
        expected = scaled_dot_product_attention(query, key, value, attn_mask=attention_input("mask", batch))

        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_additive_mask_forbids_what_the_boolean_one_forbids() -> None:
    given = examples([[3, 2, 4], [0, 1, 5]])
    batch = packed_batch(given, "mask", PADDING)

    boolean, additive = attention_input("mask", batch), attention_input("mask", batch, torch.bfloat16)

    assert additive.dtype == torch.bfloat16
    assert torch.equal(additive == 0, boolean)
    assert additive.isfinite().all()
