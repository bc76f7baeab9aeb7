"""Runs are found where they were, or below a folder that the user names."""

import re
import shutil
from pathlib import Path

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.runs.finding import DEEPEST, RunFinder
from prefopt_cli.runs.folder import RunFolder


def _run(path: Path, run_id: str = "id-a") -> RunFolder:
    run = RunFolder(path)
    run.create({"run_id": run_id, "status": "finished"}, "")
    return run


def _refusal(finder: RunFinder, place: Path | str, run_id: str | None = None, key: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        finder.find(str(place), run_id, key)
    return str(caught.value)


# --- In its place -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_id", [None, "id-a"])
def test_a_run_in_its_place(tmp_path: Path, run_id: str | None) -> None:
    run = _run(tmp_path / "a")
    for finder in (RunFinder(), RunFinder(tmp_path)):
        assert finder.find(str(run.path), run_id) == run
        assert finder.moved == {}


def test_its_place_comes_first(tmp_path: Path) -> None:
    """Copies below the folder do not make it unclear, and the folder need not be there."""
    run = _run(tmp_path / "a")
    for copy in ("one", "two"):
        shutil.copytree(run.path, tmp_path / "copies" / copy / "a")
    for folder in (tmp_path / "copies", tmp_path / "nowhere"):
        assert RunFinder(folder).find(str(run.path), "id-a") == run


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = _run(tmp_path / "runs" / "a")
    assert RunFinder().find("~/runs/a") == run


# --- Moved --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run_id", [None, "id-a"])
def test_a_moved_run_is_found_below_the_folder(tmp_path: Path, run_id: str | None) -> None:
    """By its id whatever it is called now; without one, by the name of its folder."""
    _run(tmp_path / "new" / "b", "id-b")
    run = _run(tmp_path / "new" / "deep" / ("a" if run_id is None else "renamed"))
    finder = RunFinder(tmp_path / "new")
    for place in (str(tmp_path / "old" / "a"), f"{tmp_path}/old/a/"):
        assert finder.find(place, run_id) == run
        assert finder.moved[place] == str(run.path)


def test_the_folder_may_itself_be_the_run(tmp_path: Path) -> None:
    run = _run(tmp_path / "new" / "a")
    assert RunFinder(run.path).find(str(tmp_path / "old" / "a"), "id-a").path == run.path


def test_the_id_counts_not_the_name(tmp_path: Path) -> None:
    """A run of the same name, and even in the old place, is another one if its id is another."""
    old, now = _run(tmp_path / "runs" / "a", "id-new"), _run(tmp_path / "archive" / "a-first", "id-old")
    _run(tmp_path / "archive" / "a", "id-other")
    finder = RunFinder(tmp_path / "archive")
    assert finder.find(str(old.path), "id-old") == now
    assert finder.moved == {str(old.path): str(now.path)}


def test_how_deep_it_is_looked_for(tmp_path: Path) -> None:
    place = str(tmp_path / "old" / "a")
    within = tmp_path.joinpath("runs", *"abcdefgh"[:DEEPEST])
    run = _run(within)
    assert RunFinder(tmp_path / "runs").find(place, "id-a") == run
    run.path.rename(tmp_path / "away")
    _run(within / "deeper")
    assert "there is no run in" in _refusal(RunFinder(tmp_path / "runs"), place, "id-a")


def test_what_is_not_looked_into(tmp_path: Path) -> None:
    """A run's own folders, such as a copied manifest in a checkpoint, and hidden ones, such as one half deleted."""
    outer = _run(tmp_path / "runs" / "b", "id-b")
    _run(outer.checkpoints / "checkpoint-1")
    _run(tmp_path / "runs" / ".a.old")
    finder = RunFinder(tmp_path / "runs")
    assert "there is no run in" in _refusal(finder, tmp_path / "old" / "a", "id-a")
    assert finder.moved == {}


@pytest.mark.parametrize("content", ["{oops", "[]", "{}"])
def test_damaged_manifests_below_the_folder_are_passed_by(tmp_path: Path, content: str) -> None:
    _run(tmp_path / "runs" / "broken").manifest.write_text(content)
    run = _run(tmp_path / "runs" / "sound")
    assert RunFinder(tmp_path / "runs").find(str(tmp_path / "old" / "a"), "id-a") == run


# --- Refused ------------------------------------------------------------------------------------------------------


def test_no_run_there_and_no_folder_named(tmp_path: Path) -> None:
    place = tmp_path / "a"
    assert _refusal(RunFinder(), place) == (
        f"there is no run in {place}. Train it first, or name the folder that it was moved to with --runs-dir."
    )
    assert _refusal(RunFinder(), place, "id-a", "method.previous").startswith(
        "method.previous: there is no run"
    )


def test_neither_there_nor_below_the_folder(tmp_path: Path) -> None:
    _run(tmp_path / "runs" / "b", "id-b")
    told = _refusal(RunFinder(tmp_path / "runs"), tmp_path / "a", "id-a")
    assert told.startswith(f"there is no run in {tmp_path}/a, nor below {tmp_path}/runs. ")


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert "is no run folder (it has no manifest.json)" in _refusal(RunFinder(), tmp_path / "a")
    (tmp_path / "file").write_text("")
    assert "there is no run in" in _refusal(RunFinder(), tmp_path / "file")


def test_another_run_lies_in_its_place(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", "id-new")
    told = _refusal(RunFinder(), run.path, "id-old", "method.previous")
    assert told.startswith(
        f"method.previous: {run.path} holds another run than the one that is meant (run id id-old)"
    )
    (tmp_path / "runs").mkdir()
    told = _refusal(RunFinder(tmp_path / "runs"), run.path, "id-old")
    assert f"neither there nor below {tmp_path}/runs any more" in told


def test_a_damaged_manifest_in_its_place(tmp_path: Path) -> None:
    run = _run(tmp_path / "a")
    run.manifest.write_text("{oops")
    assert re.search(r"manifest\.json cannot be read", _refusal(RunFinder(), run.path, "id-a"))


@pytest.mark.parametrize("run_id", [None, "id-a"])
def test_several_could_be_meant(tmp_path: Path, run_id: str | None) -> None:
    runs = [_run(tmp_path / "runs" / group / "a") for group in ("one", "two")]
    finder = RunFinder(tmp_path / "runs")
    told = _refusal(finder, tmp_path / "old" / "a", run_id)
    assert told.endswith(
        f"several below {tmp_path}/runs could be meant: {runs[0].path}, {runs[1].path}. Name one of them."
    )
    assert finder.moved == {}


def test_the_named_folder_is_not_there(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        (tmp_path / "file").write_text("")
        told = _refusal(RunFinder(folder), tmp_path / "a")
        assert told.endswith(f"--runs-dir: there is no folder {folder}.")
