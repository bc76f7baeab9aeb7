"""The receipt adds up, survives JSON, and can be read at any width."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from prefopt_cli import data
from prefopt_cli.cli.receipt import print_receipt
from prefopt_cli.data.receipt import Receipt, SetReceipt, SourceReceipt
from tests.data.build import jsonl, row, settings, tokenizer


@pytest.fixture
def receipt(tmp_path: Path) -> Receipt:
    listed = [row(n, kind="ab"[n % 2]) for n in range(20)] + [row(0, kind="a"), row(1, rejected="", kind="a")]
    path = jsonl(tmp_path / "pairs[x].jsonl", listed)
    wanted = settings(
        {"source": path, "where": {"kind": "a"}, "weight": 2.0}, eval={"all": path}, max_length=40
    )
    return data.tokenize(data.load(wanted), tokenizer(), wanted).receipt


def test_rows_that_vanish_are_noticed() -> None:
    source = SourceReceipt("s", "standard", read=5, kept=3, rows=3, dropped={"duplicate": 2})
    Receipt({"train": SetReceipt([source], rows=3, prompts=3)}, None, "drop").check()
    lost = SourceReceipt("s", "standard", read=5, kept=3, rows=3, dropped={"duplicate": 1})
    with pytest.raises(AssertionError, match="5 rows read, 4 accounted for"):
        Receipt({"train": SetReceipt([lost], rows=3, prompts=3)}, None, "drop").check()
    with pytest.raises(AssertionError, match="not the sum"):
        Receipt({"train": SetReceipt([source], rows=4, prompts=3)}, None, "drop").check()


def test_figures(receipt: Receipt) -> None:
    train, everything = receipt.sets["train"], receipt.sets["all"]
    assert train.sources[0].dropped == {"filtered by where": 10, "empty side": 1, "duplicate": 1}
    assert (train.sources[0].read, train.sources[0].kept, train.rows, train.prompts) == (22, 10, 20, 10)
    assert everything.leaked_prompts == 10
    # " Yes 1" is longer than " No 1" by the tokens of Y-e-s; BOS and "Question n?" make the prompt.
    assert (
        train.lengths["prompt"]["total"]
        == sum(len(tokenizer()(row(n)["prompt"])["input_ids"]) for n in range(0, 20, 2)) * 2
    )
    assert train.lengths["prompt"]["p5"] <= train.lengths["prompt"]["p50"] <= train.lengths["prompt"]["max"]
    assert 0 <= (train.chosen_longer or 0) + (train.same_length or 0) <= 1


def test_json(receipt: Receipt) -> None:
    assert json.loads(json.dumps(receipt.to_dict())) == receipt.to_dict()


@pytest.mark.parametrize("width", [20, 60, 80, 160])
@pytest.mark.parametrize("as_dict", [True, False])
def test_printing(width: int, as_dict: bool, receipt: Receipt) -> None:
    out = io.StringIO()
    print_receipt(receipt.to_dict() if as_dict else receipt, Console(file=out, width=width))
    text = out.getvalue()
    assert "\x1b" not in text
    for part in ("pairs[x].jsonl", "(standard)", "filtered by where", "-10", "with repeats by weight", "p95"):
        assert part in text
    assert "warning: 10 of the 20 prompts of all" in text
    assert "</s> ends every plain-text response" in text


def test_printing_before_tokenisation(tmp_path: Path) -> None:
    out = io.StringIO()
    loaded = data.load(settings(jsonl(tmp_path / "p.jsonl", [row()])))
    print_receipt(loaded.receipt, Console(file=out, width=80))
    assert "train: 1 pairs, 1 prompts" in out.getvalue()
    assert "p95" not in out.getvalue()
