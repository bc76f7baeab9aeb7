"""Verdicts of judges that are asked over a network, kept on disk: what was paid for once is not asked again."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefopt_cli.evaluation.judges.judging import Verdict
from prefopt_cli.runs.cache import cache_folder


def verdict_key(**question: Any) -> str:
    """sha256 of all that decides a verdict."""
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


class VerdictCache:
    """One line for every verdict, added as soon as it is there. Use it from one thread.

    What cannot be read or kept is asked again; nothing about the cache stops a judging.
    """

    def __init__(self, report: Callable[[str], None], file: Path | None = None) -> None:
        """Read what there is.

        Args:
            report: gets one line for the user where something is wrong with the file.
            file: without it, the user's own.
        """
        self._file = file or cache_folder() / "judge" / "verdicts.jsonl"
        self._report = report
        self._is_usable = True
        self._known = self._read()

    def get(self, key: str) -> Verdict | None:
        """The verdict, if it is known."""
        return self._known.get(key)

    def put(self, key: str, verdict: Verdict) -> None:
        """Keep a verdict and see it onto the disk."""
        self._known[key] = verdict
        if not self._is_usable:
            return
        line = json.dumps({"key": key, "verdict": verdict.value}) + "\n"
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab+") as opened:
                opened.write((self._mend(opened) + line).encode())
                opened.flush()
                os.fsync(opened.fileno())
        except OSError as error:
            self._give_up(error)

    @staticmethod
    def _mend(opened: Any) -> str:
        """What ends a line that a crash has torn, so that the next one does not become part of it."""
        if not opened.seek(0, os.SEEK_END):
            return ""
        opened.seek(-1, os.SEEK_END)
        return "" if opened.read(1) == b"\n" else "\n"

    def _read(self) -> dict[str, Verdict]:
        try:
            lines = self._file.read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._give_up(error)
            return {}
        known = {}
        for line in lines:
            try:
                record = json.loads(line)
                known[str(record["key"])] = Verdict(record["verdict"])
            except (ValueError, KeyError, TypeError):  # torn by a crash
                continue
        return known

    def _give_up(self, error: OSError) -> None:
        self._is_usable = False
        self._report(
            f"Verdicts cannot be kept in {self._file} ({error.strerror or error}); a repeated judging asks again."
        )
