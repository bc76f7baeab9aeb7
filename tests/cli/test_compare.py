"""`prefopt compare`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Prefopt, Result
from tests.evaluation.plain import read
from tests.training.conftest import (
    Run,
    shared_run,  # noqa: F401  (a fixture)
)

NO_KL = ("--kl-prompts", "0")


@pytest.fixture
def runs(shared_run: Run, tmp_path: Path) -> Path:  # noqa: F811
    """A folder with two finished runs, an unfinished one, and other files; their own `eval` is not there."""
    folder = tmp_path / "runs"
    folder.mkdir()
    one = shared_run("one").run.path
    two = shared_run("two", "training.learning_rate=1.0e-3").run.path
    for name, source in (("a", one), ("b", two), ("c", two)):
        shutil.copytree(source, folder / name)
    manifest = folder / "c" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished"', '"interrupted"'))
    (folder / "notes.txt").touch()
    return folder


def listed(folder: Path) -> list[str]:
    """As a shell writes out `runs/*`."""
    return [str(path) for path in sorted(folder.iterdir())]


def summary(result: Result) -> dict[str, Any]:
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


def rows(result: Result, names: tuple[str, ...] = ("a", "b")) -> list[str]:
    """The policies in the order of the table."""
    assert result.code == 0, result.err
    first = [
        line.split()[0] for line in result.out.splitlines() if line.split()[:1] and line.split()[0] in names
    ]
    return list(dict.fromkeys(first))


def test_all_that_lies_there(prefopt: Prefopt, runs: Path) -> None:
    result = prefopt("compare", *listed(runs), "--kl-prompts", "2")
    assert result.code == 0, result.err
    assert f"Left out: {runs}/c (not finished (status interrupted))." in result.out
    assert f"Left out: {runs}/notes.txt (a file)." in result.out
    assert "(pairs: 24, prompts: 24), measured from a" in result.out
    assert "KL, nats" in result.out
    assert "to 2 held-out prompts" in result.out
    folder = runs / "a" / "eval" / "compare"
    assert result.out.splitlines()[-1] == f"Files: {folder} (report.html opens in a browser)"
    files = {each.name for each in folder.iterdir()}
    assert files == {"summary.json", "compare.csv", "changes.jsonl", "report.html", "kl.png"}


def test_json_is_the_summary_and_nothing_else(prefopt: Prefopt, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = summary(prefopt("compare", *listed(runs), *NO_KL, "--json", "--output", str(out)))
    assert found == json.loads((out / "summary.json").read_text())
    assert not (out / "kl.png").exists()
    assert [each["label"] for each in found["policies"]] == ["a", "b"]
    assert found["kl"] is None
    assert [Path(each["name"]).name for each in found["skipped"]] == ["c", "notes.txt"]
    apart = found["policies"][1]["sets"]["heldout"]
    alone = [summary(prefopt("eval", str(runs / name), "--json")) for name in ("a", "b")]
    for name in ("accuracy", "margin"):
        values = [each["sets"]["heldout"]["figures"][f"{name}/reward"]["value"] for each in alone]
        assert apart["differences"][f"{name}/main"]["value"] == pytest.approx(values[1] - values[0])
    margins = [
        {each["id"]: each["margin"] for each in read(runs / name / "eval" / "heldout" / "pairs.jsonl")}
        for name in ("a", "b")
    ]
    changed = {name for name in margins[0] if margins[0][name] * margins[1][name] < 0}
    assert {each["id"] for each in read(out / "changes.jsonl")} == changed


def test_another_baseline(prefopt: Prefopt, runs: Path) -> None:
    found = summary(prefopt("compare", *listed(runs), *NO_KL, "--json", "--baseline", f"{runs}/./b"))
    assert [each["label"] for each in found["policies"]] == ["b", "a"]
    assert found["policies"][0]["sets"]["heldout"]["differences"] is None
    assert (runs / "b" / "eval" / "compare" / "summary.json").is_file()
    result = prefopt("compare", *listed(runs), *NO_KL, "--baseline", f"{runs}/c")
    assert result.code == 2
    assert "c: nothing can be measured from it, it is not finished (status interrupted)." in result.err


def test_the_order_of_the_table(prefopt: Prefopt, runs: Path) -> None:
    given = ("compare", str(runs / "b"), str(runs / "a"), "--beta", "0.2")
    by_kl = prefopt(*given, "--kl-prompts", "2", "--sort", "kl")
    assert by_kl.code == 0, by_kl.err
    found = json.loads((runs / "b" / "eval" / "compare" / "summary.json").read_text())
    assert [each["label"] for each in found["policies"]] == ["b", "a"]
    kl = {each["kl"]["value"]: each["label"] for each in found["policies"]}
    assert rows(by_kl) == [kl[value] for value in sorted(kl)]
    assert found["policies"][0]["reward"]["scale"] == 0.2
    margins = [each["sets"]["heldout"]["figures"]["margin/reward"]["value"] for each in found["policies"]]
    assert margins[0] < margins[1]
    given = (*given, *NO_KL)
    assert rows(prefopt(*given, "--sort", "margin")) == ["a", "b"]
    assert rows(prefopt(*given, "--sort", "name")) == ["a", "b"]
    gold = {
        f"runs/{name}": {"figures": {"reward/helpful": {"value": value, "low": 0.0, "high": 9.0}}}
        for name, value in (("a", 1.0), ("b", 2.0))
    }
    for name in ("a", "b"):
        (runs / name / "eval" / "sandbox").mkdir(parents=True)
        (runs / name / "eval" / "sandbox" / "summary.json").write_text(json.dumps({"policies": gold}))
    by_gold = prefopt(*given, "--sort", "gold")
    assert rows(by_gold) == ["b", "a"]
    assert "gold reward" in by_gold.out
    assert prefopt(*given, "--sort", "size").code == 2


def test_the_picture(prefopt: Prefopt, runs: Path, tmp_path: Path) -> None:
    plot = tmp_path / "kl.svg"
    result = prefopt("compare", *listed(runs), "--kl-prompts", "1", "--plot", str(plot))
    assert result.code == 0, result.err
    assert "<svg" in plot.read_text()
    assert not (runs / "a" / "eval" / "compare" / "kl.png").exists()


def test_data_and_a_model(prefopt: Prefopt, runs: Path, tiny_world: Path) -> None:
    """A model beside the runs, with a reference for all."""
    names = [str(runs / "a"), f"{tiny_world}/model", "--data", f"own={tiny_world}/heldout.jsonl"]
    found = summary(prefopt("compare", *names, *NO_KL, "--json", "--reference", f"{tiny_world}/model"))
    assert list(found["sets"]) == ["own"]
    base = found["policies"][1]
    assert (base["label"], base["run"], base["method"]) == ("model", None, None)
    assert base["sets"]["own"]["figures"]["margin/reward"]["value"] == 0
    alone = summary(prefopt("compare", *names, *NO_KL, "--json", "--reference", "none"))
    assert {each["sets"]["own"]["main"] for each in alone["policies"]} == {"logp"}
    assert all(each["reward"] is None for each in alone["policies"])
    short = summary(prefopt("compare", *names, *NO_KL, "--json", "dataset.max_length=40"))
    assert 0 < short["sets"]["own"]["pairs"] < 24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{runs}/a",), "Two policies at least are compared, and there is only one."),
        (("{runs}/a", "{runs}/a/"), "there is only one."),
        (("{runs}/a", "{runs}/c"), "c: not finished (status interrupted)"),
        (("{runs}/notes.txt",), "there is none."),
        (("{runs}/a", "{runs}/gone/gone"), "RUN: there is no folder"),
        (("{runs}/a", "{runs}/b", "--beta", "0"), "--beta 0: every reward would be 0"),
        (("{runs}/a", "{runs}/b", "--dimension", "calm"), "the recipe has no held-out set of this name"),
        (("{runs}/a", "{runs}/b", "--split", "test"), "--split is of the preferences"),
        (("{runs}/a", "{runs}/b", "--data", "{runs}/gone.jsonl"), "gone.jsonl"),
        (("{runs}/a", "{runs}/b", "method.beta=2"), "the run has settled method.beta"),
        (("{runs}/a", "{runs}/b", "dataset.max_length=2"), "has no usable rows left"),
        (("{runs}/a", "{runs}/b", "--plot", "{runs}/x.pdf"), "the picture is a .png or .svg file"),
        (("{runs}/a", "{runs}/b", "--plot", "{runs}/x.png", *NO_KL), "--plot draws the KL"),
        (("{runs}/a", "{runs}/b", "--output", "{runs}/notes.txt"), "is a file, not a folder"),
        (("{runs}/a", "{runs}/b", "--kl-prompts", "-1"), "--kl-prompts"),
        ((), "Missing argument"),
    ],
)
def test_bad_input(arguments: tuple[str, ...], message: str, prefopt: Prefopt, runs: Path) -> None:
    """One message, exit code 2, nothing written."""
    before = set(runs.rglob("*"))
    result = prefopt("compare", *(each.format(runs=runs) for each in arguments))
    assert result.code == 2, result
    assert result.out == ""
    assert "Traceback" not in result.err
    told = " ".join(result.err.replace("│", " ").split())
    assert message in told
    assert told.count("prefopt: ") <= 1
    assert set(runs.rglob("*")) == before
