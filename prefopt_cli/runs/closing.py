"""What a run or a chain says of its end where the process that writes it down could not: it was killed, or cut off."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.runs import atomic
from prefopt_cli.runs.folder import RunFolder

CHAIN_RECORD = "chain.json"
"""What a chain's folder holds in place of a run's manifest."""

MAY_BE_WRONG = ("running", "failed")
"""What a process leaves that was killed, or that only heard of another one's end."""


def close(folder: Path, status: str, message: str | None, *, since: float) -> None:
    """Write down how what trains into a folder ended, as far as it was at it since then.

    Args:
        folder: a run's or a chain's.
        status: failed or interrupted.
        message: what went wrong.
        since: seconds since the epoch; what was written earlier is of an earlier time.
    """
    # What is damaged stays as it is: the user is being told of something worse.
    with suppress(OSError, UserError, ValueError, LookupError, TypeError, AttributeError):
        for run in _runs(folder):
            if _is_wrong(run.manifest, run.read_manifest(), since):
                run.update_manifest(status=status, error=message[:2000] if message else None)
        record = folder / CHAIN_RECORD
        if record.is_file():
            found = json.loads(record.read_text(encoding="utf-8"))
            if _is_wrong(record, found, since):
                stages = [_closed(stage, status) for stage in found["stages"]]
                atomic.write_json(record, {**found, "status": status, "stages": stages})


def _runs(folder: Path) -> Iterator[RunFolder]:
    """The run in a folder, or those of its chain."""
    record = folder / CHAIN_RECORD
    if record.is_file():
        places = [Path(stage["run"]) for stage in json.loads(record.read_text(encoding="utf-8"))["stages"]]
    else:
        places = [folder]
    return (run for run in map(RunFolder, places) if run.is_run())


def _is_wrong(file: Path, said: dict[str, Any], since: float) -> bool:
    return said.get("status") in MAY_BE_WRONG and file.stat().st_mtime > since


def _closed(stage: dict[str, Any], status: str) -> dict[str, Any]:
    return {**stage, "status": status} if stage.get("status") in MAY_BE_WRONG else stage
