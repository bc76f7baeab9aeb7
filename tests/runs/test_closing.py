"""What a run or chain says of its end once its launcher has written it down."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from prefopt_cli.runs.closing import CHAIN_RECORD, close
from prefopt_cli.runs.folder import RunFolder


def a_run(folder: Path, status: str, error: str | None = None) -> RunFolder:
    folder.mkdir(parents=True)
    run = RunFolder(folder)
    run.manifest.write_text(json.dumps({"status": status, "error": error, "step": 3}))
    return run


def said(run: RunFolder) -> tuple[Any, ...]:
    manifest = run.read_manifest()
    return manifest["status"], manifest.get("error"), manifest["step"]


@pytest.mark.parametrize("before", ["running", "failed"])
@pytest.mark.parametrize(("status", "message"), [("interrupted", None), ("failed", "rank 1: no memory")])
def test_a_run_that_was_cut_off(tmp_path: Path, before: str, status: str, message: str | None) -> None:
    run = a_run(tmp_path / "run", before, "Connection closed by peer")
    close(run.path, status, message, since=time.time() - 60)
    assert said(run) == (status, message, 3)


@pytest.mark.parametrize("before", ["finished", "interrupted"])
def test_who_has_said_how_it_ended_is_believed(tmp_path: Path, before: str) -> None:
    run = a_run(tmp_path / "run", before)
    close(run.path, "failed", "too late", since=time.time() - 60)
    assert said(run)[0] == before


def test_an_earlier_run_is_not_touched(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", "failed", "of yesterday")
    os.utime(run.manifest, (time.time() - 100,) * 2)
    close(run.path, "interrupted", None, since=time.time() - 60)
    assert said(run)[:2] == ("failed", "of yesterday")


def test_a_chain_and_the_stage_in_training(tmp_path: Path) -> None:
    done, cut = a_run(tmp_path / "done", "finished"), a_run(tmp_path / "cut", "running")
    places = {"done": done.path, "cut": cut.path, "later": tmp_path / "later"}
    states = {"done": "finished", "cut": "running", "later": "waiting"}
    stages = [{"dimension": name, "run": str(places[name]), "status": states[name]} for name in places]
    record = tmp_path / CHAIN_RECORD
    record.write_text(json.dumps({"status": "running", "stages": stages}))
    close(tmp_path, "failed", "rank 1 was killed", since=time.time() - 60)
    assert (said(done)[0], said(cut)[:2]) == ("finished", ("failed", "rank 1 was killed"))
    found = json.loads(record.read_text())
    assert found["status"] == "failed"
    assert [each["status"] for each in found["stages"]] == ["finished", "failed", "waiting"]


@pytest.mark.parametrize("content", [None, "{oops", "[]", '{"status": "running"}'])
def test_folders_that_hold_nothing_of_use(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / CHAIN_RECORD).write_text(content)
    close(tmp_path, "failed", "whatever", since=0)
    assert [path.name for path in tmp_path.iterdir()] == ([CHAIN_RECORD] if content else [])
