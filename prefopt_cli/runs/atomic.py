"""Writing so that a reader sees the old content or the new one, never half of it."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


def write_text(path: Path, text: str) -> None:
    """Replace a file's content at once: temporary file beside it, fsync, rename.

    Raises:
        OSError: the disk is full or the folder cannot be written; the old file is untouched.
    """
    with file(path) as opened:
        opened.write(text.encode("utf-8"))


@contextlib.contextmanager
def file(path: Path) -> Iterator[BinaryIO]:
    """A new file, opened for bytes, that takes the place of `path` when the block ends well.

    Raises:
        OSError: as in `write_text`.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as opened:
            yield opened
            opened.flush()
            os.fsync(opened.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def write_json(path: Path, value: Any) -> None:
    """As `write_text`, for a JSON value."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, values: Iterable[Any]) -> None:
    """As `write_text`, for one JSON value a line."""
    with file(path) as opened:
        for value in values:
            opened.write((json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8"))


@contextlib.contextmanager
def folder(path: Path) -> Iterator[Path]:
    """A new folder that takes the place of `path` when the block ends well, and is gone when it fails."""
    temporary = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync(temporary)
        if path.exists():
            # Deleting takes a while; until it is done, the old folder must not stand there in part.
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sync(folder: Path) -> None:
    """See every file of a folder onto the disk."""
    for each in folder.rglob("*"):
        if each.is_file():
            with each.open("rb") as opened:
                os.fsync(opened.fileno())
