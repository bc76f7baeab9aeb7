"""`prefopt eval` and `compare` in one process and in two: the same figures, every score computed once."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import environment
from tests.tiny import pairs, write_pairs
from tests.training.conftest import (
    Run,
    make_recipe,  # noqa: F401  (a fixture)
    run,  # noqa: F401  (a fixture)
)

pytestmark = pytest.mark.slow

PAIRS = 23
"""They do not divide by two processes."""


def launch(folder: Path, processes: int, *arguments: str) -> tuple[dict[str, Any], str]:
    """A command's summary and what was written to standard error; a cache for each number of processes."""
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        if processes > 1
        else [sys.executable]
    )
    variables = {**environment(), "PREFOPT_CACHE": str(folder / f"cache{processes}")}
    command = [*launcher, "-m", "prefopt_cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)  # one object: only the first process speaks
    return found, done.stderr


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Rows of many lengths, in several batches."""
    rows = [{**row, "chosen": row["chosen"] * (1 + n % 3)} for n, row in enumerate(pairs(PAIRS, seed=81))]
    write_pairs(tmp_path / "odd.jsonl", rows)
    return str(tmp_path / "odd.jsonl")


FEW = "training.precompute_ref_batch_size=4"
"""Rows of a scoring batch, so that there are more batches than processes."""


def test_an_evaluation(run: Run, data: str, tmp_path: Path) -> None:  # noqa: F811
    path = str(run("policy").run.path)
    found = {}
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        asked = ("eval", path, "--data", data, "--output", str(out), FEW)
        found[processes], told = launch(tmp_path, processes, *asked)
        assert found[processes]["scores"] == {"computed": 4 * PAIRS, "from_cache": 0}
        assert told.count("Log-probabilities under the policy") == 1
        assert json.loads((out / "summary.json").read_text()) == found[processes]
        again, _ = launch(tmp_path, processes, *asked)
        assert again["scores"] == {"computed": 0, "from_cache": 4 * PAIRS}
        assert again["sets"] == found[processes]["sets"]
    one, two = (flat(found[processes]["sets"]) for processes in (1, 2))
    assert two == pytest.approx(one, abs=1e-4)
    assert [each["code"] for each in found[2]["findings"]] == [each["code"] for each in found[1]["findings"]]


def test_a_comparison(run: Run, data: str, tmp_path: Path) -> None:  # noqa: F811
    """With KLs, whose samples are shared out, too."""
    names = [str(run(name, f"training.seed={seed}").run.path) for name, seed in (("a", 1), ("b", 2))]
    found = []
    for processes in (1, 2):
        out = str(tmp_path / f"out{processes}")
        asked = ("compare", *names, "--data", data, "--kl-prompts", "20", "--output", out, FEW)
        summary, told = launch(tmp_path, processes, *asked)
        assert told.count("Log-probabilities under the policy") == 2
        assert told.count("Log-probabilities under the reference") == 1
        found.append(flat(summary["policies"]))
    assert found[1] == pytest.approx(found[0], abs=1e-3)
    assert any("kl" in name for name in found[0])


def flat(value: Any, name: str = "") -> dict[str, float]:
    """All numbers by their places."""
    if isinstance(value, dict):
        return {
            key: each for part, inner in value.items() for key, each in flat(inner, f"{name}/{part}").items()
        }
    if isinstance(value, list):
        return {
            key: each for n, inner in enumerate(value) for key, each in flat(inner, f"{name}/{n}").items()
        }
    return {name: float(value)} if isinstance(value, int | float) else {}
