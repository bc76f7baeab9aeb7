"""Where rows come from: files, folders on disk and the hub, read by the ``datasets`` library, or a scheme."""

from __future__ import annotations

import csv
import glob
import gzip
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from prefopt_cli.data import diagnosis
from prefopt_cli.data.examples import Progress
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.schema import Source
from prefopt_cli.recipe.schemes import Named, find_scheme, has_scheme

LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""File extension (before an optional ``.gz``) -> loader of ``datasets``."""

JSON_BLOCK = 64 << 20
"""Bytes of JSON whose column types are settled together: a stray value of another type in the first
64 MiB makes one malformed row there; with the library's 10 MB it would more often make an unreadable file."""

HUB_ID = re.compile(r"^[\w-][\w.-]*(/[\w-][\w.-]*)?$")


def open_source(source: Source, progress: Progress | None = None) -> datasets.Dataset:
    """All rows of ``source``'s split, unfiltered. ``progress`` is told of a scheme's work on its data.

    Raises:
        UserError: it is missing, unreadable or empty; the message says where and, if possible, which line.
    """
    with _quiet():
        dataset = _open(source, progress).with_format(None)
    if not len(dataset):
        raise UserError(f"{source.source}: split {source.split} holds no rows")
    return dataset


def label(source: Source) -> str:
    """The short name in row ids and receipts: file name, hub id or scheme's name; the split if not ``train``."""
    in_full = has_scheme(source.source) or looks_like_hub_id(source)
    name = source.source if in_full else Path(source.source).expanduser().absolute().name
    config = f"/{source.config}" if source.config else ""
    split = f"/{source.split}" if source.split != "train" else ""
    return name + config + split


def _open(source: Source, progress: Progress | None) -> datasets.Dataset:
    """The one place that decides what a source's name means."""
    if named := find_scheme(source.source, "source"):
        return _of_scheme(named, source, progress)
    if looks_like_hub_id(source):
        return _from_hub(source)
    path = Path(source.source).expanduser()
    if not path.exists():
        raise UserError(diagnosis.missing(path, sorted(LOADERS)))
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _saved_folder(path, source)
    return _folder(path, source) if path.is_dir() else _file(path, source)


def looks_like_hub_id(source: Source) -> bool:
    """Whether the name is no local path but has the form ``name`` or ``owner/name`` of a hub dataset."""
    name = source.source
    return not Path(name).expanduser().exists() and _loader(Path(name)) is None and bool(HUB_ID.match(name))


def _loader(path: Path) -> str | None:
    """The loader that reads this file, by its extension."""
    zipped = path.suffix == ".gz"
    loader = LOADERS.get(Path(path.stem).suffix if zipped else path.suffix)
    return None if zipped and loader == "parquet" else loader


def _file(path: Path, source: Source) -> datasets.Dataset:
    loader = _loader(path)
    if loader is None:
        raise UserError(
            f"{path}: files of this kind cannot be read; known are {', '.join(sorted(LOADERS))} (and .gz)"
        )
    _refuse_hub_settings(source, "a file on disk", config=True)
    if not path.stat().st_size:
        raise UserError(f"{path} is empty")
    try:
        files = {"train": glob.escape(str(path.absolute()))}
        options = _options(loader, path)
        return _valid(datasets.load_dataset(loader, data_files=files, split=source.split, **options))
    except Exception as error:  # the library raises whatever its parsers raise, down to StopIteration
        raise diagnosis.unreadable_file(path, loader, source, error) from error


def _folder(path: Path, source: Source) -> datasets.Dataset:
    """A folder of data files, split by file names or by its README as on the hub."""
    _refuse_hub_settings(source, "a folder on disk", config=False)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and _loader(file)]
    if not files:
        raise UserError(f"{path} holds no data files ({', '.join(sorted(LOADERS))}) and no saved dataset")
    try:
        options = _options(_loader(files[0]), files[0])
        name = str(path.absolute())
        # By name even where there is only one: options without a name would make a new configuration.
        config = source.config or _only_config(name)
        return _valid(datasets.load_dataset(name, config, split=source.split, **options))
    except UserError:
        raise
    except Exception as error:
        loaders = {file: _loader(file) for file in files}
        raise diagnosis.unreadable_folder(path, loaders, source, error) from error


def _only_config(folder: str) -> str | None:
    """The configuration that a folder's README declares, None where it declares none."""
    names = datasets.get_dataset_config_names(folder)
    if "default" in names:
        return None
    if len(names) > 1:
        raise UserError(f"{folder} has several configurations; choose one with `config:`: {', '.join(names)}")
    return names[0]


def _valid(dataset: datasets.Dataset) -> datasets.Dataset:
    """``dataset``, if its texts are UTF-8: the JSON loader does not look, and reading rows would fail."""
    dataset.data.validate(full=True)
    return dataset


def _saved_folder(path: Path, source: Source) -> datasets.Dataset:
    """What ``save_to_disk`` wrote: a lone dataset counts as split ``train``."""
    _refuse_hub_settings(source, "a saved dataset on disk", config=True)
    try:
        saved = datasets.load_from_disk(str(path))
    except Exception as error:
        raise diagnosis.unreadable(str(path), source, error) from error
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    return _selected(splits, str(path), source)


def _of_scheme(named: Named, source: Source, progress: Progress | None) -> datasets.Dataset:
    _refuse_hub_settings(source, "not on the hub", config=False)
    splits = named.scheme.dataset(named.name, source.config, progress)
    return _selected(splits, source.source, source)


def _selected(splits: Mapping[str, datasets.Dataset], name: str, source: Source) -> datasets.Dataset:
    """The rows that ``source.split`` asks for: a split, a slice, or several joined by ``+``."""
    try:
        slices = datasets.ReadInstruction.from_spec(source.split).to_absolute(
            {split: len(rows) for split, rows in splits.items()}
        )
        numbers = [(splits[part.splitname], list(range(part.from_, part.to))) for part in slices]
        return datasets.concatenate_datasets([rows.select(chosen) for rows, chosen in numbers])
    except Exception as error:
        raise diagnosis.unreadable(name, source, error) from error


def _from_hub(source: Source) -> datasets.Dataset:
    try:
        return datasets.load_dataset(
            source.source, source.config, split=source.split, revision=source.revision
        )
    except Exception as error:
        raise diagnosis.unreachable(source, error) from error


def _refuse_hub_settings(source: Source, what: str, *, config: bool) -> None:
    """Refuse settings that only a hub dataset has, ``config`` among them or not, instead of ignoring them."""
    given = {"revision": source.revision, "config": source.config if config else None}
    for name, value in given.items():
        if value is not None:
            raise UserError(f"{source.source} is {what}, so `{name}: {value}` has no meaning for it")


def _options(loader: str | None, path: Path) -> dict[str, Any]:
    if loader == "json":
        return {"chunksize": JSON_BLOCK, "parse_agent_traces": False}
    if loader == "csv":
        # All cells as text: a response "None", "NA" or "007" is an answer, not a missing value or a number.
        return {"na_filter": False, "features": _text_columns(path)}
    return {}


def _text_columns(path: Path) -> datasets.Features | None:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(
            path, "rt", encoding="utf-8-sig", newline=""
        ) as lines:
            header = next(csv.reader(lines), [])
    except (OSError, EOFError, UnicodeDecodeError, csv.Error):
        return None  # the loader fails on it too, and that failure is explained
    return datasets.Features({name: datasets.Value("string") for name in header}) if header else None


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no log lines of the library: progress and errors are told in our own words."""
    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()
