"""Prompts to sample responses for: taken from rows of any kind, their responses aside."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prefopt_cli import data
from prefopt_cli.cli.receipt import print_receipt
from prefopt_cli.data.receipt import (
    BEYOND_LIMIT,
    DUPLICATE,
    EMPTY_PROMPT,
    FILTERED,
    IDENTICAL,
    PROMPT_TOO_LONG,
    REFUSED,
)
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import Source
from tests.data.build import (
    CHATML,
    LLAMA3,
    LLAMA3_WITHOUT_BOS,
    MISTRAL,
    chat_row,
    jsonl,
    row,
    rows,
    settings,
    tokenizer,
)

USER = {"role": "user", "content": "Why?"}
YES = {"role": "assistant", "content": "Yes"}
NO = {"role": "assistant", "content": "No"}
TRANSCRIPT = "\n\nHuman: Why?\n\nAssistant:"


def _load(folder: Path, listed: list[Any], others: dict[str, Any] | None = None, **source: Any) -> Any:
    train = jsonl(folder / "train.jsonl", [row(99)])
    path = jsonl(folder / "asked.jsonl", listed)
    loaded = data.load(settings(train, **(others or {})), prompts=[Source(source=path, **source)])
    loaded.receipt.check()
    return loaded


def _record(loaded: Any) -> Any:
    return loaded.receipt.sets["prompts"].sources[0]


@pytest.mark.parametrize(
    ("columns", "format", "expected"),
    [
        ({"prompt": "Why?"}, "prompt", "Why?"),
        ({"prompt": [USER]}, "prompt", [USER]),
        ({"prompt": [YES, USER]}, "prompt", [YES, USER]),
        (row(1), "prompt", "Question 1?"),
        ({"prompt": "Why?", "chosen": "same", "rejected": "same"}, "prompt", "Why?"),
        (chat_row("Hi"), "prompt", [{"role": "user", "content": "Hi"}]),
        ({"prompt": "Why?", "responses": ["a"], "scores": [1]}, "prompt", "Why?"),
        ({"prompt": "Why?", "responses": ["a", "b"], "scores": [1, 1]}, "prompt", "Why?"),
        ({"prompt": "Why?", "responses": ["a", "b"], "best": 9}, "prompt", "Why?"),
        ({"prompt": [USER], "responses": [[YES], [NO]], "best": 0}, "prompt", [USER]),
        # The string only repeats the first message: chats are asked as chats.
        (
            {"prompt": "Why?", "chosen": [USER, YES], "rejected": [USER, NO]},
            "implicit_conversational",
            [USER],
        ),
        ({"chosen": [USER, YES], "rejected": [USER, NO]}, "implicit_conversational", [USER]),
        ({"chosen": TRANSCRIPT + " a", "rejected": TRANSCRIPT + " b"}, "hh_transcript", TRANSCRIPT),
        ({"chosen": "It is red", "rejected": "It is blue"}, "implicit_standard", "It is"),
    ],
)
def test_prompts_of_every_format(columns: dict[str, Any], format: str, expected: Any, tmp_path: Path) -> None:
    loaded = _load(tmp_path, [columns])
    assert [(one.prompt, one.responses, one.ranks) for one in loaded.prompts] == [(expected, (), ())]
    assert _record(loaded).format == format
    assert loaded.receipt.sets["prompts"].leaked_prompts is None
    assert list(loaded.sets) == ["train"]


@pytest.mark.parametrize("format", ["standard", "scored"])
def test_a_named_format_with_a_prompt_column_needs_no_responses(format: str, tmp_path: Path) -> None:
    loaded = _load(tmp_path, [{"prompt": "Why?", "scores": [None]}], format=format)
    assert loaded.prompts[0].prompt == "Why?"


def test_a_renamed_column(tmp_path: Path) -> None:
    assert _load(tmp_path, [{"question": "Why?"}], columns={"prompt": "question"}).prompts[0].prompt == "Why?"


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    listed = [
        {"prompt": [USER]},
        {"prompt": [USER]},
        {"prompt": [USER, YES]},
        {"prompt": [{**USER, "content": " \n"}]},
        {"prompt": []},
        {"prompt": [{"role": "user", "content": None}]},
        {"prompt": None},
        {"prompt": [USER, YES, USER]},
    ]
    loaded = _load(tmp_path, listed)
    assert [one.row_id for one in loaded.prompts] == ["asked.jsonl:0", "asked.jsonl:7"]
    assert _record(loaded).dropped == {
        DUPLICATE: 1,
        EMPTY_PROMPT: 1,
        "malformed: prompt ends with an assistant message": 1,
        "malformed: prompt is an empty list, not messages": 1,
        "malformed: a message in prompt lacks a text role or content": 1,
        "malformed: prompt is nothing, not text": 1,
    }
    assert (loaded.receipt.sets["prompts"].rows, loaded.receipt.sets["prompts"].prompts) == (2, 2)


def test_plain_prompts_that_are_dropped(tmp_path: Path) -> None:
    listed = [*({"prompt": f"q{n}"} for n in (1, 2, 1)), {"prompt": " \n"}, {"prompt": 3}]
    assert _record(_load(tmp_path, listed)).dropped == {
        DUPLICATE: 1,
        EMPTY_PROMPT: 1,
        "malformed: prompt is number, not text": 1,
    }


def test_a_prompt_that_is_inferred_needs_responses_that_differ(tmp_path: Path) -> None:
    listed = [{"chosen": f"It is {n}", "rejected": "It is red"} for n in ("blue", "red", "black")]
    assert _record(_load(tmp_path, listed)).dropped == {IDENTICAL: 1, DUPLICATE: 1}


def test_where_limit_and_shuffle(tmp_path: Path) -> None:
    listed = [row(n, kind="ab"[n % 2]) for n in range(40)]

    def draw(**others: Any) -> tuple[list[str], Any]:
        loaded = _load(tmp_path, listed, others, where={"kind": "a"}, limit=5)
        return [one.prompt for one in loaded.prompts], _record(loaded)

    first, record = draw()
    assert first == [f"Question {n}?" for n in (0, 2, 4, 6, 8)]
    assert record.dropped == {FILTERED: 20, BEYOND_LIMIT: 15}
    assert draw(shuffle=True) == draw(shuffle=True)
    assert draw(shuffle=True)[0] not in (first, draw(shuffle=True, seed=1)[0])


def test_several_sources_share_no_prompt(tmp_path: Path) -> None:
    paths = [jsonl(tmp_path / f"{name}.jsonl", rows(count)) for name, count in (("a", 3), ("b", 4))]
    loaded = data.load(settings(paths[0]), prompts=[Source(source=path) for path in paths])
    assert [one.row_id for one in loaded.prompts or []] == [*(f"a.jsonl:{n}" for n in range(3)), "b.jsonl:3"]
    assert loaded.receipt.sets["prompts"].sources[1].dropped == {DUPLICATE: 3}
    assert data.load(settings(paths[0])).prompts is None


def test_prompts_that_cannot_be_had(tmp_path: Path) -> None:
    def message(listed: list[Any], others: Any = None, **source: Any) -> str:
        with pytest.raises(UserError) as caught:
            _load(tmp_path, listed, others, **source)
        return str(caught.value)

    assert "only training sources are weighted" in message([row()], weight=2.0)
    assert "prompt: text or a list of messages" in message([{"question": "Why?"}])
    assert "prompts has no usable rows left (empty prompt 1)" in message([{"prompt": " "}])
    path = jsonl(tmp_path / "e.jsonl", rows(2))
    assert "give it another name" in message([row()], {"eval": {"prompts": path}})
    assert list(data.load(settings(path, eval={"prompts": path})).eval) == ["prompts"]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, LLAMA3_WITHOUT_BOS, MISTRAL])
def test_chat_prompts_in_tokens_are_those_of_pairs(template: str, tmp_path: Path) -> None:
    tok = tokenizer(template=template)
    train = jsonl(tmp_path / "p.jsonl", [chat_row("Tell me"), chat_row("Why?")])
    asked = jsonl(tmp_path / "q.jsonl", [{"prompt": chat_row("Tell me")["prompt"]}, chat_row("Why?")])
    wanted = settings(train)
    tokens = data.tokenize(data.load(wanted, prompts=[Source(source=asked)]), tok, wanted)
    assert tokens.prompts is not None
    assert tokens.prompts.column_names == ["row_id", "prompt_ids"]
    assert tokens.prompts["row_id"][:] == ["q.jsonl:0", "q.jsonl:1"]
    assert tokens.prompts["prompt_ids"][:] == tokens.train["prompt_ids"][:]
    assert set(tokens.fingerprints) == {"train", "prompts"}
    figures = tokens.receipt.sets["prompts"]
    assert (list(figures.lengths), figures.chosen_longer, figures.leaked_prompts) == (["prompt"], None, None)


def test_plain_prompts_get_their_bos_and_chats_of_their_own_a_template(tmp_path: Path) -> None:
    tok = tokenizer(template=CHATML)
    train = jsonl(tmp_path / "p.jsonl", rows(2))
    asked = [
        jsonl(tmp_path / "a.jsonl", [{"prompt": "Tell me"}]),
        jsonl(tmp_path / "b.jsonl", [{"prompt": [USER]}]),
    ]
    wanted = settings(train)
    tokens = data.tokenize(data.load(wanted, prompts=[Source(source=path) for path in asked]), tok, wanted)
    assert [tok.decode(ids) for ids in tokens.prompts["prompt_ids"]] == [
        "<s>Tell me",
        "<s><|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
    ]
    assert [tok.decode([one]) for one in tokens.stop_ids] == ["<|im_end|>", "</s>"]


def test_prompts_that_are_too_long_or_refused(tmp_path: Path) -> None:
    tok = tokenizer(template=MISTRAL)
    system = {"prompt": [{"role": "system", "content": "Be brief."}, USER]}
    listed = [{"prompt": [USER]}, {"prompt": [{**USER, "content": "Yes " * 40}]}, system]
    loaded = _load(tmp_path, listed)
    wanted = settings(str(tmp_path / "train.jsonl"), max_length=32)
    tokens = data.tokenize(loaded, tok, wanted, lists="all_pairs")
    assert _record(tokens).dropped == {PROMPT_TOO_LONG: 1, REFUSED: 1}
    length = len(tokens.prompts[0]["prompt_ids"])
    for room, kept in ((length, 0), (length + 1, 1)):
        wanted = settings(str(tmp_path / "train.jsonl"), max_length=max(room, 2))
        loaded_short = _load(tmp_path, [{"prompt": [USER]}, {"prompt": "Yes"}])
        assert len(data.tokenize(loaded_short, tok, wanted).prompts) == kept + 1


def test_printing(tmp_path: Path) -> None:
    loaded = _load(tmp_path, [{"prompt": "Tell me"}, {"prompt": "Tell"}])
    tokens = data.tokenize(loaded, tokenizer(), settings(str(tmp_path / "train.jsonl")))
    for record in (loaded.receipt, tokens.receipt):
        out = io.StringIO()
        print_receipt(record, Console(file=out, width=100))
        assert "prompts: 2 prompts to sample for\n" in out.getvalue()
        assert "asked.jsonl (prompt)" in out.getvalue()
