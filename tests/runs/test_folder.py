"""The run folder answers for itself."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.runs.folder import CHECKPOINT_MARK, RunFolder
from tests.cli.conftest import environment


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "mine")
    folder.create({"status": "running"}, "")
    return folder


def test_only_marked_checkpoints_count(run: RunFolder) -> None:
    assert run.last_checkpoint() is None
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-9", "checkpoint-best", "checkpoint-11"):
        (run.checkpoints / name).mkdir()
        if name != "checkpoint-11":  # cut off while it was written
            (run.checkpoints / name / CHECKPOINT_MARK).write_text("{}")
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-10"


def test_manifest_entries_are_replaced_one_by_one(run: RunFolder) -> None:
    run.update_manifest(step=3)
    run.update_manifest(status="finished")
    assert run.read_manifest() == {"status": "finished", "step": 3}


@pytest.mark.parametrize("content", [b"{oops", b"[]", b"\xff", b""])
def test_a_damaged_manifest(run: RunFolder, content: bytes) -> None:
    run.manifest.write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        run.read_manifest()


def test_a_run_is_replaced_only_when_asked(run: RunFolder) -> None:
    run.model.mkdir()
    with pytest.raises(UserError, match="--overwrite"):
        run.create({}, "")
    assert run.model.is_dir()
    run.create({}, "", overwrite=True)
    assert not run.model.exists()
    assert run.read_manifest() == {}


def test_what_is_not_a_run_is_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "chapter1.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="never deleted"):
            RunFolder(tmp_path).create({}, "", overwrite=overwrite)
    assert (tmp_path / "chapter1.tex").exists()


def test_an_empty_folder_is_free(tmp_path: Path) -> None:
    RunFolder(tmp_path).create({}, "")
    assert (tmp_path / "checkpoints").is_dir()


def test_asking_whether_it_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a" / "b" / "c").require_writable()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_file_systems_that_are_no_place_for_files() -> None:
    with pytest.raises(UserError, match=r"output_dir /proc/run cannot be written \(.+\)"):
        RunFolder(Path("/proc/run")).require_writable()


def test_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)  # root may write everywhere, so chmod would not do
    with pytest.raises(UserError, match="Permission denied"):
        RunFolder(tmp_path / "run").require_writable()


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_names_that_cannot_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be written") as caught:
        RunFolder(tmp_path / name).require_writable()
    assert len(str(caught.value)) < 400


def test_a_link_to_a_folder_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    RunFolder(tmp_path / "link").require_writable()
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="not a folder"):
        RunFolder(tmp_path / "link").require_writable()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create({"status": "running"}, "")
    with run.held(), pytest.raises(UserError, match="Another process"), RunFolder(run.path).held():
        pass
    with RunFolder(run.path).held():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_link_to_another_disk_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "large_disk")
    RunFolder(tmp_path / "run").create({"status": "running"}, "")
    assert (tmp_path / "run").is_symlink()
    assert (tmp_path / "large_disk" / "manifest.json").is_file()


def test_a_killed_process_lets_go(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create({}, "")
    program = (
        "import os, signal, sys; from pathlib import Path; from prefopt_cli.runs.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).held(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(run.path)], env=environment())
    assert done.returncode == -signal.SIGKILL
    with run.held():
        pass
