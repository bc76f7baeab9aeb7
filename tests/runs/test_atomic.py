"""A reader sees the old content or the new one, whatever goes wrong in between."""

import contextlib
import os
from pathlib import Path

import pytest

from prefopt_cli.runs import atomic


def test_text_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    atomic.write_json(path, {"a": "é"})
    atomic.write_json(path, {"b": 1})
    assert path.read_text(encoding="utf-8") == '{\n  "b": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_text(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("old")

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space"):
        atomic.write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        atomic.write_json(path, {"a": object()})
    assert path.read_text() == "old"


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    model = tmp_path / "model"
    for name in ("old", "new"):
        with atomic.folder(model) as folder:
            assert folder != model
            (folder / name).write_text(name)
            (folder / "deep").mkdir()
            (folder / "deep" / "file").write_text(name)
    assert sorted(path.name for path in model.iterdir()) == ["deep", "new"]
    assert list(tmp_path.iterdir()) == [model]


def test_the_old_folder_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "old").write_text("")
    with contextlib.suppress(RuntimeError), atomic.folder(model) as folder:
        (folder / "new").write_text("")
        assert (model / "old").exists()
        raise RuntimeError
    assert [path.name for path in model.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [model]


def test_leftovers_of_a_crash_do_not_get_in(tmp_path: Path) -> None:
    for leftover in (".model.partial", ".model.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "torn").write_text("")
    (tmp_path / "model").mkdir()
    with atomic.folder(tmp_path / "model") as folder:
        (folder / "whole").write_text("")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_is_never_seen_half_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while the old files are being removed: the new folder is in place already."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "old").write_text("")
    removed = []
    monkeypatch.setattr("shutil.rmtree", lambda path, **options: removed.append((path, model.is_dir())))
    with atomic.folder(model) as folder:
        (folder / "new").write_text("")
    assert removed[-1][1]
    assert model not in [path for path, _ in removed]
    assert [path.name for path in model.iterdir()] == ["new"]
