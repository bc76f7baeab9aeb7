"""Tokenised sets kept on disk, so that the next run or check on the same data need not tokenise it again.

A set is addressed by all that decides its tokens (see ``token_key``), so a file never has to be declared stale.
What cannot be kept or found again is tokenised again; nothing about the cache stops a run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from prefopt_cli.data import token_file
from prefopt_cli.data.encoding import BATCH, EncodedSet, Encoding, encode_set
from prefopt_cli.data.examples import Comparison, Progress
from prefopt_cli.data.token_key import set_key, tokenizer_identity
from prefopt_cli.runs import cache

FEWEST = BATCH + 1
"""Rows of the smallest set that is kept: one call of the tokenizer takes about as long as looking for the file."""


def _to_standard_error(message: str) -> None:
    print(message, file=sys.stderr)


class TokenCache:
    """The sets on disk that one tokenizer has made. Several processes may use them at once.

    Where the folder cannot be used, one message says so, and every set is tokenised from then on.
    """

    def __init__(self, tokenizer: Any, report: Callable[[str], None] = _to_standard_error) -> None:
        """Nothing is read or made before the first set.

        Args:
            tokenizer: not to be changed while this is in use.
            report: gets one line for the user where something is wrong with the cache.
        """
        self._tokenizer = tokenizer
        self._report = report
        self._folder = cache.cache_folder() / "tokens"
        self._is_usable = True

    def encoded(
        self, name: str, rows: Sequence[Comparison], encoding: Encoding, progress: Progress | None
    ) -> EncodedSet:
        """What ``encode_set`` makes of the rows, from the disk if it is there; ``progress`` hears of work only."""
        if not self._is_usable or len(rows) < FEWEST or self._identity is None:
            return encode_set(name, rows, encoding, progress)
        key = set_key(rows, encoding, self._identity)
        path = self._folder / f"{key}.arrow"
        kept = self._read(path, key)
        if kept is not None:
            return kept
        made = encode_set(name, rows, encoding, progress)
        if made.fitting and self._is_usable:
            self._write(path, key, made)
        return made

    @cached_property
    def _identity(self) -> str | None:
        return tokenizer_identity(self._tokenizer)

    def _read(self, path: Path, key: str) -> EncodedSet | None:
        try:
            kept = token_file.read(path, key)
        except FileNotFoundError:
            return None
        except token_file.DamagedTokens:
            self._report(f"{path} in the cache of tokenised data was damaged; its rows are tokenised anew.")
            return None
        except OSError as error:
            self._give_up(error)
            return None
        with suppress(OSError):  # a cache that cannot be written is good for reading
            os.utime(path)  # `prefopt cache prune` goes by it
        return kept

    def _write(self, path: Path, key: str, made: EncodedSet) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            token_file.write(path, key, made)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._is_usable = False
        self._report(
            f"Tokenised data cannot be kept in {self._folder}: {error.strerror or error}. See that there is room and "
            f"that it can be written, or set {cache.VARIABLE} to another folder. This run goes on without it."
        )
