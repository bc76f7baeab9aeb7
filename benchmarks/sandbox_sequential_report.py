"""The tables and the picture of `benchmarks.sandbox_sequential`."""
from pathlib import Path
from typing import Any


def report(rows: list[dict[str, Any]], versions: dict[str, str], settings: Any) -> str:
    return ""
def draw(rows: list[dict[str, Any]], path: Path) -> None:
    return None
