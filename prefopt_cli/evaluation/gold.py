"""True rewards of sandbox policies, as `prefopt sandbox score` wrote them into their run folders."""

import json
from pathlib import Path
from typing import Any

from prefopt_cli.evaluation.statistics import Estimate
from prefopt_cli.runs.folder import RunFolder

SUMMARY = Path("sandbox") / "summary.json"
PREFIX = "reward/"


def gold_rewards(run: RunFolder | None) -> dict[str, Estimate] | None:
    """Mean gold reward of a run's samples by dimension; None where nothing was scored, or it cannot be read."""
    if run is None:
        return None
    path = run.path / "eval" / SUMMARY
    try:
        policies = json.loads(path.read_text(encoding="utf-8"))["policies"]
        figures = _own(policies, run.path)["figures"]
        return {
            name.removeprefix(PREFIX): Estimate(**value)
            for name, value in figures.items()
            if name.startswith(PREFIX)
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _own(policies: dict[str, Any], run: Path) -> dict[str, Any]:
    """The entry of this run; they are named as the command line named them, from wherever it was.

    Raises:
        KeyError: none is, or several may be.
    """
    found = [each for name, each in policies.items() if Path(name).name == run.absolute().name]
    if len(found) != 1:
        raise KeyError(run.name)
    own: dict[str, Any] = found[0]
    return own
