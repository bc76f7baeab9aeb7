"""Prompts and replies: all different, read back exactly, and every word in the tokenizer."""

import itertools
from collections import Counter
from random import Random

import pytest
from transformers import PreTrainedTokenizerBase

from prefopt_cli.sandbox.base import build_tokenizer
from prefopt_cli.sandbox.grammar import (
    AFTER,
    BEFORE,
    CHOICES,
    DATES,
    GRADES,
    GREETINGS,
    ITEMS,
    PROBLEMS,
    REMEDY_SLOT,
    REQUESTS,
    RIGHT_REMEDY_WEIGHT,
    SLOTS,
    Prompt,
    draw_choice,
    draw_prompts,
    number_of_prompts,
    parse_prompt,
    parse_reply,
    reply_text,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return draw_prompts(12_000, Random(0))


def test_there_are_many_different_prompts(prompts: list[Prompt]) -> None:
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 12_000
    # Nothing else would do for so many: most of what can be drawn is there to be drawn.
    assert number_of_prompts() > 100_000


def test_every_prompt_parses_back_to_itself(prompts: list[Prompt]) -> None:
    assert [parse_prompt(prompt.text) for prompt in prompts] == prompts


def test_every_phrasing_parses_with_every_greeting_and_request() -> None:
    """No two phrasings can be confused, and none is lost: all but items and dates are gone through."""
    seen = set()
    for problem, phrasings in PROBLEMS.items():
        for greeting, phrasing, request in itertools.product(GREETINGS, phrasings, REQUESTS):
            text = BEFORE + greeting + phrasing.format(item="lamp", date="on Monday") + request + AFTER
            assert parse_prompt(text) == Prompt("lamp", problem, text)
            seen.add(text)
    assert len(seen) * len(ITEMS) * len(DATES) == number_of_prompts()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Customer: Hello.",
        "Customer: You sent me the wrong unicorn on Monday.\nSupport:",
        "Customer: You sent me the wrong lamp on Monday.",
        "Customer: You sent me the wrong lamp on Monday.\nSupport: ",
        "customer: You sent me the wrong lamp on Monday.\nSupport:",
        "Customer: You sent me the wrong lamp on Monday?\nSupport:",
    ],
)
def test_what_is_no_prompt(text: str) -> None:
    assert parse_prompt(text) is None


def test_problems_and_items_are_equally_frequent(prompts: list[Prompt]) -> None:
    for kinds, values in (
        (len(PROBLEMS), [prompt.problem for prompt in prompts]),
        (len(ITEMS), [prompt.item for prompt in prompts]),
    ):
        expected = len(prompts) / kinds
        counts = Counter(values)
        assert len(counts) == kinds
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_drawing_follows_the_seed() -> None:
    assert draw_prompts(50, Random(1)) == draw_prompts(50, Random(1))
    assert draw_prompts(50, Random(1)) != draw_prompts(50, Random(2))
    # A larger world begins like a smaller one.
    assert draw_prompts(50, Random(1)) == draw_prompts(80, Random(1))[:50]


@pytest.mark.parametrize("item", ITEMS)
def test_replies_are_different_and_read_back(item: str) -> None:
    prompt = Prompt(item, "late", "")
    texts = [reply_text(prompt, choice) for choice in CHOICES]
    assert len(set(texts)) == len(CHOICES) == 2304
    assert [parse_reply(prompt, text) for text in texts] == list(CHOICES)


def test_replies_by_hand() -> None:
    prompt = Prompt("lamp", "late", "")
    assert reply_text(prompt, (0, 0, 0, 0, 0)) == " We will refund your lamp."
    longest = (
        " Good morning and thank you for your message. We are very sorry for the trouble. We will send the missing "
        "part of your order within two days. Please let us know if we can do anything else for you."
    )
    assert reply_text(prompt, (2, 2, 7, 2, 2)) == longest
    assert parse_reply(prompt, " What is it now? We will trace your lamp soon. Do not write to us again.") == (
        3, 0, 4, 1, 3,
    )  # fmt: skip


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "We will refund your lamp.",  # without its first space
        " We will refund your lamp. ",
        " We will refund your lamp",
        " We will refund your clock.",  # another item
        " Hello. Hello. We will refund your lamp.",
        " Sorry about that. Hello. We will refund your lamp.",
        " We will refund your lamp soon within two days.",
        " We will refund your lamp.</s>",
    ],
)
def test_what_is_no_reply(reply: str) -> None:
    assert parse_reply(Prompt("lamp", "late", ""), reply) is None


def test_every_word_is_in_the_tokenizer(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> None:
    """Texts come back exactly, and so does each one from beside the other."""
    texts = [prompt.text for prompt in prompts[:3000]]
    for item in ITEMS:
        prompt = Prompt(item, "late", "")
        texts += [reply_text(prompt, choice) for choice in CHOICES[:: 1 if item == "lamp" else 37]]
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == text


def test_words_of_every_slot_and_phrasing_are_known(tokenizer: PreTrainedTokenizerBase) -> None:
    """Every part that any text can be made of, so that sampling texts leaves nothing out."""
    for item, date in itertools.product(ITEMS, DATES):
        for phrasing in itertools.chain.from_iterable(PROBLEMS.values()):
            ids = tokenizer(BEFORE + phrasing.format(item=item, date=date))["input_ids"]
            assert tokenizer.unk_token_id not in ids
    for greeting, request in itertools.product(GREETINGS, REQUESTS):
        ids = tokenizer(f"{BEFORE}{greeting}You sent me the lamp.{request}{AFTER}")["input_ids"]
        assert tokenizer.unk_token_id not in ids


def test_every_token_is_a_word_of_the_world(tokenizer: PreTrainedTokenizerBase) -> None:
    """A token that no text has would only be one more way of writing nonsense."""
    texts = [
        f"{BEFORE}{greeting}{phrasing.format(item=ITEMS[0], date=DATES[0])}{AFTER}"
        for greeting in GREETINGS
        for phrasing in itertools.chain.from_iterable(PROBLEMS.values())
    ]
    texts += [f"{BEFORE}You sent me the {item} {date}.{AFTER}" for item in ITEMS for date in DATES]
    texts += [f"{BEFORE}You sent me the lamp.{request}{AFTER}" for request in REQUESTS]
    texts += [reply_text(Prompt("lamp", "late", ""), choice) for choice in CHOICES]
    occurring = {number for ids in tokenizer(texts)["input_ids"] for number in ids}
    special = set(tokenizer.all_special_ids)
    unused = set(tokenizer.get_vocab().values()) - occurring - special
    assert [tokenizer.convert_ids_to_tokens(number) for number in sorted(unused)] == []


def test_prompt_and_reply_are_tokenised_alike_together_and_apart(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]
) -> None:
    random = Random(0)
    for prompt in prompts[:500]:
        reply = reply_text(prompt, draw_choice(prompt, random)) + tokenizer.eos_token
        apart = tokenizer(prompt.text)["input_ids"] + tokenizer(reply, add_special_tokens=False)["input_ids"]
        assert tokenizer(prompt.text + reply)["input_ids"] == apart
        assert apart[0] == tokenizer.bos_token_id
        assert apart[-1] == tokenizer.eos_token_id
        assert apart.count(tokenizer.bos_token_id) == 1


def test_special_tokens_are_four_different_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert ids == [0, 1, 2, 3]
    assert tokenizer.convert_tokens_to_ids("unicorn") == tokenizer.unk_token_id


def test_every_problem_has_one_right_remedy() -> None:
    remedies = {option.remedy for option in SLOTS[REMEDY_SLOT]}
    for problem in PROBLEMS:
        assert set(GRADES[problem]) == remedies
        assert sorted(GRADES[problem].values())[-2:] < [0.8, 1.0]
        assert sum(grade == 1.0 for grade in GRADES[problem].values()) == 1


def test_replies_are_drawn_by_their_weights() -> None:
    """Slots independently, the right remedy more often: what the base policy learns from."""
    prompt, random, draws = Prompt("lamp", "late", ""), Random(0), 20_000
    drawn = [draw_choice(prompt, random) for _ in range(draws)]
    for number, slot in enumerate(SLOTS):
        weights = [
            option.weight * (RIGHT_REMEDY_WEIGHT if option.remedy == "trace" else 1.0) for option in slot
        ]
        counts = Counter(choice[number] for choice in drawn)
        for option, weight in enumerate(weights):
            chance = weight / sum(weights)
            error = (draws * chance * (1 - chance)) ** 0.5
            assert abs(counts[option] - draws * chance) < 5 * error
