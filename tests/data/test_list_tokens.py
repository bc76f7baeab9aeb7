"""Lists of responses in tokens: the same ids as in pairs, what max_length leaves of them, and pairs made of them."""

import io
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from prefopt_cli import data
from prefopt_cli.cli.receipt import print_receipt
from prefopt_cli.data import receipt
from prefopt_cli.data.pairing import couples
from prefopt_cli.errors import UserError
from tests.data.build import CHATML, LLAMA3, MISTRAL, PHI, WITHOUT_TURN_END, jsonl, row, settings, tokenizer

TEXTS = ("Yes I am", "No", "Cats are small", "I am fine, thank you")


def _list(number: int = 0, **columns: Any) -> dict[str, Any]:
    answers = {"responses": [f" {text}" for text in TEXTS], "scores": [1, 4, 2, 3]}
    return {"prompt": f"Question {number}?", **answers, **columns}


def _chat(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _tokenize(
    folder: Path, rows: list[Any], tok: Any = None, lists: Any = "whole", source: Any = (), **others: Any
) -> data.TokenizedData:
    wanted = settings({"source": jsonl(folder / "p.jsonl", rows), **dict(source)}, **others)
    tokens = data.tokenize(data.load(wanted), tok or tokenizer(), wanted, lists=lists)
    tokens.receipt.check()
    return tokens


def _record(tokens: data.TokenizedData) -> Any:
    return tokens.receipt.sets["train"].sources[0]


def test_columns(tmp_path: Path) -> None:
    tok = tokenizer()
    ids = pa.large_list(pa.int32())
    one = _tokenize(tmp_path, [_list()], tok).train
    assert {field.name: field.type for field in one.data.schema} == {
        "row_id": pa.string(), "prompt_ids": ids, "response_ids": pa.large_list(ids), "ranks": ids,
    }  # fmt: skip
    assert one[0]["row_id"] == "p.jsonl:0"
    assert [tok.decode(ids) for ids in one[0]["response_ids"]] == [f" {TEXTS[n]}</s>" for n in (1, 3, 2, 0)]
    assert one[0]["ranks"] == [0, 1, 2, 3]


@pytest.mark.parametrize("template", [None, CHATML, LLAMA3, WITHOUT_TURN_END, MISTRAL, PHI])
def test_ids_are_those_of_pairs(template: str | None, tmp_path: Path) -> None:
    tok = tokenizer(template=template)
    prompt: Any = [{"role": "user", "content": "Tell me"}] if template else "Tell me"
    responses: list[Any] = [_chat(text) if template else f" {text}" for text in TEXTS]
    whole = _tokenize(tmp_path, [{"prompt": prompt, "responses": responses, "ranking": [0, 1, 2, 3]}], tok)
    couple = [{"prompt": prompt, "chosen": one, "rejected": responses[3]} for one in responses[:3]]
    pairs = _tokenize(tmp_path, couple, tok)
    assert whole.train[0]["response_ids"][:3] == [one["response_ids"][0] for one in pairs.train]
    assert whole.train[0]["response_ids"][3] == pairs.train[0]["response_ids"][1]
    assert {tuple(one["prompt_ids"]) for one in pairs.train} == {tuple(whole.train[0]["prompt_ids"])}
    assert whole.stop_ids == pairs.stop_ids
    assert whole.stop_ids[0] == whole.train[0]["response_ids"][0][-1]


def test_stop_ids(tmp_path: Path) -> None:
    def stops(template: str | None) -> list[str]:
        tok = tokenizer(template=template)
        response: Any = _chat("a") if template else "a"
        prompt: Any = [{"role": "user", "content": "q"}] if template else "q"
        other: Any = _chat("b") if template else "b"
        listed = [{"prompt": prompt, "responses": [response, other], "best": 0}]
        return [tok.decode([one]) for one in _tokenize(tmp_path, listed, tok).stop_ids]

    assert stops(None) == stops(MISTRAL) == stops(WITHOUT_TURN_END) == ["</s>"]
    assert stops(CHATML) == ["<|im_end|>", "</s>"]
    assert stops(LLAMA3) == ["<|eot_id|>", "</s>"]


def test_the_prompt_ends_where_the_first_response_leaves_it(tmp_path: Path) -> None:
    tok = tokenizer()
    rows = [{"prompt": "Human: Te", "responses": ["ll me", "a", " so"], "ranking": [1, 0, 2]}]
    tokens = _tokenize(tmp_path, rows, tok)
    assert [tok.decode(ids) for ids in tokens.train[0]["response_ids"]] == [
        " Tea</s>",
        " Tell me</s>",
        " Te so</s>",
    ]
    assert _record(tokens).changed == {receipt.BOUNDARY: 1}


LONG = " Yes" * 40


def test_overlong_responses_are_left_out_of_their_list(tmp_path: Path) -> None:
    rows = [
        _list(0),
        _list(1, responses=[" a", LONG, " c", " d"]),
        _list(2, responses=[" a", LONG, LONG + " x", LONG + " y"]),  # one left
        _list(3, responses=[" a", " b", " c", LONG], scores=[1, 1, 1, 3]),  # only ties left
        _list(4, responses=[" a", " b", LONG, " d"], scores=[3, 2, 2, 1]),
        _list(5, prompt="Question?" * 40),
        _list(6, responses=[" a", LONG], scores=[2, 1]),  # a pair
        _list(7, responses=[" a", " b", LONG], scores=[2, 1, 0]),
    ]
    tokens = _tokenize(tmp_path, rows, max_length=32)
    assert [(one["row_id"][-1], one["ranks"]) for one in tokens.train] == [
        ("0", [0, 1, 2, 3]), ("1", [0, 1, 2]), ("4", [0, 1, 2]), ("7", [0, 1]),
    ]  # fmt: skip
    assert _record(tokens).dropped == {receipt.TOO_LONG: 3, receipt.PROMPT_TOO_LONG: 1}
    assert _record(tokens).changed == {receipt.TOO_LONG_LEFT_OUT: 3}
    figures = tokens.receipt.sets["train"]
    assert (figures.rows, figures.responses, figures.list_sizes) == (4, 12, [2, 4])
    assert figures.lengths["responses"]["total"] == sum(
        len(ids) for one in tokens.train for ids in one["response_ids"]
    )
    assert len(_tokenize(tmp_path, rows, max_length=None).train) == 8


def test_a_list_whose_longest_response_just_fits(tmp_path: Path) -> None:
    one = _tokenize(tmp_path, [_list()]).train[0]
    length = len(one["prompt_ids"]) + max(map(len, one["response_ids"]))
    assert _record(_tokenize(tmp_path, [_list()], max_length=length)).changed == {}
    assert _record(_tokenize(tmp_path, [_list()], max_length=length - 1)).changed == {
        receipt.TOO_LONG_LEFT_OUT: 1
    }


def test_truncation_cuts_every_response_and_merges_what_becomes_the_same(tmp_path: Path) -> None:
    rows = [
        _list(0, responses=[" a", LONG + " x", " c", LONG + " y"]),
        _list(1, responses=[LONG + " z", LONG + " x", LONG + " v", LONG + " y"]),
        _list(2, responses=[LONG + " z", LONG + " x", " b", " d"], scores=[1, 2, 2, 2]),
        _list(3, responses=[LONG + " z", LONG + " x", " b"], scores=[1, 2, 2]),
    ]
    tokens = _tokenize(tmp_path, rows, max_length=32, on_overflow="truncate_response")
    assert [(one["row_id"][-1], one["ranks"]) for one in tokens.train] == [("0", [0, 1, 2])]
    assert len(tokens.train[0]["prompt_ids"]) + max(map(len, tokens.train[0]["response_ids"])) == 32
    assert _record(tokens).dropped == {receipt.FEW: 1, receipt.ALL_TIED: 2}
    assert _record(tokens).changed == {receipt.TRUNCATED: 1, receipt.REPEATED_LEFT_OUT: 1}


def test_one_row_counts_once_for_what_texts_and_tokens_leave_out(tmp_path: Path) -> None:
    rows = [_list(0, responses=[" a", " a", LONG + " x", LONG + " y"], scores=[1, 2, 3, 4])]
    tokens = _tokenize(tmp_path, rows, max_length=32, on_overflow="truncate_response")
    assert _record(tokens).changed == {receipt.REPEATED_LEFT_OUT: 1, receipt.TRUNCATED: 1}


def test_overflow_error_names_lists(tmp_path: Path) -> None:
    rows = [_list(0), _list(1, responses=[" a", LONG, " c", " d"])]
    with pytest.raises(
        UserError, match=r"1 of 2 rows are longer than max_length 32(.|\n)*p.jsonl:1 \(\d+ tokens\)"
    ):
        _tokenize(tmp_path, rows, max_length=32, on_overflow="error")


def test_couples_by_hand() -> None:
    ranks = (0, 1, 1, 2)
    assert couples(ranks, "all_pairs") == ((0, 1), (0, 2), (0, 3), (1, 3), (2, 3))
    assert couples(ranks, "adjacent_pairs") == ((0, 1), (0, 2), (1, 3), (2, 3))
    best = (0, 1, 1, 1)
    assert couples(best, "all_pairs") == couples(best, "adjacent_pairs") == ((0, 1), (0, 2), (0, 3))


def test_pairs_of_a_list_cover_each_comparable_couple_once_and_no_tie() -> None:
    random = Random(0)
    for _ in range(300):
        steps = [random.randrange(2) for _ in range(random.randrange(1, 8))]
        ranks = tuple(sum(steps[: n + 1]) for n in range(len(steps)))
        ranks = tuple(rank - ranks[0] for rank in ranks)
        made = couples(ranks, "all_pairs")
        assert len(set(made)) == len(made)
        assert set(made) == {(i, j) for i, j in product(range(len(ranks)), repeat=2) if ranks[i] < ranks[j]}
        near = couples(ranks, "adjacent_pairs")
        assert set(near) == {(i, j) for i, j in made if ranks[j] - ranks[i] == 1}
        assert len(set(near)) == len(near)


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ("all_pairs", [(0, 1), (0, 2), (0, 3), (1, 3), (2, 3)]),
        ("adjacent_pairs", [(0, 1), (0, 2), (1, 3), (2, 3)]),
    ],
)
def test_lists_made_into_pairs(lists: Any, expected: list[tuple[int, int]], tmp_path: Path) -> None:
    two = {"prompt": "Two?", "responses": [" a", " b"], "best": 1, "scores": [1, 2]}
    rows = [_list(0, scores=[3, 2, 2, 1]), two, _list(2, scores=[1, 2, 2, 3])]
    whole = _tokenize(tmp_path, rows, source={"weight": 2.0})
    made = _tokenize(tmp_path, rows, source={"weight": 2.0}, lists=lists)
    sides = []
    for one in whole.train:
        chosen = expected if len(one["ranks"]) > 2 else [(0, 1)]
        for better, worse in chosen:
            name = f"{one['row_id']}[{better}>{worse}]" if len(one["ranks"]) > 2 else one["row_id"]
            responses = [one["response_ids"][better], one["response_ids"][worse]]
            sides.append(
                {"row_id": name, "prompt_ids": one["prompt_ids"], "response_ids": responses, "ranks": [0, 1]}
            )
    assert made.train.to_list() == sides
    assert len(set(made.train["row_id"])) == len(sides)
    assert f"p.jsonl:0#2[{expected[0][0]}>{expected[0][1]}]" in made.train["row_id"]
    assert "p.jsonl:1#2" in made.train["row_id"]
    figures = made.receipt.sets["train"]
    assert (figures.rows, figures.pairs, figures.pairing) == (6, len(sides), lists)
    assert (figures.responses, figures.list_sizes, figures.prompts) == (20, [2, 4], 3)
    assert _record(made) == _record(whole)
    assert set(figures.lengths) == {"prompt", "chosen", "rejected"}
    longer = [len(one["response_ids"][0]) > len(one["response_ids"][1]) for one in made.train]
    assert figures.chosen_longer == pytest.approx(sum(longer) / len(longer))
    assert whole.receipt.sets["train"].chosen_longer is None
    assert whole.receipt.sets["train"].pairs is None


def test_sets_of_pairs_need_no_pairing(tmp_path: Path) -> None:
    rows = [row(0), row(1)]
    whole, made = (_tokenize(tmp_path, rows, lists=lists) for lists in ("whole", "all_pairs"))
    assert made.train.to_list() == whole.train.to_list()
    assert made.receipt == whole.receipt
    assert (made.receipt.sets["train"].pairs, made.receipt.sets["train"].responses) == (None, None)


def test_eval_sets_are_paired_in_place_too(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "l.jsonl", [_list(n) for n in range(3)])
    wanted = settings(jsonl(tmp_path / "p.jsonl", [row(7)]), eval={"lists": path})
    tokens = data.tokenize(data.load(wanted), tokenizer(), wanted, lists="adjacent_pairs")
    assert tokens.eval["lists"]["row_id"][:4] == [
        "l.jsonl:0[0>1]", "l.jsonl:0[1>2]", "l.jsonl:0[2>3]", "l.jsonl:1[0>1]",
    ]  # fmt: skip
    assert tokens.receipt.sets["lists"].pairs == 9
    assert tokens.receipt.sets["train"].pairs is None


def test_fingerprints_follow_ranks_and_grouping(tmp_path: Path) -> None:
    def prints(rows: list[Any], lists: str = "whole") -> str:
        return _tokenize(tmp_path, rows, lists=lists).fingerprints["train"]

    ordered = {"prompt": "q", "responses": [" a", " b", " c"]}
    found = [
        prints([{**ordered, "scores": [3, 2, 1]}]),
        prints([{**ordered, "scores": [3, 2, 2]}]),
        prints([{**ordered, "scores": [3, 3, 2]}]),
        prints([{**ordered, "responses": [" a", " b c"], "scores": [3, 2]}]),
        prints([{**ordered, "scores": [3, 2, 1]}], "all_pairs"),
        prints([{**ordered, "scores": [3, 2, 1]}], "adjacent_pairs"),
    ]
    assert len(set(found)) == len(found)
    assert prints([{**ordered, "scores": [30, 20, 10]}]) == found[0]


@pytest.mark.parametrize(
    ("lists", "line"),
    [
        ("whole", "train: 3 lists (3 to 4 responses), 3 prompts\n"),
        ("all_pairs", "train: 3 lists made into 15 pairs (all_pairs), 3 prompts; chosen longer in"),
        ("adjacent_pairs", "train: 3 lists made into 8 pairs (adjacent_pairs), 3 prompts; chosen longer in"),
    ],
)
@pytest.mark.parametrize("width", [40, 120])
def test_printing(lists: Any, line: str, width: int, tmp_path: Path) -> None:
    rows = [_list(0), _list(1), _list(2, responses=[" a", " b", " b", " c"])]
    tokens = _tokenize(tmp_path, rows, lists=lists)
    out = io.StringIO()
    print_receipt(tokens.receipt, Console(file=out, width=width))
    assert line in out.getvalue()
    assert "(repeated response left out)" in out.getvalue()
    assert ("responses " in out.getvalue()) == (lists == "whole")


def test_printing_lists_of_one_size_before_tokenisation(tmp_path: Path) -> None:
    out = io.StringIO()
    loaded = data.load(settings(jsonl(tmp_path / "p.jsonl", [_list()])))
    print_receipt(loaded.receipt, Console(file=out, width=80))
    assert "train: 1 lists (4 responses), 1 prompts\n" in out.getvalue()
