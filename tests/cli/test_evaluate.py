"""`prefopt eval`."""

import contextlib
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Prefopt, environment
from tests.evaluation.plain import read
from tests.tiny import pairs, write_pairs
from tests.training.conftest import (
    LORA,
    Run,
    make_recipe,  # noqa: F401  (a fixture, as are the next)
    run,  # noqa: F401
    shared_run,  # noqa: F401
)

FILES = {"summary.json", "pairs.jsonl", "report.html"}


@pytest.fixture
def trained(shared_run: Run) -> Path:  # noqa: F811
    """A finished run."""
    return shared_run("trained").run.path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve pairs, four of them the training data's; six of each dimension."""
    rows = [*pairs(4, seed=1), *pairs(8, seed=51)]
    dimensions = ["tone", "facts"] * 6
    write_pairs(
        tmp_path / "more.jsonl",
        [{**row, "dimension": name} for row, name in zip(rows, dimensions, strict=True)],
    )
    return tmp_path / "more.jsonl"


def summary(result: Any) -> dict[str, Any]:
    assert result.code == 0, result.err
    found: dict[str, Any] = json.loads(result.out)
    return found


def test_the_terminal_and_the_files(prefopt: Prefopt, trained: Path) -> None:
    result = prefopt("eval", str(trained))
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1] == f"Files: {trained}/eval/heldout (report.html opens in a browser)"
    for told in ("by reward", "length alone", "calibration of sigma(margin)", "24 pairs", "Only 24 prompts"):
        assert told in result.out
    assert "reward:    beta * (logp - reference's logp), beta = 0.1" in result.out
    assert "Log-probabilities under the policy" in result.err
    folder = trained / "eval" / "heldout"
    assert {each.name for each in folder.iterdir()} == FILES
    written = json.loads((folder / "summary.json").read_text())
    assert written.keys() >= {"policy", "reference", "reward", "level", "sets", "findings", "scores"}
    assert written["sets"]["heldout"]["train_overlap"] == {"prompts": 0, "pairs": 0}
    assert written["sets"]["heldout"]["notes"] == []
    assert len(read(folder / "pairs.jsonl")) == 24


def test_json_is_the_summary_and_nothing_else(prefopt: Prefopt, trained: Path, tmp_path: Path) -> None:
    first = summary(prefopt("eval", str(trained), "--json", "--output", str(tmp_path / "a" / "b")))
    assert first == json.loads((tmp_path / "a" / "b" / "summary.json").read_text())
    assert {each.name for each in (tmp_path / "a" / "b").iterdir()} == FILES
    again = summary(prefopt("eval", str(trained), "--json", "--output", str(tmp_path / "c")))
    assert again["scores"] == {"computed": 0, "from_cache": 96}
    for name in ("policy", "reference", "reward", "sets", "findings"):
        assert again[name] == first[name]


def test_other_data(prefopt: Prefopt, trained: Path, data: Path, tiny_world: Path) -> None:
    found = summary(prefopt("eval", str(trained), "--json", "--data", str(data)))
    assert list(found["sets"]) == ["more"]
    assert found["sets"]["more"]["pairs"] == 12
    assert found["sets"]["more"]["train_overlap"] == {"prompts": 4, "pairs": 4}
    assert "train_overlap" in [each["code"] for each in found["findings"]]
    assert {each.name for each in (trained / "eval" / "more").iterdir()} == FILES
    two = ("--data", str(data), "--data", f"old={tiny_world}/heldout.jsonl", "--name", "both")
    found = summary(prefopt("eval", str(trained), "--json", *two))
    assert {name: each["pairs"] for name, each in found["sets"].items()} == {"more": 12, "old": 24}
    assert (trained / "eval" / "both" / "summary.json").is_file()
    assert {each["set"] for each in read(trained / "eval" / "both" / "pairs.jsonl")} == {"more", "old"}
    by_dimension = ("--data", str(data), "--dimension", "all", "dataset.max_length=200")
    found = summary(prefopt("eval", str(trained), "--json", *by_dimension))
    assert {name: each["pairs"] for name, each in found["sets"].items()} == {"tone": 6, "facts": 6}
    assert found["sets"]["tone"]["dropped"] == {"filtered by where": 6}


def test_overrides(prefopt: Prefopt, trained: Path, data: Path) -> None:
    own = f"dataset.eval={{kind: {data}, same: {data}}}"
    found = summary(prefopt("eval", str(trained), "--json", own))
    assert list(found["sets"]) == ["kind", "same"]
    assert found["sets"]["kind"]["figures"] == found["sets"]["same"]["figures"]
    prefopt("eval", str(trained), own, "--dimension", "same", "--name", "one")
    assert list(json.loads((trained / "eval" / "one" / "summary.json").read_text())["sets"]) == ["same"]
    short = summary(prefopt("eval", str(trained), "--json", "--data", str(data), "dataset.max_length=40"))
    dropped = short["sets"]["more"]["dropped"]
    assert dropped.keys() == {"response too long"}
    assert short["sets"]["more"]["pairs"] + dropped["response too long"] == 12
    assert "dropped_rows" in [each["code"] for each in short["findings"]]


def test_other_references_and_scales(prefopt: Prefopt, trained: Path, tiny_world: Path) -> None:
    usual = summary(prefopt("eval", str(trained), "--json"))
    wider = summary(prefopt("eval", str(trained), "--json", "--beta", "0.5"))
    assert wider["reward"] == {**usual["reward"], "scale": 0.5}
    margins = [each["sets"]["heldout"]["figures"]["margin/reward"]["value"] for each in (usual, wider)]
    assert margins[1] == pytest.approx(5 * margins[0])
    result = prefopt("eval", str(trained), "--reference", "none", "--name", "alone")
    assert "reward:    none without a reference" in result.out
    alone = json.loads((trained / "eval" / "alone" / "summary.json").read_text())
    assert alone["reference"] is alone["reward"] is None
    assert alone["sets"]["heldout"]["main"] == "logp"
    itself = summary(prefopt("eval", str(trained), "--json", "--reference", str(trained)))
    assert itself["sets"]["heldout"]["figures"]["change/chosen"]["value"] == 0
    assert itself["sets"]["heldout"]["figures"]["accuracy/reward"]["value"] == 0.5


def test_models(
    prefopt: Prefopt,
    trained: Path,
    tiny_world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    data: Path,
) -> None:
    """A model has no recipe: its files go where the command was given."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_world / "model", tmp_path / "models" / "base")
    found = summary(prefopt("eval", "models/base", "--json", "--data", str(data)))
    assert found["policy"]["run"] is found["policy"]["method"] is found["reward"] is None
    assert {each.name for each in (tmp_path / "eval" / "models-base" / "more").iterdir()} == FILES
    assert found["sets"]["more"]["train_overlap"] is None
    assert "no run tells" in found["sets"]["more"]["notes"][0]
    asked = ("--reference", "models/base", "--data", str(data), "--name", "own")
    found = summary(prefopt("eval", str(trained / "model"), "--json", *asked))
    assert found["reward"]["scale"] == 0.1
    assert "models/base" in found["reference"]["description"]


def test_lists_on_the_terminal(prefopt: Prefopt, trained: Path, tmp_path: Path) -> None:
    rows = [
        {
            "prompt": f"Human: say {n}\nAssistant:",
            "responses": [f" {n}.", f" {n + 1}.", " No."],
            "ranking": [0, 1, 1],
        }
        for n in range(6)
    ]
    (tmp_path / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = prefopt("eval", str(trained), "--data", str(tmp_path / "lists.jsonl"))
    assert result.code == 0, result.err
    assert "Kendall's tau by reward" in result.out
    assert "best of n by chance, %" in result.out
    assert "33.3" in result.out
    own = json.loads((trained / "eval" / "lists" / "summary.json").read_text())["sets"]["lists"]
    assert (own["rows"], own["pairs"], own["lists"]) == (6, 12, 6)


def test_training_data_that_is_gone(
    prefopt: Prefopt,
    run: Run,  # noqa: F811
    tmp_path: Path,
) -> None:
    write_pairs(tmp_path / "own.jsonl", pairs(10, seed=61))
    path = run("own", "training.max_steps=1", f"dataset.train={tmp_path}/own.jsonl").run.path
    (tmp_path / "own.jsonl").unlink()
    held_out = summary(prefopt("eval", str(path), "--json"))["sets"]["heldout"]
    assert held_out["train_overlap"] is None
    assert len(held_out["notes"]) == 1
    assert "own.jsonl: no such file" in held_out["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{world}/gone/gone",), "RUN_OR_MODEL: there is no folder"),
        (("{world}/heldout.jsonl",), "is a file; name the folder"),
        (("{run}", "--data", "{tmp}/gone.jsonl"), "gone.jsonl"),
        (("{run}", "--data", "{tmp}/columns.jsonl"), "no format fits its rows"),
        (("{run}", "--data", "{tmp}/empty.jsonl"), "empty.jsonl"),
        (("{run}", "dataset.max_length=2"), "has no usable rows left (prompt too long 24)"),
        (("{run}", "--dimension", "calm"), "--dimension calm: the recipe has no held-out set of this name"),
        (("{run}", "--data", "{world}/heldout.jsonl", "--dimension", "calm"), "has none of it; it has"),
        (("{run}", "--split", "test"), "--split is of the preferences that --data names"),
        (("{run}", "--beta", "0"), "--beta 0: every reward would be 0"),
        (("{run}", "--beta", "-1"), "--beta"),
        (("{run}", "--name", "a/b"), "--name 'a/b': a name has letters"),
        (("{run}", "--name", ".."), "--name '..': a name has letters"),
        (("{run}", "--reference", "{tmp}/other"), "has another tokenizer"),
        (("{run}", "--reference", "{tmp}/gone/gone"), "--reference: there is no folder"),
        (("{run}", "method.beta=1"), "the run has settled method.beta"),
        (("{run}", "dataset.max_lenght=4"), "max_lenght"),
        (("{run}", "nonsense"), "nonsense"),
        (("{world}/model",), "There are no held-out preferences"),
        (("{tmp}/unfinished",), "has no finished policy"),
        (("{run}", "--output", "{world}/heldout.jsonl/x"), "is a file, not a folder"),
        (("{run}", "--output", "/proc/x"), "--output /proc/x cannot be written"),
    ],
)
def test_bad_input(
    arguments: tuple[str, ...],
    message: str,
    prefopt: Prefopt,
    trained: Path,
    tiny_world: Path,
    tmp_path: Path,
) -> None:
    """One message, exit code 2, nothing written."""
    if "unfinished" in arguments[0]:
        shutil.copytree(trained, tmp_path / "unfinished", ignore=shutil.ignore_patterns("eval"))
        manifest = tmp_path / "unfinished" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"finished"', '"interrupted"'))
    if "{tmp}/other" in arguments:
        other_tokens(tiny_world / "model", tmp_path / "other")
    (tmp_path / "columns.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (tmp_path / "empty.jsonl").touch()
    before = contents(tmp_path, trained)
    named = [each.format(world=tiny_world, run=trained, tmp=tmp_path) for each in arguments]
    result = prefopt("eval", *named, "--json")
    assert result.code == 2, result
    assert result.out == ""
    assert "Traceback" not in result.err
    # Typer frames what it refuses itself, and wraps lines.
    told = " ".join(result.err.replace("│", " ").split())
    assert " ".join(message.split()) in told
    assert told.count("prefopt: ") <= 1
    assert contents(tmp_path, trained) == before


def contents(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*")}


def other_tokens(model: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(folder)


def test_an_adapter_folder(prefopt: Prefopt, shared_run: Run, data: Path, tmp_path: Path) -> None:  # noqa: F811
    path = shared_run("lora", LORA).run.path
    given = ("--data", str(data), "--output", str(tmp_path / "out"), "--json")
    alone = summary(prefopt("eval", str(path / "model"), *given))
    of_run = summary(prefopt("eval", str(path), *given))
    assert alone["reward"] is None
    names = [name for name in alone["sets"]["more"]["figures"] if name.startswith("logp")]
    for name in names:
        assert alone["sets"]["more"]["figures"][name] == of_run["sets"]["more"]["figures"][name]


def test_other_processes_are_silent(
    prefopt: Prefopt, trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "1")
    result = prefopt("eval", str(trained), "--output", str(tmp_path / "out"))
    assert (result.code, result.out, result.err) == (0, "", "")
    assert not (tmp_path / "out").exists()


MANY = 4000


def known(cache: Path) -> int:
    """How many scores the cache holds."""
    file = cache / "scores" / "scores.sqlite"
    with (
        contextlib.suppress(sqlite3.Error),
        contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database,
    ):
        return int(database.execute("SELECT count(*) FROM scores").fetchone()[0])
    return 0


@pytest.mark.slow
def test_a_signal_while_scoring(trained: Path, tmp_path: Path) -> None:
    """SIGINT in a real process: one line, exit code 130, nothing written; the next run computes only the rest."""
    rows = [
        {**row, "chosen": 4 * row["chosen"], "rejected": 4 * row["rejected"]} for row in pairs(MANY, seed=71)
    ]
    write_pairs(tmp_path / "many.jsonl", rows)
    variables = {**environment(), "PREFOPT_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "prefopt_cli", "eval", str(trained), "--json"]
    command += ["--data", str(tmp_path / "many.jsonl"), "--output", str(tmp_path / "out")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables
    ) as process:
        while not known(tmp_path / "cache") and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, rest = process.communicate(timeout=100)
    assert process.returncode == 130, rest
    assert out == ""
    assert "Traceback" not in rest
    assert rest.count("Stopped. What was scored is in the cache") == 1
    assert not (tmp_path / "out").exists()
    again = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=300)
    assert again.returncode == 0, again.stderr
    scores = json.loads(again.stdout)["scores"]
    assert scores["computed"] + scores["from_cache"] == 4 * MANY
    assert 0 < scores["from_cache"] < 2 * MANY
    assert (tmp_path / "out" / "summary.json").is_file()


def test_every_evaluation_has_a_folder_of_its_own(
    prefopt: Prefopt, trained: Path, data: Path, tiny_world: Path
) -> None:
    """What is asked otherwise does not take another one's place, and never that of another command's files."""
    asked = [
        (),
        ("--beta", "0.5"),
        ("--reference", "none"),
        ("--dimension", "heldout"),
        ("dataset.max_length=100",),
        ("--data", str(data)),
        ("--data", str(data), "--data", f"{tiny_world}/heldout.jsonl"),
        ("--data", f"compare={data}"),
        ("--data", str(data), "--split", "train[:50%]"),
    ]
    folders = []
    for arguments in asked:
        result = prefopt("eval", str(trained), *arguments)
        assert result.code == 0, result.err
        folders.append(result.out.splitlines()[-1].split()[1])
    assert len(set(folders)) == len(asked)
    names = [Path(folder).name for folder in folders]
    assert names[:4] == ["heldout", "heldout-beta-0.5", "heldout-from-none", "heldout-heldout"]
    assert names[5:] == ["more", "more-heldout", "compare-data", "more-train-50"]
    refused = prefopt("eval", str(trained), "--name", "compare")
    assert refused.code == 2
    assert "eval/compare is where `prefopt compare` writes" in refused.err
    assert not (trained / "eval" / "compare").exists()


def test_a_recipe_whose_files_are_elsewhere(
    prefopt: Prefopt,
    run: Run,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "own.jsonl", pairs(10, seed=61))
    path = run("own", "training.max_steps=1", "dataset.eval={own: own.jsonl}").run.path
    (tmp_path / "deeper").mkdir()
    monkeypatch.chdir(tmp_path / "deeper")
    result = prefopt("eval", str(path))
    assert result.code == 2
    assert (
        f"It is named by {path}/recipe.yaml, from the folder in which the training was started" in result.err
    )
