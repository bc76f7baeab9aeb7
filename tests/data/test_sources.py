"""Every kind of source gives the same rows."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from prefopt_cli import data
from prefopt_cli.errors import UserError
from tests.data.build import chat_row, jsonl, row, rows, settings
from tests.toy_scheme import ROWS as TOYS

ROWS = rows(10)


def _csv(path: Path, listed: list[dict[str, Any]]) -> bytes:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(listed[0]))
        writer.writeheader()
        writer.writerows(listed)
    return path.read_bytes()


def _write(folder: Path, kind: str) -> Path:
    path = folder / kind
    if kind in ("pairs.jsonl", "pairs.jsonl.gz", "lines.json"):
        jsonl(path, ROWS)
    elif kind == "array.json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "pairs.csv":
        _csv(path, ROWS)
    elif kind == "pairs.csv.gz":
        path.write_bytes(gzip.compress(_csv(folder / "unzipped.csv", ROWS)))
    elif kind == "pairs.parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    elif kind == "saved_splits":
        whole = datasets.Dataset.from_list(ROWS)
        datasets.DatasetDict(train=whole, test=whole.select(range(3))).save_to_disk(path)
    else:
        path.mkdir()
        jsonl(path / "train.jsonl", ROWS)
        jsonl(path / "test.jsonl", ROWS[:3])
    return path


KINDS = [
    "pairs.jsonl",
    "pairs.jsonl.gz",
    "lines.json",
    "array.json",
    "pairs.csv",
    "pairs.csv.gz",
    "pairs.parquet",
    "saved",
    "saved_splits",
    "folder",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_gives_the_same_pairs(kind: str, tmp_path: Path) -> None:
    found = data.load(settings(str(_write(tmp_path, kind)))).train
    assert [(p.prompt, *p.responses) for p in found] == [tuple(one.values()) for one in ROWS]
    assert [p.occurrence_id for p in found] == [f"{kind}:{number}" for number in range(10)]


@pytest.mark.parametrize("kind", KINDS)
def test_splits_can_be_sliced(kind: str, tmp_path: Path) -> None:
    path = str(_write(tmp_path, kind))
    for split, expected in (
        ("train[20%:50%]", ROWS[2:5]),
        ("train[-2:]", ROWS[-2:]),
        ("train[:1]+train[5:6]", None),
    ):
        found = data.load(settings({"source": path, "split": split})).train
        assert [p.prompt for p in found] == [one["prompt"] for one in expected or (ROWS[0], ROWS[5])]


@pytest.mark.parametrize("kind", ["saved_splits", "folder"])
def test_other_splits_by_name(kind: str, tmp_path: Path) -> None:
    loaded = data.load(settings({"source": str(_write(tmp_path, kind)), "split": "test"}))
    assert [p.occurrence_id for p in loaded.train] == [f"{kind}/test:{number}" for number in range(3)]


def test_folder_configurations_from_its_readme(tmp_path: Path) -> None:
    folder = _write(tmp_path, "folder")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: train.jsonl\n"
        "- config_name: two\n  data_files: test.jsonl\n---\n"
    )
    assert len(data.load(settings({"source": str(folder), "config": "two"})).train) == 3
    with pytest.raises(UserError, match=r"several configurations.*one, two"):
        data.load(settings(str(folder)))
    with pytest.raises(UserError, match="no configuration 'three'; it has one, two"):
        data.load(settings({"source": str(folder), "config": "three"}))


def test_relative_paths_home_and_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "data[1]*.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("data[1]*.jsonl", "./data[1]*.jsonl", "~/data[1]*.jsonl"):
        assert len(data.load(settings(name)).train) == 10


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    for count in (2, 5):
        assert len(data.load(settings(jsonl(path, rows(count)))).train) == count


def test_csv_cells_are_text(tmp_path: Path) -> None:
    listed = [
        row(0, chosen="None", rejected="NA"),
        row(1, chosen="007", rejected='a, "b"\nc'),
        row(2, chosen="1.0"),
    ]
    _csv(tmp_path / "p.csv", [{**one, "score": 5, "good": True} for one in listed])
    source = {"source": str(tmp_path / "p.csv"), "where": {"score": 5, "good": True}}
    found = data.load(settings(source)).train
    assert [p.responses for p in found] == [(one["chosen"], one["rejected"]) for one in listed]


def test_a_column_of_mixed_types_costs_only_the_odd_rows(tmp_path: Path) -> None:
    listed = [row(0), row(1, prompt=3), row(2, chosen=["a"]), row(3, rejected=None), row(4), row(5)]
    loaded = data.load(settings(jsonl(tmp_path / "p.jsonl", listed)))
    assert [p.occurrence_id for p in loaded.train] == ["p.jsonl:0", "p.jsonl:4", "p.jsonl:5"]
    assert loaded.receipt.sets["train"].sources[0].dropped == {
        "malformed: prompt is number, not text": 1,
        "malformed: chosen is list of text, not text": 1,
        "malformed: rejected is nothing, not text": 1,
    }


def test_ids_from_a_column(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "p.jsonl", [row(n, key=f"k{n}", same="x") for n in range(3)])
    found = data.load(settings({"source": path, "columns": {"id": "key"}})).train
    assert [p.occurrence_id for p in found] == ["p.jsonl:k0", "p.jsonl:k1", "p.jsonl:k2"]
    with pytest.raises(UserError, match="'x' occurs 3 times"):
        data.load(settings({"source": path, "columns": {"id": "same"}}))


def test_a_saved_datasets_own_output_format_does_not_matter(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list([{**one, "score": n} for n, one in enumerate(ROWS)])
    saved.with_format("numpy").save_to_disk(tmp_path / "saved")
    source = {"source": str(tmp_path / "saved"), "where": {"score": [1, 2]}}
    assert [type(p.responses[0]) for p in data.load(settings(source)).train] == [str, str]


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = jsonl(tmp_path / "p.jsonl", [chat_row(str(n)) for n in range(7)])
    data.load(settings(path), progress=lambda *step: seen.append(step))
    assert seen[-1] == ("reading p.jsonl", 7, 7)


def test_the_libraries_settings_are_left_as_they_were(tmp_path: Path) -> None:
    before = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    data.load(settings(jsonl(tmp_path / "p.jsonl", ROWS)))
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before


@pytest.mark.usefixtures("toy_scheme")
def test_a_schemes_rows_split_and_sliced_under_its_name() -> None:
    name = "toy:rows/size=0.5"
    for source, label, numbers in (
        ({}, name, range(10)),
        ({"split": "test"}, f"{name}/test", range(3)),
        ({"split": "train[20%:50%]"}, f"{name}/train[20%:50%]", range(2, 5)),
        ({"split": "train[8:]+test[:1]"}, f"{name}/train[8:]+test[:1]", [8, 9, 0]),
        ({"config": "plain"}, f"{name}/plain", range(10)),
    ):
        loaded = data.load(settings({"source": name, **source}))
        assert [p.prompt for p in loaded.train] == [TOYS[n]["prompt"] for n in numbers]
        assert [p.occurrence_id for p in loaded.train] == [f"{label}:{n}" for n in range(len(numbers))]
        assert loaded.receipt.sets["train"].sources[0].source == label
    own = data.load(settings({"source": name, "columns": {"id": "id"}, "split": "train[4:]"})).train
    assert own[0].occurrence_id == f"{name}/train[4:]:q4"


@pytest.mark.usefixtures("toy_scheme")
def test_a_schemes_work_is_shown() -> None:
    seen: list[tuple[str, int, int]] = []
    data.load(settings("toy:rows"), progress=lambda *step: seen.append(step))
    assert seen[0] == ("making toy rows", 10, 10)


@pytest.mark.usefixtures("toy_scheme")
def test_what_a_scheme_does_not_have_is_told_as_elsewhere() -> None:
    for source, words in (
        ({"split": "dev"}, "toy:rows has no split 'dev'; it has train, test"),
        ({"split": "train[:x]"}, r"'train\[:x\]' is not understood"),
        ({"split": "train[50:]"}, r"split train\[50:\] holds no rows"),
        ({"revision": "main"}, "not on the hub, so `revision: main` has no meaning"),
        ({"config": "fancy"}, "no such toy"),
    ):
        with pytest.raises(UserError, match=words):
            data.load(settings({"source": "toy:rows", **source}))


def test_a_file_may_have_a_colon_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "run:7.jsonl", ROWS)
    assert data.load(settings("run:7.jsonl")).train[0].occurrence_id == "run:7.jsonl:0"
    with pytest.raises(UserError, match="'run' is not a known kind of source"):
        data.load(settings("run:8.jsonl"))


@pytest.mark.slow
@pytest.mark.usefixtures("sandbox")
def test_the_sandboxs_preferences() -> None:
    test = {"source": "sandbox:helpful", "split": "test"}
    loaded = data.load(settings("sandbox:helpful", eval={"helpful": test}))
    train, helpful = loaded.receipt.sets["train"], loaded.receipt.sets["helpful"]
    assert (train.rows, train.prompts) == (5000, 2500)
    assert (helpful.rows, helpful.prompts, helpful.leaked_prompts) == (1000, 500, 0)
    for kind in ("ranked", "best_of_n"):
        lists = data.load(settings({"source": "sandbox:helpful", "config": kind})).receipt.sets["train"]
        assert (lists.sources[0].format, lists.rows, lists.list_sizes) == (kind, 2500, [4, 4])
