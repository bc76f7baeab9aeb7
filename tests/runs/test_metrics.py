"""metrics.jsonl: append, read, rewind."""

import json
import math
from pathlib import Path

from prefopt_cli.runs import metrics


def test_lines_are_read_as_they_were_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert metrics.read(path) == []
    metrics.append(path, {"step": 1, "loss": 0.1})
    metrics.append(path, {"step": 2, "loss": 1e-12, "note": "a\u2028b"})
    assert metrics.read(path) == [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 1e-12, "note": "a\u2028b"}]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    """NaN is no JSON: other readers would choke on it."""
    path = tmp_path / "metrics.jsonl"
    metrics.append(path, {"step": 1, "loss": math.nan, "grad_norm": math.inf, "margin": -math.inf})
    assert "NaN" not in path.read_text()
    assert json.loads(path.read_text()) == {"step": 1, "loss": None, "grad_norm": None, "margin": None}


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics.append(path, {"step": 1})
    metrics.append(path, {"step": 2})
    path.write_text(path.read_text()[:-5])
    assert metrics.read(path) == [{"step": 1}]


def test_rewinding_drops_later_steps_and_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 6):
        metrics.append(path, {"step": step, "loss": None})
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    metrics.rewind(path, 3)
    metrics.append(path, {"step": 4})
    assert [record["step"] for record in metrics.read(path)] == [1, 2, 3, 4]
    assert len(path.read_text().splitlines()) == 4
    metrics.rewind(path, -1)
    assert path.read_text() == ""


def test_rewinding_what_is_not_there(tmp_path: Path) -> None:
    metrics.rewind(tmp_path / "metrics.jsonl", 3)
    assert metrics.read(tmp_path / "metrics.jsonl") == []
