"""Responses whose states are wanted but not their scores: where they lie, who sees them, what comes of them."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from prefopt_cli.scoring.attention import dense_mask
from prefopt_cli.scoring.batches import packed_batch, padded_batch
from prefopt_cli.scoring.forward import plain_model, score_responses
from prefopt_cli.scoring.head import Pooling, pooled
from prefopt_cli.scoring.layout import Layout
from prefopt_cli.scoring.packing import Example, first_fit, pack
from tests.scoring.build import build, examples, random_lengths, relative

PADDED, PIECES, MASKS = Layout(), Layout("pieces"), Layout("mask", width_cost=1.0)
LAYOUTS = [pytest.param(layout, id=layout.way or "padded") for layout in (PADDED, PIECES, MASKS)]
PAIR = Example([5, 6], [[7, 8], [9]], unscored=[[10, 11, 12], [13]])


def with_unscored(given: Sequence[Example], seed: int = 0) -> list[Example]:
    """Some of the examples' responses are wanted no more than for their states; at least one is scored."""
    draw, found = random.Random(seed), []
    for example in given:
        scored = draw.randrange(1, len(example.responses) + 1)
        found.append(
            replace(example, responses=example.responses[:scored], unscored=tuple(example.responses[scored:]))
        )
    return found


def in_order(given: Sequence[Example]) -> list[tuple[Example, Any]]:
    """(example, response) as passages list them."""
    most = max(len(example.responses) for example in given)
    scored = [
        (example, example.responses[number])
        for number in range(most)
        for example in given
        if number < len(example.responses)
    ]
    return scored + [(example, response) for example in given for response in example.unscored]


def batches(count: int = 40) -> list[list[Example]]:
    draw = random.Random(11)
    return [
        with_unscored(examples(random_lengths(draw, draw.randrange(1, 8)), seed=number), seed=number)
        for number in range(count)
    ]


def test_sizes_count_what_goes_through_the_model() -> None:
    assert PAIR.tokens == 2 + 2 + 1 + 3 + 1
    assert PAIR.longest == 2 + 3


def test_packed_by_hand() -> None:
    """The prompt once, then its responses, then those that are not scored; each goes on where the prompt ends."""
    packed = pack([PAIR, Example([], [[3, 4]])], multiple=4)
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 3, 4, 0]]
    assert packed.position_ids[0, :11].tolist() == [0, 1, 2, 3, 2, 2, 3, 4, 2, 0, 1]
    assert packed.segments[0].tolist() == [0] * 9 + [1, 1, 2]
    assert packed.branches[0, :11].tolist() == [0, 0, 1, 1, 2, 3, 3, 3, 4, 1, 1]
    assert packed.targets.tolist() == [7, 8, 4, 9]
    assert packed.passages.tolist() == [[2, 2], [9, 2], [4, 1], [5, 3], [8, 1]]
    assert packed.calls.tolist() == [
        [0, 4, 0, 0],
        [4, 1, 0, 2],
        [5, 3, 0, 2],
        [8, 1, 0, 2],
        [9, 2, 9, 0],
        [11, 1, 11, 0],
    ]
    assert packed.tokens == 11


def test_padded_by_hand() -> None:
    batch = padded_batch([PAIR, Example([], [[3, 4]])], 0)
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 0], [3, 4, 0, 0, 0], [5, 6, 9, 0, 0], [5, 6, 10, 11, 12], [5, 6, 13, 0, 0],
    ]  # fmt: skip
    assert batch["passages"].tolist() == [[2, 2], [5, 2], [12, 1], [17, 3], [22, 1]]
    assert batch["completion_mask"].sum(1).tolist() == [2, 2, 1, 0, 0]
    assert batch["targets"].tolist() == [7, 8, 4, 9]
    assert int(batch["num_tokens"]) == 4 + 2 + 3 + 5 + 3


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("way", ["pieces", "mask", "padded"])
def test_passages_are_the_responses_in_their_order(way: Any, multiple: int) -> None:
    for given in batches():
        batch = (
            padded_batch(given, 0, multiple)
            if way == "padded"
            else packed_batch(given, way, 0, multiple, width_cost=1.0)
        )
        flat = batch["input_ids"].flatten()
        texts = [flat[start : start + length].tolist() for start, length in batch["passages"].tolist()]
        assert texts == [list(response) for _, response in in_order(given)]


def test_they_change_nothing_about_what_is_scored() -> None:
    for given in batches():
        bare = [replace(example, unscored=()) for example in given]
        for make in (padded_batch, lambda each, _: packed_batch(each, "pieces", 0)):
            left, right = make(given, 0), make(bare, 0)
            assert left["targets"].equal(right["targets"])
            assert left["slots"].equal(right["slots"])
            assert left["passages"][: len(right["passages"]), 1].equal(right["passages"][:, 1])


def test_nobody_sees_them_and_they_see_their_prompt_alone() -> None:
    """The dense mask and the calls of pieces, against the rule spelt out for each passage."""
    for given in batches():
        rows = first_fit([example.tokens for example in given], max(example.tokens for example in given))
        packed = pack(given, rows=rows)
        mask = dense_mask(torch.from_numpy(packed.segments), torch.from_numpy(packed.branches)).numpy()
        width = packed.input_ids.shape[1]
        for (example, response), (start, length) in zip(in_order(given), packed.passages, strict=True):
            row, at = divmod(int(start), width)
            assert length == len(response)
            seen = mask[row, at + length - 1].nonzero()[0].tolist()
            own = list(range(at, at + length))
            before = [place for place in seen if place not in own]
            assert seen[len(before) :] == own
            assert packed.input_ids[row, before].tolist() == list(example.prompt)
            others = np.delete(mask[row, :, at : at + length], own, axis=0)
            assert not others.any()


def test_calls_allow_what_the_dense_mask_allows() -> None:
    for given in batches():
        packed = pack(given)
        width = packed.input_ids.shape[1]
        allowed = np.zeros((width, width), dtype=int)
        for start, length, before, seen in packed.calls:
            allowed[start : start + length, start : start + length] += np.tri(length, dtype=int)
            allowed[start : start + length, before : before + seen] += 1
        mask = dense_mask(torch.from_numpy(packed.segments), torch.from_numpy(packed.branches))[0]
        assert (allowed == mask.numpy().astype(int)).all()


# States


def test_pooling_by_hand() -> None:
    """Rows of 3 places: a passage of the places 1 and 2, and one of place 3."""
    hidden = torch.arange(12.0).reshape(2, 3, 2)
    passages = torch.tensor([[1, 2], [3, 1]])
    assert pooled(hidden, passages, "last").tolist() == [[4, 5], [6, 7]]
    assert pooled(hidden, passages, "mean").tolist() == [[3, 4], [6, 7]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mean_is_not_rounded_by_autocast(dtype: torch.dtype) -> None:
    """In half precision a sum over 1000 tokens of 80 would overflow, or be off by tenths."""
    hidden = 80 + torch.rand(1, 1000, 3, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=dtype):
        (found,) = pooled(hidden, torch.tensor([[0, 1000]]), "mean")
    assert found.dtype == torch.float32
    assert found == pytest.approx(hidden[0].double().mean(0), rel=1e-5)


def test_what_lies_outside_of_responses_does_not_count() -> None:
    hidden = torch.ones(1, 6, 2)
    hidden[0, [0, 3, 5]] = torch.tensor([[torch.nan], [torch.inf], [torch.nan]])
    assert pooled(hidden, torch.tensor([[1, 2], [4, 1]]), "mean").tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_a_mean_in_bfloat16_is_summed_in_more() -> None:
    """Ones that are summed one by one in bfloat16 stop at 256."""
    hidden = torch.ones(1, 1000, 1, dtype=torch.bfloat16)
    assert pooled(hidden, torch.tensor([[0, 1000]]), "mean").item() == pytest.approx(1, rel=0.01)


def states_one_by_one(model: Any, given: Sequence[Example], pooling: Pooling) -> Tensor:
    """(K + U, H) by a plain forward pass of each response after its prompt."""
    found = []
    for example, response in in_order(given):
        ids = torch.tensor([[*example.prompt, *response]])
        hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
        own = hidden[0, len(example.prompt) :]
        found.append(own[-1] if pooling == "last" else own.mean(0))
    return torch.stack(found)


LENGTHS = [[5, 7, 3, 4], [0, 4, 6, 1], [8, 1, 9], [3, 1, 1, 2, 2], [0, 1, 5]]


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("family", "lora"), [("llama", False), ("llama", True), ("gpt2", False), ("gemma", False)]
)
def test_states_and_their_gradients_are_those_of_each_response_alone(
    family: str, lora: bool, layout: Layout, pooling: Pooling
) -> None:
    given = with_unscored(examples(LENGTHS), seed=1)
    assert sum(len(example.unscored) for example in given) > 3
    plain, model = build(family, lora=lora), build(family, lora=lora)
    model.load_state_dict(plain.state_dict())
    expected = states_one_by_one(plain, given, pooling)
    weights = torch.cos(torch.arange(expected.numel(), dtype=expected.dtype)).view_as(expected)
    (expected * weights).sum().backward()
    slopes = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}

    layout.prepare(model)
    scores = score_responses(model, layout.batch(given, 0), layout, pooling=pooling)
    assert scores.states is not None
    assert relative(scores.states.detach(), expected.detach()) < 1e-5
    (scores.states * weights).sum().backward()
    floor = 1e-3 * max(slope.norm() for slope in slopes.values())
    for name, parameter in model.named_parameters():
        if name in slopes:
            difference = (parameter.grad - slopes[name]).norm()
            assert difference < 1e-4 * torch.maximum(slopes[name].norm(), floor), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_are_the_same_with_and_without_them(layout: Layout) -> None:
    given = with_unscored(examples(LENGTHS), seed=1)
    model = build("llama")
    layout.prepare(model)
    with torch.no_grad():
        bare = score_responses(model, layout.batch([replace(each, unscored=()) for each in given], 0), layout)
        scores = score_responses(model, layout.batch(given, 0), layout, pooling="mean")
    assert bare.states is None
    assert scores.lengths.equal(bare.lengths)
    for name in ("logps", "entropy", "mean_logits", "top1"):
        torch.testing.assert_close(getattr(scores, name), getattr(bare, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_an_unscored_response_says_reaches_no_other(layout: Layout) -> None:
    """Other tokens in it change its own state and nothing else."""
    given = with_unscored(examples(LENGTHS), seed=1)
    number = next(n for n, each in enumerate(given) if each.unscored)
    first, *others = given[number].unscored
    changed = list(given)
    changed[number] = replace(given[number], unscored=([token % 50 + 4 for token in first], *others))
    model = build("llama")
    layout.prepare(model)
    with torch.no_grad():
        left, right = (
            score_responses(model, layout.batch(each, 0), layout, pooling="last") for each in (given, changed)
        )
    own = sum(len(each.responses) for each in given) + sum(len(each.unscored) for each in given[:number])
    assert left.states is not None
    assert right.states is not None
    same = (left.states - right.states).norm(dim=1) < 1e-5
    assert not same[own]
    assert same.sum() == len(same) - 1
    torch.testing.assert_close(left.logps, right.logps, rtol=1e-6, atol=1e-6)


def test_states_are_the_last_ones_before_the_head() -> None:
    """What the head turns into logits, after the last normalisation."""
    model, given = build("llama"), examples([[4, 3]])
    PIECES.prepare(model)
    with torch.no_grad():
        batch = PIECES.batch(given, 0)
        states = score_responses(model, batch, PIECES, pooling="last").states
        ids = torch.tensor([[*given[0].prompt, *given[0].responses[0]]])
        logits = plain_model(model)(input_ids=ids).logits[0, -1]
        assert states is not None
        torch.testing.assert_close(model.get_output_embeddings()(states)[0], logits, rtol=1e-4, atol=1e-4)
