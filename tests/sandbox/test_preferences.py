"""Preference rows: labels follow Bradley-Terry and Plackett-Luce, and training sees nothing but texts."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from prefopt_cli import data
from prefopt_cli.data.formats import FORMATS, Unfit, detect
from prefopt_cli.sandbox.grammar import CHOICES, draw_prompts, parse_prompt, reply_text
from prefopt_cli.sandbox.names import DIMENSIONS, KINDS, PreferencesName
from prefopt_cli.sandbox.preferences import BY_KIND, MATCHES, best_of_n, pairs, ranked, text_rewards
from prefopt_cli.sandbox.world import PoolRow
from tests.data.build import jsonl, settings

PROMPT = parse_prompt("Customer: I am still waiting for the lamp I ordered last week.\nSupport:")
assert PROMPT is not None

BEST = " We will trace your lamp soon."  # helpful 4.3
GOOD = " We will replace your lamp soon."  # helpful 1.8 + 1.3 = 3.1
FAIR = " We will refund your order soon."  # helpful 1.5 + 0.3 = 1.8
POOR = " We will explain how to use your lamp soon."  # helpful 1.3
REPLIES = (GOOD, POOR, BEST, FAIR)
HELPFUL = (3.1, 1.3, 4.3, 1.8)

ROWS = 20_000
TEMPERATURES = (0.5, 1.0, 3.0)
BOUND = 4.5
"""Standard errors by which a frequency may be off."""


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def made_up_rows(count: int = 300) -> list[PoolRow]:
    """Prompts with four different well-formed replies each, drawn evenly."""
    random = Random(0)
    return [
        PoolRow(prompt, tuple(reply_text(prompt, choice) for choice in random.sample(CHOICES, 4)))
        for prompt in draw_prompts(count, random)
    ]


def test_replies_are_worth_what_the_tests_count_on() -> None:
    assert [text_rewards(PROMPT, reply)["helpful"] for reply in REPLIES] == pytest.approx(HELPFUL)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(("first", "second"), [(GOOD, FAIR), (POOR, FAIR)])
def test_pairs_follow_bradley_terry(temperature: float, first: str, second: str) -> None:
    name = PreferencesName("helpful", temperature)
    made = list(pairs([PoolRow(PROMPT, (first, second))] * ROWS, "train", name))
    assert len(made) == ROWS
    worth = {text: text_rewards(PROMPT, text)["helpful"] for text in (first, second)}
    expected = sigmoid((worth[first] - worth[second]) / temperature)
    won = sum(row["chosen"] == first for row in made) / ROWS
    assert abs(won - expected) < BOUND * math.sqrt(expected * (1 - expected) / ROWS)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_lists_follow_plackett_luce(temperature: float) -> None:
    """P(order) = product over places of exp(r / T) / sum of those not placed yet."""
    rows = [PoolRow(PROMPT, REPLIES)] * ROWS
    made = list(ranked(rows, "train", PreferencesName("helpful", temperature)))
    weights = [math.exp(reward / temperature) for reward in HELPFUL]
    firsts = Counter(row["ranking"].index(0) for row in made)
    for position, weight in enumerate(weights):
        chance = weight / sum(weights)
        assert abs(firsts[position] / ROWS - chance) < BOUND * math.sqrt(chance * (1 - chance) / ROWS)
    orders = Counter(tuple(row["ranking"].index(place) for place in range(4)) for row in made)
    statistic = 0.0
    for order in itertools.permutations(range(4)):
        chance = math.prod(weights[order[n]] / sum(weights[m] for m in order[n:]) for n in range(4))
        statistic += (orders[order] - ROWS * chance) ** 2 / (ROWS * chance)
    # Chi-square with 23 degrees of freedom; beyond 58 in one of 10,000 samples.
    assert statistic < 58


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("temperature", [0.0, 1e-320])
def test_without_noise_labels_follow_the_reward(dimension: str, temperature: float) -> None:
    """Also where the reward divided by the temperature would be more than a number can hold."""
    name, rows = PreferencesName(dimension, temperature), made_up_rows()
    for row in pairs(rows, "train", name):
        assert row["chosen_gold"][dimension] >= row["rejected_gold"][dimension]
    for row in ranked(rows, "train", name):
        in_order = [row["gold"][row["ranking"].index(place)][dimension] for place in range(4)]
        assert in_order == sorted(in_order, reverse=True)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_replies_worth_the_same_win_equally_often(temperature: float) -> None:
    equal = (" We will refund your lamp.", " Hello. We will refund your lamp.")
    made = pairs([PoolRow(PROMPT, equal)] * 4000, "train", PreferencesName("helpful", temperature))
    won = sum(row["chosen"] == equal[0] for row in made)
    assert abs(won - 2000) < BOUND * math.sqrt(1000)


def test_two_temperatures_share_their_noise() -> None:
    """Whoever sees the difference through more noise also sees it through less."""
    rows = [PoolRow(PROMPT, (GOOD, FAIR))] * 2000

    def right(temperature: float) -> set[str]:
        made = pairs(rows, "train", PreferencesName("helpful", temperature))
        return {row["id"] for row in made if row["chosen"] == GOOD}

    hot, warm, cold = right(3.0), right(1.0), right(0.25)
    assert hot < warm < cold


@pytest.mark.parametrize(
    "other",
    [PreferencesName("polite"), PreferencesName("helpful", seed=1)],
    ids=["another dimension", "another world"],
)
def test_dimensions_worlds_and_splits_have_noise_of_their_own(other: PreferencesName) -> None:
    """The two replies are worth the same in both dimensions, so that only noise decides."""
    one, other_one = " We will explain how to use your lamp.", " We will send the missing part of your lamp."
    # Whichever replies a dimension compares, they are these two.
    rows = [PoolRow(PROMPT, (one, other_one, other_one, one))] * 1000

    def firsts(name: PreferencesName, split: str) -> list[bool]:
        return [row["chosen"] == one for row in pairs(rows, split, name)]

    own = firsts(PreferencesName("helpful"), "train")
    for different in (firsts(other, "train"), firsts(PreferencesName("helpful"), "test")):
        same = sum(a == b for a, b in zip(own, different, strict=True))
        assert abs(same - 1000) < BOUND * math.sqrt(500)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_depend_on_the_row_alone(kind: str) -> None:
    """The same rows give the same labels, however many come after them."""
    name, rows = PreferencesName("polite"), made_up_rows(60)
    whole = list(BY_KIND[kind](rows, "train", name))
    assert whole == list(BY_KIND[kind](rows, "train", name))
    few = list(BY_KIND[kind](rows[:20], "train", name))
    assert few == whole[: len(few)]


def test_a_prompt_gives_two_pairs_of_its_four_replies() -> None:
    rows = made_up_rows(50)
    made = list(pairs(rows, "test", PreferencesName("polite")))
    assert len({row["id"] for row in made}) == len(made) == 100
    for number, row in enumerate(rows):
        for part in (0, 1):
            found = made[2 * number + part]
            assert found["prompt"] == row.prompt.text
            assert {found["chosen"], found["rejected"]} == {
                row.replies[place] for place in MATCHES["polite"][part]
            }


def test_dimensions_compare_different_replies() -> None:
    """Otherwise a mixture of dimensions would lose the pairs that both label alike, as duplicates."""
    row = made_up_rows(1)[0]
    compared = [
        frozenset((made["chosen"], made["rejected"]))
        for dimension in DIMENSIONS
        for made in pairs([row], "train", PreferencesName(dimension))
    ]
    assert len(set(compared)) == 2 * len(DIMENSIONS)


def test_best_of_n_is_the_winner_of_the_ranking() -> None:
    rows, name = made_up_rows(50), PreferencesName("concise")
    for listed, best in zip(ranked(rows, "train", name), best_of_n(rows, "train", name), strict=True):
        assert sorted(listed["ranking"]) == [0, 1, 2, 3]
        assert listed["ranking"][best["best"]] == 0
        assert "ranking" not in best
        assert best["responses"] == listed["responses"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_carry_the_gold_rewards_of_every_dimension(kind: str) -> None:
    rows = made_up_rows(20)
    by_text = {row.prompt.text: row.prompt for row in rows}
    for row in BY_KIND[kind](rows, "train", PreferencesName("polite")):
        prompt = by_text[row["prompt"]]
        if kind == "pairs":
            texts, gold = [row["chosen"], row["rejected"]], [row["chosen_gold"], row["rejected_gold"]]
        else:
            texts, gold = row["responses"], row["gold"]
        assert gold == [text_rewards(prompt, text) for text in texts]
        assert (row["dimension"], row["problem"], row["item"]) == ("polite", prompt.problem, prompt.item)


def test_training_reads_nothing_but_texts(tmp_path: Path) -> None:
    """Loaded as a recipe's data: prompt, chosen and rejected come through, and the gold rewards change nothing."""
    rows = list(pairs(made_up_rows(20), "train", PreferencesName("helpful")))
    loaded = data.load(settings(jsonl(tmp_path / "rows.jsonl", rows)))
    assert [(pair.prompt, pair.responses, pair.ranks) for pair in loaded.train] == [
        (row["prompt"], (row["chosen"], row["rejected"]), (0, 1)) for row in rows
    ]
    wrong = [
        {**row, "chosen_gold": row["rejected_gold"], "rejected_gold": row["chosen_gold"], "dimension": "none"}
        for row in rows
    ]
    again = data.load(settings(jsonl(tmp_path / "rows.jsonl", wrong)))
    assert again.train == loaded.train


@pytest.mark.parametrize("kind", ["ranked", "best_of_n"])
def test_lists_are_read_by_their_labels_alone(tmp_path: Path, kind: str) -> None:
    """The format is detected, ranks are ranks, and the gold rewards beside them are no scores."""
    rows = list(BY_KIND[kind](made_up_rows(20), "train", PreferencesName("helpful")))
    loaded = data.load(settings(jsonl(tmp_path / "rows.jsonl", rows)))
    assert {source.format for source in loaded.receipt.sets["train"].sources} == {kind}
    for listed, row in zip(loaded.train, rows, strict=True):
        ranks = row["ranking"] if kind == "ranked" else [int(n != row["best"]) for n in range(4)]
        in_order = sorted(range(4), key=ranks.__getitem__)
        assert listed.prompt == row["prompt"]
        assert listed.responses == tuple(row["responses"][n] for n in in_order)
        assert listed.ranks == tuple(ranks[n] for n in in_order)
    wrong = [{**row, "gold": row["gold"][::-1], "dimension": "none"} for row in rows]
    assert data.load(settings(jsonl(tmp_path / "rows.jsonl", wrong))).train == loaded.train


def test_no_format_uses_a_column_beside_the_texts() -> None:
    """What the first format that fits reads is the same with the texts alone."""
    rows = list(pairs(made_up_rows(20), "train", PreferencesName("helpful")))
    assert detect(rows, "here") == "standard"
    for format in FORMATS.values():
        for row in rows:
            texts = {key: row[key] for key in ("prompt", "chosen", "rejected")}
            try:
                read = format.read(row)
            except Unfit:
                with pytest.raises(Unfit):
                    format.read(texts)
            else:
                assert read == format.read(texts)


def test_rows_are_plain_json() -> None:
    for kind in KINDS:
        made = list(BY_KIND[kind](made_up_rows(5), "train", PreferencesName("helpful")))
        assert json.loads(json.dumps(made)) == made
