"""`prefopt retention`: the table of stages and dimensions."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from prefopt_cli.cli.retention import print_retention
from prefopt_cli.evaluation.retention_table import Cell, Change, HeldOut, Retention, Stage
from prefopt_cli.evaluation.statistics import Estimate
from tests.cli.conftest import Prefopt
from tests.training.conftest import (
    LORA,
    Run,
    make_recipe,  # noqa: F401  (a fixture, as is the next)
    run,  # noqa: F401
)


def made_up(sets: tuple[str, ...] = ("kind", "calm")) -> Retention:
    chain = (Stage("base"), Stage("kind", "kind", "runs/kind", "1"), Stage("calm", "calm", "runs/calm", "2"))
    cells = {
        (stage.name, name): Cell(
            Estimate(0.9, 0.85, 0.95), Estimate(-0.001, -1.25, 12.5), Estimate(1.0, 1.0, 1.0)
        )
        for stage in chain
        for name in sets
    }
    changes = {"kind": Change("kind", "calm", Estimate(-0.25, -0.3, -0.2), Estimate(0.5, -0.25, 0.75))}
    return Retention(chain, {name: HeldOut(40, 30, "ab") for name in sets}, cells, changes, 0)


def printed(retention: Retention, width: int = 100, **options: object) -> str:
    text = io.StringIO()
    print_retention(retention, Console(file=text, width=width, highlight=False, **options))
    return text.getvalue()


def test_the_table() -> None:
    lines = printed(made_up()).splitlines()
    words = [" ".join(line.split()) for line in lines]
    # Each stage's own dimension is marked; the base has nothing to show relative to itself.
    assert words[1] == "stage kind calm"
    assert words[3:6] == [
        "1 kind 90.0 [85.0, 95.0] * 90.0 [85.0, 95.0]",
        "2 calm 90.0 [85.0, 95.0] 90.0 [85.0, 95.0] *",
        "",
    ]
    assert words.count("base 100.0 [100.0, 100.0] 100.0 [100.0, 100.0]") == 1
    assert "2 calm 0.00 [-1.25, 12.50] 0.00 [-1.25, 12.50] *" in words
    assert "kind kind -25.0 [-30.0, -20.0] +0.50 [-0.25, 0.75]" in words
    text = "\n".join(lines)
    assert "kind 40 pairs, calm 40 pairs" in text
    assert "No held-out set" not in text


def test_dimensions_without_a_set_are_named() -> None:
    assert "No held-out set is named after calm." in printed(made_up(("kind",)))


def test_columns_that_do_not_fit_stand_below() -> None:
    names = ("kind", "calm", "brief", "honest", "polite", "helpful")
    lines = printed(made_up(names), width=70).splitlines()
    assert all(len(line) <= 70 for line in lines if "[" in line and not line.startswith("*"))
    assert sum("accuracy, %" in line for line in lines) > 2


def test_the_command(
    prefopt: Prefopt,
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    run("kind", LORA, "training.max_steps=2", "dimension=heldout")
    run("calm", LORA, "training.max_steps=2", f"model.name_or_path={tmp_path}/kind")
    result = prefopt("retention", str(tmp_path / "calm"))
    assert result.code == 0, result.err
    assert "2 calm" in result.out
    assert "No held-out set is named after calm." in result.out
    own = tmp_path / "calm" / "eval" / "retention"
    assert result.out.splitlines()[-1] == f"Files: {own}"
    assert "Log-probabilities under the policy calm: 48 responses, 48 computed" in result.err
    assert {file.name for file in own.iterdir()} == {"retention.json", "retention.csv", "retention.png"}

    result = prefopt("retention", str(tmp_path / "calm"), "--json", "--output", str(tmp_path / "table"))
    told = json.loads(result.out)
    assert told == json.loads((tmp_path / "table" / "retention.json").read_text())
    assert told["computed"] == 0
    assert told["forgetting"].keys() == {"heldout"}
    assert [stage["name"] for stage in told["stages"]] == ["base", "heldout", "calm"]
    assert (
        told["stages"][1]["results"]["heldout"]
        == json.loads((own / "retention.json").read_text())["stages"][1]["results"]["heldout"]
    )


def test_what_cannot_be_shown(
    prefopt: Prefopt,
    run: Run,  # noqa: F811
    tiny_world: Path,
    tmp_path: Path,
) -> None:
    result = prefopt("retention", str(tmp_path / "none"))
    assert result.code == 2
    assert "RUN: there is no run in" in result.err
    run("kind", "training.max_steps=1", "dataset.eval={}")
    result = prefopt("retention", str(tmp_path / "kind"))
    assert result.code == 2
    assert "has no held-out sets" in result.err
    assert not (tmp_path / "kind" / "eval").exists()
    sets = f"dataset.eval={{kind: {tiny_world}/heldout.jsonl}}"
    assert prefopt("retention", str(tmp_path / "kind"), sets).code == 0


def test_a_folder_that_cannot_be_written_is_known_at_once(
    prefopt: Prefopt,
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    run("kind", "training.max_steps=1")
    (tmp_path / "file").touch()
    result = prefopt("retention", str(tmp_path / "kind"), "--output", str(tmp_path / "file"))
    assert result.code == 2
    assert "is a file, not a folder" in result.err
    assert "Log-probabilities" not in result.err


def test_one_of_several_processes_tells(
    prefopt: Prefopt,
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run("kind", "training.max_steps=1")
    monkeypatch.setenv("RANK", "1")
    for command in ("retention", "lineage"):
        result = prefopt(command, str(tmp_path / "kind"))
        assert (result.code, result.out, result.err) == (0, "", "")
    assert not (tmp_path / "kind" / "eval").exists()


def test_small_margins_keep_their_figures() -> None:
    table = made_up()
    small = Estimate(0.0021, -0.0004, 0.0103)
    cells = {name: Cell(cell.accuracy, small, cell.logp_accuracy) for name, cell in table.cells.items()}
    assert "0.0021 [-0.0004, 0.0103]" in printed(replace(table, cells=cells))


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_plain_terminals(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "out.txt"
    with file.open("w", encoding=encoding) as opened:
        print_retention(made_up(), Console(file=opened, width=100, highlight=False))
    assert file.read_text(encoding=encoding)
