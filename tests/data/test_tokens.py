"""Prompt/response boundaries, BOS and end-of-turn, over tokenizers and templates of several kinds."""

from pathlib import Path
from typing import Any

import pytest

from prefopt_cli import data
from prefopt_cli.data import receipt
from prefopt_cli.errors import UserError
from tests.data.build import (
    CHATML,
    LLAMA3,
    LLAMA3_WITHOUT_BOS,
    MISTRAL,
    PHI,
    WITHOUT_TURN_END,
    chat_row,
    jsonl,
    row,
    settings,
    tokenizer,
)


def _tokenize(folder: Path, rows: list[Any], tok: Any, **others: Any) -> data.TokenizedData:
    wanted = settings(jsonl(folder / "p.jsonl", rows), **others)
    return data.tokenize(data.load(wanted), tok, wanted)


def _texts(tok: Any, one: dict[str, Any]) -> list[str]:
    return [tok.decode(ids) for ids in (one["prompt_ids"], *one["response_ids"])]


def _side(tokens: data.TokenizedData, number: int) -> list[list[int]]:
    return [responses[number] for responses in tokens.train["response_ids"]]


def _record(tokens: data.TokenizedData) -> Any:
    tokens.receipt.check()
    return tokens.receipt.sets["train"].sources[0]


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("adds_eos", [True, False])
def test_plain_text(adds_bos: bool, adds_eos: bool, tmp_path: Path) -> None:
    tok = tokenizer(adds_bos=adds_bos, adds_eos=adds_eos)
    tokens = _tokenize(tmp_path, [row()], tok)
    assert _texts(tok, tokens.train[0]) == ["<s>" * adds_bos + "Question 0?", " Yes 0</s>", " No 0</s>"]
    facts = tokens.receipt.special_tokens or {}
    assert facts["bos"] == ("<s>" if adds_bos else None)
    assert facts["tokenizer_appends_eos"] == adds_eos
    assert ("No BOS" in facts["verdict"]) != adds_bos
    assert _record(tokens).changed == {}


@pytest.mark.parametrize(
    ("template", "adds_bos", "prompt", "chosen", "verdict"),
    [
        (
            CHATML,
            False,
            "<|im_start|>user\nTell me<|im_end|>\n<|im_start|>assistant\n",
            "Yes I am<|im_end|>",
            "<|im_end|> from the chat template ends every response; the '\\n' that it writes after it",
        ),
        (
            LLAMA3,
            True,
            "<s><|start|>user<|end|>\n\nTell me<|eot_id|><|start|>assistant<|end|>\n\n",
            "Yes I am<|eot_id|>",
            "the chat template writes it, and the tokenizer's own is not added",
        ),
        (
            LLAMA3_WITHOUT_BOS,
            True,
            "<s><|start|>user<|end|>\n\nTell me<|eot_id|><|start|>assistant<|end|>\n\n",
            "Yes I am<|eot_id|>",
            "leaves it out though the tokenizer adds one",
        ),
        (
            WITHOUT_TURN_END,
            False,
            "user: Tell me\nassistant:",
            " Yes I am</s>",
            "writes no end-of-turn; </s> is appended",
        ),
        (MISTRAL, True, "<s>[INST] Tell me [/INST]", " Yes I am</s>", "</s> from the chat template"),
        (
            PHI,
            False,
            "<|start|>user\nTell me<|eot_id|>\n<|start|>assistant\n",
            "Yes I am<|eot_id|>",
            "the '\\n</s>' that it writes after it is left out",
        ),
    ],
    ids=["chatml", "llama3", "llama3-without-bos", "no-turn-end", "mistral", "phi"],
)
def test_chat_templates(
    template: str, adds_bos: bool, prompt: str, chosen: str, verdict: str, tmp_path: Path
) -> None:
    tok = tokenizer(adds_bos=adds_bos, template=template)
    tokens = _tokenize(tmp_path, [chat_row()], tok)
    assert _texts(tok, tokens.train[0])[:2] == [prompt, chosen]
    assert verdict in (tokens.receipt.special_tokens or {})["verdict"]
    assert receipt.BOUNDARY not in _record(tokens).changed


@pytest.mark.parametrize("template", [CHATML, LLAMA3, WITHOUT_TURN_END, MISTRAL, PHI])
def test_end_of_turn_written_out_in_the_text_is_not_doubled(template: str, tmp_path: Path) -> None:
    tok = tokenizer(template=template)
    turn = (_tokenize(tmp_path, [chat_row()], tok).receipt.special_tokens or {})["end_of_turn"]
    rows = [
        chat_row(),
        chat_row("Other", "Yes I am" + turn),
        chat_row("Third", "Yes I am</s> ", "No" + turn + turn),
    ]
    tokens = _tokenize(tmp_path, rows, tok)
    assert len({tuple(one) for one in _side(tokens, 0)}) == 1
    assert len({tuple(one) for one in _side(tokens, 1)}) == 1
    assert _record(tokens).changed == {receipt.TURN_IN_TEXT: 2}
    assert _record(tokens).examples == {receipt.TURN_IN_TEXT: ["p.jsonl:1", "p.jsonl:2"]}


def test_bos_and_eos_written_out_in_plain_text(tmp_path: Path) -> None:
    tok = tokenizer()
    rows = [row(0), row(0, prompt="<s>Question 0?", chosen=" Yes 0</s>"), row(1, chosen=" a</s> b")]
    tokens = _tokenize(tmp_path, rows, tok)
    assert _texts(tok, tokens.train[0]) == _texts(tok, tokens.train[1])
    assert _record(tokens).changed == {
        receipt.BOS_IN_TEXT: 1,
        receipt.TURN_IN_TEXT: 1,
        receipt.TURN_INSIDE: 1,
    }


def test_a_boundary_inside_a_token_moves_the_response_forward(tmp_path: Path) -> None:
    tok = tokenizer()
    tokens = _tokenize(tmp_path, [row(0, prompt="Human: Tell", chosen=" me", rejected="ing")], tok)
    whole = {
        side: tok("Human: Tell" + text)["input_ids"] + [tok.eos_token_id]
        for side, text in (("chosen", " me"), ("rejected", "ing"))
    }
    for side, expected in enumerate(whole.values()):
        assert tokens.train[0]["prompt_ids"] + tokens.train[0]["response_ids"][side] == expected
    split = _tokenize(tmp_path, [row(0, prompt="Human: Te", chosen="ll me", rejected="a")], tok)
    assert tok.decode(split.train[0]["response_ids"][0]) == " Tell me</s>"
    assert tok.decode(split.train[0]["response_ids"][1]) == " Tea</s>"
    assert _record(split).changed == {receipt.BOUNDARY: 1}


def test_empty_prompts_need_a_bos(tmp_path: Path) -> None:
    rows = [row(0, prompt=""), row(1)]
    assert len(_tokenize(tmp_path, rows, tokenizer()).train) == 2
    tokens = _tokenize(tmp_path, rows, tokenizer(adds_bos=False))
    assert _record(tokens).dropped == {receipt.EMPTY_PROMPT: 1}


def test_rows_that_the_template_refuses_are_counted(tmp_path: Path) -> None:
    system = chat_row("Why?")
    system["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    tok = tokenizer(template=MISTRAL)
    tokens = _tokenize(tmp_path, [system, chat_row()], tok)
    assert _record(tokens).dropped == {receipt.REFUSED: 1}
    with pytest.raises(UserError, match="refuses the data: only user and assistant"):
        _tokenize(tmp_path, [system], tok)


def test_missing_templates_and_eos_tokens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.chat_template: path"):
        _tokenize(tmp_path, [chat_row()], tokenizer())
    with pytest.raises(UserError, match="no eos token"):
        _tokenize(tmp_path, [row()], tokenizer(eos=None))


LONG = [
    row(0),
    row(1, chosen=" Yes" * 40),
    row(2, prompt="Question?" * 40),
    row(3, chosen=" No" * 40 + " a", rejected=" No" * 40 + " b"),
]


def test_overflow_drop(tmp_path: Path) -> None:
    tokens = _tokenize(tmp_path, LONG, tokenizer(), max_length=32)
    assert tokens.train["row_id"][:] == ["p.jsonl:0"]
    assert _record(tokens).dropped == {receipt.PROMPT_TOO_LONG: 1, receipt.TOO_LONG: 2}
    assert len(_tokenize(tmp_path, LONG, tokenizer(), max_length=None).train) == 4


def test_overflow_truncate_response(tmp_path: Path) -> None:
    tok = tokenizer()
    tokens = _tokenize(tmp_path, LONG, tok, max_length=32, on_overflow="truncate_response")
    short, cut = tokens.train
    assert _record(tokens).dropped == {receipt.PROMPT_TOO_LONG: 1, receipt.IDENTICAL_TOKENS: 1}
    assert _record(tokens).changed == {receipt.TRUNCATED: 1}
    assert len(cut["prompt_ids"] + cut["response_ids"][0]) == 32
    assert tok.eos_token_id not in cut["response_ids"][0]
    assert cut["response_ids"][1][-1] == short["response_ids"][0][-1] == tok.eos_token_id


def test_a_row_of_exactly_max_length_fits(tmp_path: Path) -> None:
    tok = tokenizer()
    one = _tokenize(tmp_path, LONG[:1], tok).train[0]
    length = len(one["prompt_ids"]) + max(len(one["response_ids"][0]), len(one["response_ids"][1]))
    assert len(_tokenize(tmp_path, LONG[:1], tok, max_length=length).train) == 1
    with pytest.raises(UserError, match=r"no usable rows left \(response too long 1\)"):
        _tokenize(tmp_path, LONG[:1], tok, max_length=length - 1)


def test_overflow_error_names_rows_and_lengths(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"3 of 4 rows are longer than max_length 32(.|\n)*p.jsonl:1 \(\d+ tokens\)"
    ):
        _tokenize(tmp_path, LONG, tokenizer(), max_length=32, on_overflow="error")


def test_repeats_share_their_rows_tokens_and_counts(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [*LONG, *[row(n) for n in range(4, 600)]])
    wanted = settings({"source": path, "weight": 2.5}, shuffle=True, max_length=32)
    steps: list[tuple[str, int, int]] = []
    tokens = data.tokenize(data.load(wanted), tokenizer(), wanted, progress=lambda *step: steps.append(step))
    by_id = {one["row_id"]: one["response_ids"][0] for one in tokens.train}
    assert len(by_id) == len(tokens.train) == tokens.receipt.sets["train"].rows
    assert all(by_id[name] == by_id[name.partition("#")[0]] for name in by_id)
    assert (_record(tokens).kept, sum(_record(tokens).dropped.values())) == (597, 3)
    assert steps[-1] == ("tokenising train", 600, 600)


def test_fingerprints_follow_content_and_order_only(tmp_path: Path) -> None:
    rows = [row(0), row(1)]
    (tmp_path / "moved").mkdir()
    first = _tokenize(tmp_path, rows, tokenizer()).fingerprints
    assert first == _tokenize(tmp_path / "moved", rows, tokenizer()).fingerprints
    assert first != _tokenize(tmp_path, rows[::-1], tokenizer()).fingerprints
    assert first != _tokenize(tmp_path, [row(0), row(1, chosen="Yes")], tokenizer()).fingerprints
    # The same tokens in all, cut at another place.
    moved = [
        row(0, prompt="Question 0? Yes", chosen=" 0", rejected=" 1"),
        row(0, chosen=" Yes 0", rejected=" Yes 1"),
    ]
    assert len({tuple(_tokenize(tmp_path, [one], tokenizer()).fingerprints.values()) for one in moved}) == 2


def test_plain_and_chat_sources_in_one_set(tmp_path: Path) -> None:
    tok = tokenizer(template=LLAMA3)
    paths = [jsonl(tmp_path / "plain.jsonl", [row()]), jsonl(tmp_path / "chat.jsonl", [chat_row()])]
    wanted = settings(paths, eval={"chats": paths[1]})
    tokens = data.tokenize(data.load(wanted), tok, wanted)
    assert [tok.decode(one[-1:]) for one in _side(tokens, 0)] == ["</s>", "<|eot_id|>"]
    assert tokens.eval["chats"][0]["response_ids"][0] == tokens.train[1]["response_ids"][0]
    assert tokens.receipt.sets["chats"].leaked_prompts == 1
    assert set(tokens.fingerprints) == {"train", "chats"}


def test_responses_that_run_into_further_turns_are_counted(tmp_path: Path) -> None:
    """Dialogues that part before their last turn: what the person says next would be trained too."""
    start = "\n\nHuman: Hi\n\nAssistant:"
    rows = [
        {"chosen": f"{start} A.\n\nHuman: B\n\nAssistant: C", "rejected": f"{start} D."},
        {"chosen": f"{start} One.", "rejected": f"{start} Two."},
    ]
    assert _record(_tokenize(tmp_path, rows, tokenizer())).changed == {receipt.SPANS_TURNS: 1}
