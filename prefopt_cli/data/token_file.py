"""A tokenised set as a file: an Arrow stream, and behind it a checksum of its key and all its bytes."""

from __future__ import annotations

import hashlib
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from prefopt_cli.data.encoding import Dropped, EncodedSet, Fitting
from prefopt_cli.data.tables import TokenRow, columns_of
from prefopt_cli.errors import PrefoptError
from prefopt_cli.runs import atomic

CHECKSUM = 16
"""Bytes at the end, which readers of Arrow streams pass over."""


class DamagedTokens(PrefoptError):
    """The file is not as it was written."""


def write(path: Path, key: str, encoded: EncodedSet) -> None:
    """Keep a set of at least one row.

    Raises:
        OSError: the disk is full or the folder cannot be written; nothing is left of the file.
    """
    batch = _batch(encoded)
    with atomic.file(path) as opened:
        hashed = _Hashed(opened, key)
        with pa.ipc.new_stream(hashed, batch.schema) as stream:
            stream.write_batch(batch)
        opened.write(hashed.digest.digest())


def read(path: Path, key: str) -> EncodedSet:
    """The set as it was written; its arrays are read-only slices of one piece of memory.

    The file is read, not mapped: a map would end the process where a disk or another machine takes the file away.

    Raises:
        DamagedTokens: it has been changed since, or was written under another key.
        OSError: it is not there or cannot be read.
    """
    content = path.read_bytes()
    whole = memoryview(content)
    digest = _digest(key)
    digest.update(whole[:-CHECKSUM])
    if digest.digest() != whole[-CHECKSUM:]:
        raise DamagedTokens(f"{path} is damaged")
    return _encoded(pa.ipc.open_stream(pa.py_buffer(content)).read_next_batch())


class _Hashed(io.RawIOBase):
    """Writes on to a file, and takes the digest of what it writes."""

    def __init__(self, opened: BinaryIO, key: str) -> None:
        self._opened = opened
        self.digest = _digest(key)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self._opened.write(data)


def _digest(key: str) -> hashlib.blake2b:
    return hashlib.blake2b(key.encode(), digest_size=CHECKSUM)


def _batch(encoded: EncodedSet) -> pa.RecordBatch:
    columns = columns_of([one.tokens for one in encoded.fitting.values()])
    arrays = {
        "row_id": pa.array(columns.row_ids, pa.large_string()),
        "prompt": columns.prompts.as_arrow(),
        "responses": columns.ranks.as_arrow(columns.responses.as_arrow()),
        "ranks": columns.ranks.as_arrow(),
        "notes": pa.array([one.notes for one in encoded.fitting.values()], pa.list_(pa.string())),
    }
    if columns.levels is not None and columns.degraded is not None:
        arrays["levels"] = columns.ranks.as_arrow(columns.levels.as_arrow())
        arrays["degraded"] = columns.ranks.as_arrow(columns.levels.as_arrow(columns.degraded.as_arrow()))
    return pa.record_batch(arrays, metadata={"dropped": json.dumps(encoded.dropped)})


def _encoded(batch: pa.RecordBatch) -> EncodedSet:
    names = batch["row_id"].to_pylist()
    degrees: list[Any] = [()] * len(names)
    if "levels" in batch.schema.names:
        degrees = [
            tuple(tuple(zip(levels.tolist(), ids, strict=True)) for levels, ids in zip(*row, strict=True))
            for row in zip(_lists(batch["levels"]), _lists(batch["degraded"]), strict=True)
        ]
    rows = zip(
        names, _lists(batch["prompt"]), map(tuple, _lists(batch["responses"])),
        (tuple(ranks.tolist()) for ranks in _lists(batch["ranks"])), degrees, strict=True,
    )  # fmt: skip
    notes = map(tuple, batch["notes"].to_pylist())
    fitting = {row[0]: Fitting(TokenRow(*row), said) for row, said in zip(rows, notes, strict=True)}
    dropped = [Dropped(*one) for one in json.loads(batch.schema.metadata[b"dropped"])]
    return EncodedSet(fitting, dropped)


def _lists(array: Any) -> list[Any]:
    """Lists of lists of numbers as such, the innermost as arrays in the memory of ``array``."""
    inner = array.values
    items = _lists(inner) if pa.types.is_large_list(inner.type) else inner.to_numpy()
    return [items[start:end] for start, end in pairwise(array.offsets.tolist())]
