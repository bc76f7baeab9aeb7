"""Bad input ends in one message that says where it is bad and what to do."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError

from prefopt_cli import data
from prefopt_cli.data import diagnosis
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import Source
from tests.data.build import jsonl, row, rows, settings

GOOD = json.dumps(row()).encode() + b"\n"
ZIPPED = gzip.compress(b"".join(json.dumps(row(n * 7919)).encode() + b"\n" for n in range(3000)))


def _message(source: Any, **others: Any) -> str:
    with pytest.raises(UserError) as caught:
        data.load(settings(source, **others))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.jsonl", b"", r"empty\.jsonl is empty"),
        ("blank.jsonl", b"\n\n", r"holds no rows|is empty"),
        ("header.csv", b"prompt,chosen,rejected\n", r"holds no rows"),
        ("list.json", b"[]", r"holds no rows|is empty|cannot be read"),
        ("broken.jsonl", GOOD + b'{"prompt": "x",\n' + GOOD, r"broken\.jsonl:2: broken JSON at column"),
        (
            "broken.json",
            b'[\n{"prompt": "x"},\n{"prompt" "y"}\n]',
            r"broken\.json:3: broken JSON at column 11",
        ),
        ("texts.jsonl", b'"a"\n"b"\n', r'texts\.jsonl:1: expected an object .* found "a"'),
        (
            "latin.jsonl",
            GOOD + b'{"prompt": "\xe9"}\n',
            r"latin\.jsonl:2: byte 12 of the line \(0xe9\) is not UTF-8",
        ),
        (
            "latin.csv",
            b"prompt,chosen,rejected\np,a,\xff\n",
            r"latin\.csv:2: byte 4 of the line \(0xff\) is not UTF-8",
        ),
        (
            "fields.csv",
            b"prompt,chosen,rejected\np,a,b\np,a,b,c\n",
            r"fields\.csv:3: 4 fields .* header has 3",
        ),
        (
            "quote.csv",
            b'prompt,chosen,rejected\np,a,"b\n',
            r"quote\.csv:\d: broken CSV|quote\.csv cannot be read",
        ),
        ("fake.jsonl.gz", b"not zipped at all", r"fake\.jsonl\.gz is not a gzip file"),
        ("cut.jsonl.gz", ZIPPED[:-300], r"cut\.jsonl\.gz is cut off: .* after line \d{2,}"),
        ("hit.jsonl.gz", ZIPPED[:5000] + b"\0" * 9 + ZIPPED[5009:], r"hit\.jsonl\.gz is .*damaged"),
        ("bad.parquet", b"PAR1 nonsense", r"bad\.parquet cannot be read: Parquet"),
        ("notes.txt", b"hello", r"cannot be read; known are \.csv, \.json, \.jsonl, \.parquet"),
    ],
)
def test_unreadable_files(name: str, content: bytes, expected: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    message = _message(str(tmp_path / name))
    assert re.search(expected, message)
    assert str(tmp_path) in message


def test_a_broken_file_in_a_folder_is_named(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", rows(2))
    (tmp_path / "b.jsonl").write_bytes(GOOD + b"{oops\n")
    assert "b.jsonl:2: broken JSON" in _message(str(tmp_path))


def test_a_column_that_turns_up_late_in_a_long_file_does_not_matter(tmp_path: Path) -> None:
    listed = [
        row(n, prompt="x" * 1000 + str(n)) for n in range(11_000)
    ]  # beyond the library's block of 10 MB
    path = jsonl(tmp_path / "late.jsonl", [*listed, row(1, note="late"), row(2, prompt=3)])
    loaded = data.load(settings(path))
    assert len(loaded.train) == 11_001
    assert loaded.receipt.sets["train"].sources[0].dropped == {"malformed: prompt is number, not text": 1}


def test_missing_files_suggest_near_names(tmp_path: Path) -> None:
    jsonl(tmp_path / "helpful.jsonl", rows(2))
    assert "did you mean helpful.jsonl?" in _message(str(tmp_path / "helpfull.jsonl"))
    assert "data files there: helpful.jsonl" in _message(str(tmp_path / "zzz.csv"))
    assert "no folder" in _message(str(tmp_path / "nowhere" / "x.csv"))
    assert "holds no data files" in _message(str(_empty_folder(tmp_path)))


def _empty_folder(folder: Path) -> Path:
    (folder / "void").mkdir()
    return folder / "void"


@pytest.mark.parametrize("saved", [True, False])
def test_unknown_splits_and_empty_slices(saved: bool, tmp_path: Path) -> None:
    if saved:
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows(3))).save_to_disk(tmp_path / "p")
        path = str(tmp_path / "p")
    else:
        path = jsonl(tmp_path / "p.jsonl", rows(3))
    assert "no split 'test'; it has train" in _message({"source": path, "split": "test"})
    assert "split train[100:200] holds no rows" in _message({"source": path, "split": "train[100:200]"})
    assert "'train[:x]' is not understood" in _message({"source": path, "split": "train[:x]"})


def test_settings_that_a_file_cannot_have(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", rows(3))
    assert "`config: x` has no meaning" in _message({"source": path, "config": "x"})
    assert "`revision: x` has no meaning" in _message({"source": path, "revision": "x"})


def test_hub_ids_while_offline_and_unknown_schemes() -> None:
    message = _message("nobody/no-such-dataset")
    assert "no local path" in message
    assert "HF_HUB_OFFLINE" in message
    assert "'moon' is not a known kind of source" in _message("moon:helpful")


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. Visit it."), "accept its terms"),
        (
            DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
            "check its spelling",
        ),
        (ConnectionError("Couldn't reach 'a/b' on the Hub (ConnectTimeout)"), "check the network"),
        (ValueError("BuilderConfig 'x' not found. Available: ['main', 'socratic']"), "it has main, socratic"),
        (ValueError("Unknown split \"x\". Should be one of ['train', 'test']."), "it has train, test"),
        (ValueError("something else"), "a/b cannot be read: something else"),
    ],
)
def test_what_the_hub_says_is_explained(error: Exception, hint: str) -> None:
    explained = diagnosis.unreachable(Source(source="a/b"), error)
    assert hint in str(explained)
    assert "a/b" in str(explained)


def test_wrong_columns_are_listed_with_a_hint(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [{"question": "q", "answers": ["a", "b"], "scores": [1, 2]}])
    for format in ("auto", "standard"):
        message = _message({"source": path, "format": format})
        assert "columns found: question (text), answers (list of text), scores (list of number)" in message
        assert "`columns: {prompt:" in message
    assert "prompt is nothing, not text" in _message({"source": path, "format": "standard"})
    message = _message({"source": path, "columns": {"prompt": "questoin"}})
    assert "did you mean question?" in message
    assert "columns found: question, answers, scores" in message


def test_a_forced_format_that_fits_no_row(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", rows(3))
    message = _message({"source": path, "format": "conversational"})
    assert "no row can be read as conversational" in message
    assert "prompt is text, not messages" in message


def test_filters(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [row(n, kind="ab"[n % 2]) for n in range(5)])
    assert "did you mean kind?" in _message({"source": path, "where": {"kin": "a"}})
    message = _message({"source": path, "where": {"kind": "c"}})
    assert "empty after filtering" in message
    assert "where kind is c: the column has a (3), b (2)" in message


def test_sets_without_rows_and_names_that_clash(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [row(0, rejected=" Yes 0"), row(1, chosen="  ")])
    assert "train has no usable rows left (identical pair 1, empty side 1)" in _message(path)
    good = jsonl(tmp_path / "good.jsonl", rows(3))
    assert "cannot be named train" in _message(good, eval={"train": good})
    assert "another name" in _message(good, eval={"holdout": good}, holdout=0.5)
    assert "sets aside none" in _message(good, holdout=1e-9)
    assert "only training sources are weighted" in _message(good, eval={"e": {"source": good, "weight": 2.0}})
