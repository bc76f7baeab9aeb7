"""Free disk where something is written, and how much the caches hold."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants

from prefopt_cli.errors import UserError
from prefopt_cli.launch.doctor.finding import Finding, gibibytes, note, ok, problem
from prefopt_cli.runs.cache import VARIABLE, cache_folder
from prefopt_cli.runs.writable import require_writable

LITTLE_DISK = 10 * 2**30
"""Less than the weights of a model of a few billion parameters."""
NO_DISK = 100 * 2**20
FEW_FILES = 1000
PATIENCE = 5.0
"""Seconds to add up one cache's sizes; on network disks a walk may take minutes."""


def disks() -> Iterator[Finding]:
    """The working folder, the temporary folder, prefopt's cache and the hub's."""
    yield room("working folder", Path.cwd(), "change to another folder: cd /path/with/space")
    temporary = Path(tempfile.gettempdir())
    yield room("temporary folder", temporary, "name another: export TMPDIR=/path/with/space")
    own, hub = cache_folder(), Path(constants.HF_HUB_CACHE)
    yield room("prefopt's cache", own, f"name another: export {VARIABLE}=/path/with/space")
    yield _size("prefopt's cache", own, "prefopt cache info")
    yield room("the hub's cache", hub, "name another: export HF_HOME=/path/with/space")
    yield _size("the hub's cache", hub, "hf cache ls")


def room(name: str, folder: Path, remedy: str) -> Finding:
    """Whether a folder can be written, and how much room there is."""
    try:
        require_writable(folder, key=name)
        existing = next(each for each in (folder, *folder.parents) if each.is_dir())
        free = shutil.disk_usage(existing).free
        files = os.statvfs(existing)
    except (OSError, UserError) as error:
        return problem(str(error), remedy)
    text = f"{name}: {gibibytes(free)} free ({folder})"
    if files.f_files and files.f_favail < FEW_FILES:
        return problem(f"{text}, but room for {files.f_favail} more files only", remedy)
    if free < NO_DISK:
        return problem(text, remedy)
    return note(text, remedy) if free < LITTLE_DISK else ok(text)


def _size(name: str, folder: Path, details: str) -> Finding:
    if not folder.is_dir():
        return ok(f"{name} is empty")
    size, complete = folder_size(folder)
    about = "" if complete else "at least "
    return ok(f"{name} holds {about}{gibibytes(size)} (what it is: {details})")


def folder_size(folder: Path, patience: float = PATIENCE) -> tuple[int, bool]:
    """Bytes of a folder's files, links not followed, and whether there was time for all."""
    until, size, left = time.monotonic() + patience, 0, [str(folder)]
    while left:
        if time.monotonic() > until:
            return size, False
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        size += entry.stat(follow_symlinks=False).st_size
        except OSError:  # gone meanwhile, or not ours to read
            continue
    return size, True
