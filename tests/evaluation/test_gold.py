"""Gold rewards that `prefopt sandbox score` has left in run folders."""

import json
from pathlib import Path

import pytest

from prefopt_cli.evaluation.gold import gold_rewards
from prefopt_cli.runs.folder import RunFolder

FIGURES = {
    "reward/helpful": {"value": 0.5, "low": 0.4, "high": 0.6},
    "reward/brief": {"value": -1.0, "low": -1.5, "high": -0.5},
    "win_rate": {"value": 0.7, "low": 0.6, "high": 0.8},
}


def write(run: Path, **policies: object) -> RunFolder:
    folder = run / "eval" / "sandbox"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"policies": policies}))
    return RunFolder(run)


@pytest.mark.parametrize("name", ["one", "runs/one", "/elsewhere/runs/one", "../runs/one/"])
def test_rewards_by_dimension(tmp_path: Path, name: str) -> None:
    other = {"figures": {"reward/helpful": {"value": 9.0, "low": 9.0, "high": 9.0}}}
    run = write(tmp_path / "one", **{name: {"figures": FIGURES}, "runs/two": other})
    assert gold_rewards(run) == {"helpful": (0.5, 0.4, 0.6), "brief": (-1.0, -1.5, -0.5)}


def test_nothing_to_read(tmp_path: Path) -> None:
    assert gold_rewards(None) is None
    assert gold_rewards(RunFolder(tmp_path / "none")) is None
    # Of a run that was renamed since, and of two that may be meant.
    assert gold_rewards(write(tmp_path / "renamed", one={"figures": FIGURES})) is None
    two = {"a/twice": {"figures": FIGURES}, "b/twice": {"figures": FIGURES}}
    assert gold_rewards(write(tmp_path / "twice", **two)) is None
    damaged = write(tmp_path / "damaged")
    (damaged.evaluation("sandbox") / "summary.json").write_text("{")
    assert gold_rewards(damaged) is None
    (damaged.evaluation("sandbox") / "summary.json").write_text("[]")
    assert gold_rewards(damaged) is None


def test_what_sandbox_score_writes_is_what_is_read(tmp_path: Path) -> None:
    from prefopt_cli.sandbox import results

    assert results.EVALUATION == "sandbox"
    assert results.SUMMARY == "summary.json"
