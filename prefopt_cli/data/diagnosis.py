"""Turns a failed read into a message that says which file, which line, and what to do.

The library has already failed when anything here runs, so a file is simply read again, slowly and
strictly, until the place is found.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import Source


class _Found(Exception):
    """The place was found; the message names it."""


def missing(path: Path, extensions: Sequence[str]) -> str:
    """The message for a path that is not there, with near names from its folder."""
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: no such file, and no folder {folder} (paths are relative to {Path.cwd()})"
    near = difflib.get_close_matches(path.name, [entry.name for entry in folder.iterdir()], n=3, cutoff=0.6)
    if near:
        return f"{path}: no such file; did you mean {' or '.join(near)}?"
    data = sorted(entry.name for entry in folder.iterdir() if set(extensions) & set(entry.suffixes))
    listing = f"; data files there: {', '.join(data[:8])}" if data else ""
    return f"{path}: no such file (relative to {Path.cwd()}){listing}"


def unreadable_file(path: Path, loader: str | None, source: Source, error: Exception) -> UserError:
    """Why this file could not be read, with line and byte where they can be found."""
    place = _find_place(path, loader)
    return UserError(place) if place else unreadable(str(path), source, error)


def unreadable_folder(
    path: Path, loaders: Mapping[Path, str | None], source: Source, error: Exception
) -> UserError:
    """The same for a folder: the first broken file of it."""
    known = _about_selection(str(path), source, error)
    place = (
        None
        if known
        else next(filter(None, (_find_place(file, loader) for file, loader in loaders.items())), None)
    )
    return UserError(known or place) if known or place else unreadable(str(path), source, error)


def unreadable(name: str, source: Source, error: Exception) -> UserError:
    """A wrong split or configuration, or else the library's own reason in one line."""
    return UserError(_about_selection(name, source, error) or f"{name} cannot be read: {short_reason(error)}")


def unreachable(source: Source, error: Exception) -> UserError:
    """Why a hub dataset could not be had: unknown, gated, offline, or without this split or configuration."""
    name, reason = source.source, " ".join(str(error).split())
    if isinstance(error, ConnectionError) and "OfflineMode" in reason:
        hint = "HF_HUB_OFFLINE is set and the dataset is not in the cache: unset it, or give a local path"
    elif isinstance(error, ConnectionError):
        hint = "the hub cannot be reached: check the network, or give a local path"
    elif isinstance(error, FileNotFoundError) and "gated" in reason:
        hint = (
            f"it is gated: accept its terms at https://huggingface.co/datasets/{name}, then `hf auth login`"
        )
    elif isinstance(error, FileNotFoundError):
        hint = "check its spelling and `revision:`, and log in with `hf auth login` if it is private"
    else:
        return unreadable(name, source, error)
    return UserError(f"{name} is no local path, and the hub does not give it out\n  {hint}\n  ({reason})")


def short_reason(error: BaseException) -> str:
    """The innermost cause in one line: the outer errors of ``datasets`` only say that it failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__


def _about_selection(name: str, source: Source, error: Exception) -> str | None:
    """Whether the rows are there but the split, slice or configuration asked for is not."""
    text = str(error)
    if match := re.search(r'Unknown split "(.*?)"\. Should be one of \[(.*)\]', text):
        return f"{name} has no split {match[1]!r}; it has {_names(match[2])}"
    if match := re.search(r"BuilderConfig '(.*?)' not found\. Available: \[(.*)\]", text):
        return f"{name} has no configuration {match[1]!r}; it has {_names(match[2])}"
    if match := re.search(r"Config name is missing.*available configs: \[(.*?)\]", text, re.DOTALL):
        return f"{name} has several configurations; choose one with `config:`: {_names(match[1])}"
    if "Unrecognized instruction format" in text:
        return f"{name}: split {source.split!r} is not understood; write train, train[:10%] or train[100:200]"
    if "corresponds to no data" in text:
        return f"{name}: split {source.split} holds no rows"
    return None


def _names(listed: str) -> str:
    return listed.replace("'", "")


def _find_place(path: Path, loader: str | None) -> str | None:
    """A message with the place of the first error in a local file, or None where nothing is wrong with it."""
    try:
        if loader == "parquet":
            return None  # binary: the library's own reason is as good as any
        lines = list(_text_lines(path))
        if not any(line.strip() for line in lines):
            return f"{path} is empty"
        _check_csv(path, lines) if loader == "csv" else _check_json(path, lines)
    except _Found as found:
        return str(found)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror or error}"
    return None


def _text_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_byte_lines(path), start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _Found(
                f"{path}:{number}: byte {error.start} of the line (0x{line[error.start]:02x}) is not UTF-8; "
                "convert the file, for example with `iconv -f latin1 -t utf-8`"
            ) from error


def _byte_lines(path: Path) -> Iterator[bytes]:
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007 - told in the messages below
                yield line
    except EOFError as error:
        raise _Found(
            f"{path} is cut off: the compressed data ends after line {number}; fetch it again"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        broken = f"damaged after line {number}" if number else "not a gzip file, or damaged"
        raise _Found(f"{path} is {broken} ({error})") from error


def _check_json(path: Path, lines: list[str]) -> None:
    first = next(line for line in lines if line.strip()).lstrip()
    if first.startswith("["):
        _check_json_array(path, "".join(lines))
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise _Found(f"{path}:{number}: broken JSON at column {error.colno}: {error.msg}") from error
            _check_row(f"{path}:{number}", row)


def _check_json_array(path: Path, text: str) -> None:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise _Found(f"{path}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}") from error
    for number, row in enumerate(rows):
        _check_row(f"{path}: row {number}", row)


def _check_row(place: str, row: object) -> None:
    if not isinstance(row, dict):
        raise _Found(f'{place}: expected an object like {{"prompt": ...}}, found {json.dumps(row)[:60]}')


def _check_csv(path: Path, lines: list[str]) -> None:
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader)
        for cells in reader:
            if len(cells) > len(header):
                raise _Found(
                    f"{path}:{reader.line_num}: {len(cells)} fields where the header has {len(header)}; "
                    "quote texts that contain commas"
                )
    except csv.Error as error:
        raise _Found(f"{path}:{reader.line_num}: broken CSV: {error}") from error
