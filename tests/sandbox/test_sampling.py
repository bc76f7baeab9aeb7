"""The base policy: it loads anywhere, writes well-formed replies of mixed quality, and is sampled fairly."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prefopt_cli.sandbox.base import build_tokenizer
from prefopt_cli.sandbox.grammar import CHOICES, ITEMS, SLOTS, Prompt, parse_reply, reply_text
from prefopt_cli.sandbox.names import DIMENSIONS, SPLITS
from prefopt_cli.sandbox.preferences import text_rewards
from prefopt_cli.sandbox.rewards import reward_range
from prefopt_cli.sandbox.sampling import Sample, longest_reply, sample_replies
from prefopt_cli.sandbox.world import World

WELL_FORMED = 0.95
PER_PROMPT = 2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tokenizer(sandbox: World) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(sandbox.base)


@pytest.fixture(scope="module")
def model(sandbox: World) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(sandbox.base)


@pytest.fixture(scope="module")
def prompts(sandbox: World) -> list[Prompt]:
    return [row.prompt for row in sandbox.pool("test")]


@pytest.fixture(scope="module")
def samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]
) -> list[list[Sample]]:
    """1000 replies to held-out prompts."""
    drawn = sample_replies(model, tokenizer, prompts[:500], PER_PROMPT, seed=1)
    assert sum(map(len, drawn)) >= 900  # a prompt or two may have been left out of the world
    return drawn


def test_the_base_policy_is_a_tiny_llama_with_a_tokenizer_of_its_own(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert model.config.model_type == "llama"
    assert model.num_parameters() < 1_000_000
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    text = " We will refund your lamp."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_samples_are_well_formed(samples: list[list[Sample]]) -> None:
    found = [parse_reply(one.prompt, one.text) is not None for drawn in samples for one in drawn]
    assert np.mean(found) >= WELL_FORMED


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_there_is_room_both_ways(samples: list[list[Sample]], dimension: str) -> None:
    """The mean gold reward is in the middle half of its range."""
    mean = np.mean([text_rewards(one.prompt, one.text)[dimension] for drawn in samples for one in drawn])
    least, most = reward_range(dimension)
    assert least + (most - least) / 4 < mean < most - (most - least) / 4


def test_samples_are_what_the_tokens_say(
    samples: list[list[Sample]], tokenizer: PreTrainedTokenizerBase
) -> None:
    for drawn in samples:
        for one in drawn:
            assert one.token_ids.count(tokenizer.eos_token_id) <= 1
            if one.token_ids[-1] == tokenizer.eos_token_id:
                assert tokenizer.decode(one.token_ids) == one.text + tokenizer.eos_token
            else:
                assert len(one.token_ids) > longest_reply()
                assert parse_reply(one.prompt, one.text) is None


def test_the_seed_alone_decides(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]
) -> None:
    first = sample_replies(model, tokenizer, prompts[:20], 3, seed=5)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    told: list[tuple[int, int]] = []
    again = sample_replies(
        model,
        tokenizer,
        prompts[:20],
        3,
        seed=5,
        progress=lambda task, done, total: told.append((done, total)),
    )
    assert again == first
    assert told == [(20, 20)]
    assert torch.equal(torch.get_rng_state(), before)
    assert sample_replies(model, tokenizer, prompts[:20], 3, seed=6) != first
    assert [len(drawn) for drawn in first] == [3] * 20
    assert [drawn[0].prompt for drawn in first] == prompts[:20]


def test_several_batches_keep_the_order(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]
) -> None:
    drawn = sample_replies(model, tokenizer, prompts[:5], 200, seed=0)
    assert [one.prompt for each in drawn for one in each] == [
        prompt for prompt in prompts[:5] for _ in range(200)
    ]
    # Replies name the item of their own prompt.
    for each in drawn:
        others = [item for item in ITEMS if item != each[0].prompt.item]
        assert np.mean([any(f" {item}" in one.text for item in others) for one in each]) < 0.1


def test_all_of_a_world_is_well_formed_enough_to_learn_from(sandbox: World) -> None:
    for split in SPLITS:
        rows = sandbox.pool(split)
        assert all(len(set(row.replies)) == len(row.replies) == 4 for row in rows)
        found = [parse_reply(row.prompt, reply) is not None for row in rows for reply in row.replies]
        assert np.mean(found) >= WELL_FORMED


DRAWS = 1500


@pytest.fixture(scope="module")
def many(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]
) -> dict[Prompt, list[Sample]]:
    """Many replies to the shortest and to the longest prompt, drawn in one batch, so that one of them is padded."""
    by_length = sorted(prompts, key=lambda prompt: len(tokenizer(prompt.text)["input_ids"]))
    ends = (by_length[0], by_length[-1])
    drawn = [
        one for seed in range(DRAWS // 250) for one in sample_replies(model, tokenizer, ends, 250, seed=seed)
    ]
    return {prompt: [one for each in drawn for one in each if one.prompt == prompt] for prompt in ends}


def chi_square_is_small(counts: Sequence[float], chances: Sequence[float]) -> None:
    """Counts meet probabilities; what is expected less than five times is counted together."""
    draws = sum(counts)
    cells, rest = [], [0.0, 0.0]
    for count, chance in zip(counts, chances, strict=True):
        if draws * chance >= 5:
            cells.append((count, draws * chance))
        else:
            rest[0] += count
            rest[1] += draws * chance
    if rest[1] >= 1:
        cells.append((rest[0], rest[1]))
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    freedom = len(cells) - 1
    assert freedom > 2
    assert statistic < freedom + 4.5 * math.sqrt(2 * freedom), (statistic, freedom)


@torch.no_grad()
def test_first_tokens_are_as_frequent_as_the_model_says(
    many: dict[Prompt, list[Sample]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    for prompt, drawn in many.items():
        logits = model(**tokenizer(prompt.text, return_tensors="pt")).logits[0, -1]
        counts = Counter(one.token_ids[0] for one in drawn)
        chances = logits.double().softmax(0).tolist()
        chi_square_is_small([counts[token] for token in range(len(chances))], chances)


@torch.no_grad()
def test_whole_replies_are_as_frequent_as_the_model_says(
    many: dict[Prompt, list[Sample]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """All 2304 replies by their products of conditional probabilities, the end of the turn included.

    They are too many to be counted one by one, so they are counted by what they have in each slot.
    """
    for prompt, drawn in many.items():
        head = tokenizer(prompt.text)["input_ids"]
        texts = [reply_text(prompt, choice) for choice in CHOICES]
        replies = [
            tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"] for text in texts
        ]
        chances: list[float] = []
        for start in range(0, len(replies), 256):
            batch = replies[start : start + 256]
            width = max(map(len, batch))
            ids = torch.tensor([[*head, *reply, *[0] * (width - len(reply))] for reply in batch])
            logps = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
            chosen = logps.gather(2, ids[:, 1:, None]).squeeze(2)[:, len(head) - 1 :]
            chances += [math.exp(row[: len(reply)].sum()) for row, reply in zip(chosen, batch, strict=True)]
        assert WELL_FORMED < sum(chances) <= 1.0 + 1e-6
        found = [parse_reply(prompt, one.text) for one in drawn]
        malformed = found.count(None), 1 - sum(chances)
        for number, slot in enumerate(SLOTS):
            counts = Counter(choice[number] for choice in found if choice is not None)
            expected = [0.0] * len(slot)
            for choice, chance in zip(CHOICES, chances, strict=True):
                expected[choice[number]] += chance
            chi_square_is_small(
                [*(counts[option] for option in range(len(slot))), malformed[0]], [*expected, malformed[1]]
            )
