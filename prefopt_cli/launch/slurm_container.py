"""What a job's container sees of the machine: the folders and files that the run reads and writes.

All have the same path inside and outside, so that a recipe means the same in both.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.launch.batch_script import Work

CACHES = ("HF_HOME", "PREFOPT_CACHE")
"""Variables that name folders of models, data and scores, to be kept between runs."""
NOT_IN_MOUNTS = re.compile(r"[\s,:\"'`$\\#]")
"""Pyxis parts mounts at commas and colons, and hands them to enroot as lines of a mount table."""


def output_outside(work: Work, asked: Sequence[str]) -> str:
    """output_dir as the script knows it, which runs outside the container.

    Args:
        work: what the job does.
        asked: HOST or HOST:CONTAINER, of the user.

    Raises:
        UserError: it lies in a home folder by ~, which is another one in the container; or a mount is none.
    """
    _require_no_home("output_dir", work.output_dir)
    inside = PurePath(os.path.abspath(work.output_dir))
    mounts = dict(_asked(text) for text in asked)
    for target in sorted(mounts, key=_depth, reverse=True):
        if inside.is_relative_to(target):
            return str(mounts[target] / inside.relative_to(target))
    return str(inside)


def caches(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The folders of `CACHES` that are there, by variable."""
    found = {name: environ.get(name) or "" for name in CACHES}
    return {name: os.path.abspath(place) for name, place in found.items() if place and os.path.isdir(place)}


def container_mounts(work: Work, asked: Sequence[str], environ: Mapping[str, str] = os.environ) -> str:
    """The value of pyxis's `--container-mounts`.

    These are the present folder, the recipe's, the one above output_dir, whatever of this machine the recipe names,
    and the caches that the environment names; each once, the outer before the inner.

    Args:
        work: what the job does.
        asked: HOST or HOST:CONTAINER, of the user; they count before the others.
        environ: the environment's variables.

    Raises:
        UserError: pyxis has no way to write one of them, or it means something else in the container.
    """
    mounts = dict(_asked(text) for text in asked)
    own = dict.fromkeys(_wanted(work, environ))
    for place in sorted(own, key=_depth):
        if any(PurePath(place).is_relative_to(target) for target in mounts):
            continue
        if place == "/":
            raise UserError(
                "--container: the root folder / cannot be mounted, and the present folder or the one above output_dir "
                f"({work.output_dir}) is it. Work in a folder below, and choose an output_dir like /runs/NAME."
            )
        _require_plain("--container", place)
        mounts[place] = PurePath(place)
    return ",".join(f"{mounts[target]}:{target}" for target in sorted(mounts, key=_depth))


def _depth(place: str) -> int:
    return len(PurePath(place).parts)


def _asked(text: str) -> tuple[str, PurePath]:
    """Target and source of a mount of the user's."""
    source, _, target = text.partition(":")
    target = target or source
    if ":" in target or not all(place.startswith("/") for place in (source, target)) or text.endswith(":"):
        raise UserError(
            f"--container-mount: expected /FOLDER or /FOLDER:/FOLDER/IN/THE/CONTAINER, found {text!r}."
        )
    source, target = os.path.normpath(source), os.path.normpath(target)
    if "/" in (source, target):
        raise UserError(f"--container-mount: the root folder / cannot be mounted, found {text!r}.")
    for place in (source, target):
        _require_plain("--container-mount", place)
    return target, PurePath(source)


def _wanted(work: Work, environ: Mapping[str, str]) -> Iterator[str]:
    """Absolute paths; of a link, what it leads to as well."""
    yield os.getcwd()
    _require_no_home("output_dir", work.output_dir)
    yield os.path.dirname(os.path.abspath(work.output_dir))
    yield os.path.dirname(os.path.realpath(work.output_dir))
    for path in (os.path.abspath(work.path), os.path.realpath(work.path)):
        yield os.path.dirname(path)
    places = {
        text for text in _texts(work.content) if text.strip("/. ") and len(text) < 1000 and text.isprintable()
    }
    for place in sorted(places):
        if os.path.exists(os.path.expanduser(place)):
            _require_no_home("recipe", place)
            yield from (os.path.abspath(place), os.path.realpath(place))
    for place in caches(environ).values():
        yield from (place, os.path.realpath(place))


def _texts(data: Any) -> Iterable[str]:
    """All texts in plain data."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _texts(value)
    elif isinstance(data, list | tuple):
        for value in data:
            yield from _texts(value)


def _require_no_home(what: str, place: str) -> None:
    if place.startswith("~"):
        raise UserError(
            f"--container: {what}: {place} is another place in the container, whose home folder is its own. Write it "
            f"out: {os.path.expanduser(place)}."
        )


def _require_plain(option: str, place: str) -> None:
    found = NOT_IN_MOUNTS.search(place)
    if found is not None or not place.isprintable():
        letter = repr(found[0]) if found else "a character that cannot be printed"
        raise UserError(
            f"{option}: {place} cannot be mounted in the container, as pyxis has no way to write {letter} in a path. "
            "Rename it, or work from another folder."
        )
