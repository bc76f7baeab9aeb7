"""`prefopt sandbox score` as a person uses it, on a tiny world."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from prefopt_cli.cli.sandbox_report import print_report
from prefopt_cli.cli.tables import Column, print_table
from prefopt_cli.sandbox.names import DIMENSIONS
from prefopt_cli.sandbox.world import find_world, open_world
from tests.cli.conftest import Prefopt
from tests.sandbox.build import add_adapter, add_policy, only_tiny_worlds, write_run
from tests.sandbox.test_score import report, seen

FEW = ("--prompts", "3", "--per-prompt", "2", "--exact-prompts", "0")
ESTIMATE = r"-?\d+(\.\d+)? \[-?\d+(\.\d+)?, -?\d+(\.\d+)?\]"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Runs on a tiny world that nobody trained, to be read: a, b, chained (from a) and lora."""
    folder = tmp_path_factory.mktemp("shelf")
    with only_tiny_worlds(folder / "cache"):
        made = open_world(0)
        add_policy(write_run(folder / "a"), made, seed=1)
        add_policy(write_run(folder / "b", preferences="sandbox:polite"), made, seed=2)
        add_policy(write_run(folder / "chained", str(folder / "a")), made, seed=3)
        add_adapter(write_run(folder / "lora"), made, seed=4)
        yield folder


@pytest.fixture
def runs(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the runs in the working directory, to be written into."""
    for name in ("a", "b", "chained", "lora"):
        shutil.copytree(shelf / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_run(prefopt: Prefopt, runs: Path) -> None:
    result = prefopt("sandbox", "score", "a", "--prompts", "3", "--per-prompt", "2", "--exact-prompts", "1")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[:2] == ["before:  sandbox:base", "after:   a"]
    (head,) = (
        number for number, line in enumerate(lines) if line.split() == ["before", "after", "difference"]
    )
    table = lines[head : lines.index("", head)]
    assert max(map(len, table)) <= 80
    figures = [
        line
        for line in table[2:]
        if not re.fullmatch(r"win rate, %|gold reward|accuracy, %|in nats|replies, %", line)
    ]
    assert len(figures) == 3 + 3 + 2 + 5
    for line in figures:
        assert re.search(rf"  (50\.0|{ESTIMATE})  +{ESTIMATE}  +\+?{ESTIMATE}( \*)?$", line), line
    assert result.out.count("* significant") == 1
    assert "TV: exact total variation to pi_base exp(2 r) on the first prompt." in result.out
    assert lines[-1] == "Written: a/eval/sandbox/summary.json"


def test_json_holds_what_is_printed(prefopt: Prefopt, runs: Path) -> None:
    printed = prefopt("sandbox", "score", "a", *FEW, "--show", "2").out
    result = prefopt("sandbox", "score", "a", *FEW, "--show", "2", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out, parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert found["written"] == ["a/eval/sandbox/summary.json"]
    assert found["not_written"] == {}
    summary = json.loads((runs / "a" / "eval" / "sandbox" / "summary.json").read_text())
    assert {**summary, "samples": found["samples"], "written": found["written"], "not_written": {}} == found
    own = found["policies"]["a"]
    for name in DIMENSIONS:
        won = own["win_rates"][name]
        assert f"{100 * won['value']:.1f}".removesuffix("00.0") in printed
        reward = own["figures"][f"reward/{name}"]
        assert f"{reward['value']:.2f} [{reward['low']:.2f}, {reward['high']:.2f}]" in printed
    assert f"{found['attainable_accuracy']:.1%}" in printed
    assert found["target_note"] in printed
    assert len(found["samples"]) == 2
    for sample in found["samples"]:
        assert sample["prompt"] in printed
        for reply in sample["replies"]:
            assert reply["text"].strip().replace("\n", "\\n") in printed


def test_replies_to_one_message_stand_together(prefopt: Prefopt, runs: Path) -> None:
    lines = prefopt("sandbox", "score", "a", *FEW, "--show", "1").out.splitlines()
    assert lines[0] == "First replies to the first prompt, each with its gold reward in helpful:"
    assert lines[2].startswith("Customer: ")
    assert lines[3] == "Support:"
    # A policy after two steps of training says nothing sensible.
    assert re.match(r"  before  -1\.00  \(not well-formed\) ", lines[4])
    assert re.match(r"  after   -1\.00  \(not well-formed\) ", lines[5])


def test_several_runs(prefopt: Prefopt, runs: Path) -> None:
    result = prefopt("sandbox", "score", "a", "b", *FEW, "--dimension", "polite", "--plot", "picture.svg")
    assert result.code == 0, result.err
    blocks = result.out.split("\n\n")[:-1]
    for block in blocks:
        assert max(map(len, block.splitlines())) <= 80
        rows = block[block.index("─") :].splitlines()[1:]
        assert [row.split()[0] for row in rows] == ["sandbox:base", "a", "b"]
    assert "reward difference" in blocks[0]
    assert (runs / "picture.svg").read_text().startswith("<?xml")
    assert result.out.splitlines()[-1] == "Written: picture.svg"


def test_against_another_run(prefopt: Prefopt, runs: Path) -> None:
    result = prefopt("sandbox", "score", "a", "--against", "b", *FEW)
    assert result.code == 0, result.err
    assert result.out.startswith("against: b\nrun:     a\n")
    assert "difference to b excludes zero" in result.out
    assert not (runs / "b" / "eval").exists()


def test_the_base_policy_itself(prefopt: Prefopt, runs: Path) -> None:
    result = prefopt("sandbox", "score", "sandbox:base", "--dimension", "polite", *FEW, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["written"] == []
    (own,) = found["policies"].values()
    assert {won["value"] for won in own["win_rates"].values()} == {0.5}
    assert {change["value"] for change in own["changes"].values()} == {0.0}
    printed = prefopt("sandbox", "score", "sandbox:base", "--dimension", "polite", *FEW).out
    assert " *\n" not in printed


@pytest.mark.parametrize("name", ["chained", "lora"])
def test_chains_and_adapters(prefopt: Prefopt, runs: Path, name: str) -> None:
    result = prefopt("sandbox", "score", name, *FEW, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found["opponent"] == "sandbox:base"
    assert found["policies"][name]["figures"]["kl"]["low"] > 0


def test_a_world_that_was_deleted_is_made_again(prefopt: Prefopt, runs: Path) -> None:
    """An adapter needs its base policy, which lies in the world's folder."""
    before = prefopt("sandbox", "score", "lora", *FEW, "--json").out
    made = find_world(0)
    assert made is not None
    shutil.rmtree(made.folder)
    assert prefopt("sandbox", "score", "lora", *FEW, "--json").out == before
    assert find_world(0) == made


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("c",), "There is no run c in"),
        (("a/model",), "a/model is a part of a run; name the run itself: a."),
        (("Qwen/Qwen2.5-0.5B",), "There is no run Qwen/Qwen2.5-0.5B in"),
        (("a", "./a"), "a is named twice, the second time as ./a."),
        (("a", "--against", "sandbox:base/seed=1"), "different worlds"),
        (("a", "--prompts", "5"), "The sandbox has 4 held-out prompts, not 5."),
        (("a", "--prompts", "3", "--exact-prompts", "4"), "The 4 prompts whose replies are enumerated"),
        (("a", "--prompts", "3", "--show", "4"), "--show 4: only 3 prompts are sampled"),
        (("a", "--prompts", "0"), "--prompts"),
        (("a", "--per-prompt", "0"), "--per-prompt"),
        (("a", "--exact-prompts", "-1"), "--exact-prompts"),
        (("a", "--prompts", "3", "--target", "best"), "there is no such target"),
        (("a", "--prompts", "3", "--dimension", "polit"), "Did you mean polite?"),
        (("a", "--plot", "nowhere/picture.png"), "there is no folder nowhere"),
        (("a", "--plot", "picture.jpg"), "is a .png or .svg file"),
        ((), "Missing argument"),
    ],
)
def test_refusals(prefopt: Prefopt, runs: Path, arguments: tuple[str, ...], said: str) -> None:
    result = prefopt("sandbox", "score", *arguments)
    assert result.code == 2
    assert said in result.err
    assert result.out == ""
    assert not (runs / "a" / "eval").exists()


def test_a_run_without_its_policy(prefopt: Prefopt, runs: Path) -> None:
    (runs / "a" / "model" / "config.json").unlink()
    result = prefopt("sandbox", "score", "a", *FEW)
    assert result.code == 2
    assert result.err.startswith("prefopt: the folder a/model holds no model")


def test_figures_are_not_lost_where_a_run_cannot_be_written(prefopt: Prefopt, runs: Path) -> None:
    """A file stands where a folder should be, which stops every user, root too."""
    (runs / "a" / "eval").write_text("in the way")
    result = prefopt("sandbox", "score", "a", *FEW)
    assert result.code == 1
    assert "gold reward" in result.out
    assert "Written" not in result.out
    (line,) = result.err.splitlines()
    assert line.startswith(
        "prefopt: The figures are printed, but could not be written to a/eval/sandbox/summary"
    )
    found = json.loads(prefopt("sandbox", "score", "a", *FEW, "--json").out)
    assert list(found["not_written"]) == ["a/eval/sandbox/summary.json"]
    assert found["policies"]["a"]["figures"]


WORSE = seen("runs/a-run-with-a-long-name", [[-10.25, -12.5], [-30.0, -11.0]], (-1.0, 1.0), (0.1, 0.3))
BETTER = seen("runs/b", [[1.0, 2.0], [2.0, 0.0]], (1.0, -1.0), (0.2, 0.1))


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("several", [True, False])
def test_no_figure_is_cut_or_folded(width: int, terminal: bool, several: bool) -> None:
    opponent = seen("sandbox:base", [[-10.0, 1.0], [2.0, 2.0]], (2.0, -2.0), (0.5, 0.5))
    policies = [WORSE, BETTER] if several else [WORSE]
    made = report(*(each.score(opponent) for each in policies), opponent=opponent.score())
    stream = io.StringIO()
    print_report(made, 1, Console(file=stream, width=width, force_terminal=terminal, color_system=None))
    shown = stream.getvalue()
    assert "…" not in shown
    for scored in made.policies:
        for change in (scored.changes[f"reward/{made.dimension}"], scored.changes["kl"]):
            if several and change is scored.changes["kl"]:
                continue  # it is the figure itself, as the base policy's is nought
            digits = 1 if max(map(abs, change)) >= 10 else 2
            value, low, high = (f"{part + 0.0:.{digits}f}" for part in change)
            assert f"{value} [{low}, {high}]" in shown
    for estimate in opponent.score().figures.values():
        assert any(
            f"[{scale * estimate.low + 0.0:.{digits}f}".removesuffix("00.0") in shown
            for scale, digits in ((1, 2), (1, 1), (100, 1))
        )
    if width >= 80:
        table = shown[shown.index("─") - 400 :] if several else shown[shown.index("before:") :]
        assert all(len(line) <= width for line in table.splitlines() if "[" in line and "]" in line)


def test_a_table_by_hand() -> None:
    stream = io.StringIO()
    columns = [
        Column("b", ["1", "22"]),
        Column("two\nlines", ["3", ""]),
        Column("last", ["a long cell", "5"]),
    ]
    console = Console(file=stream, width=16, force_terminal=True, color_system="standard")
    print_table(console, Column("", ["x", "y y"]), columns, bold={1})
    assert stream.getvalue().splitlines() == [
        "           two",
        "      b  lines",
        "──────────────",
        "x     1      3",
        "\x1b[1my y  22\x1b[0m",
        "",
        "            last",
        "────────────────",
        "x    a long cell",
        "\x1b[1my y            5\x1b[0m",
    ]


def test_a_table_where_lines_cannot_be_drawn() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_table(Console(file=stream), Column("", ["x"]), [Column("b", ["1"])])
    stream.seek(0)
    assert stream.read().splitlines()[1] == "----"
