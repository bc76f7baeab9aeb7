"""metrics.jsonl: one line per log step."""

import json
import math
import os
from pathlib import Path
from typing import Any

from prefopt_cli.runs import atomic


def append(path: Path, record: dict[str, Any]) -> None:
    """Add one line and see it onto the disk. A figure that is not finite becomes null (JSON has no NaN)."""
    clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines; a line torn by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def rewind(path: Path, step: int) -> None:
    """Drop what was logged after `step`, which a resumed run will log again; without a file nothing happens."""
    if not path.is_file():
        return
    kept = [record for record in read(path) if record.get("step", 0) <= step]
    atomic.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
