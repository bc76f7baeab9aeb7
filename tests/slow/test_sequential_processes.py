"""A stage after others in one process and in two: the same losses, the same policy, every policy scored once."""

from pathlib import Path

import pytest

from prefopt_cli.runs.folder import RunFolder
from tests.slow.test_processes import assert_alike, launch
from tests.training.conftest import (
    Run,
    make_recipe,  # noqa: F401  (a fixture)
    run,  # noqa: F401  (a fixture)
)
from tests.training.test_sequential import GENTLE, KINDS, after

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", ["full", "new adapter"])
def test_two_processes_equal_one(tiny_world: Path, tmp_path: Path, run: Run, kind: str) -> None:  # noqa: F811
    options, per_stage = KINDS[kind]
    first = run("first", GENTLE, *options).run
    second = run("second", GENTLE, *options, *after(first, kind=per_stage)).run
    third = (*options, GENTLE, *after(first, second, lambdas={"first": 0.3, "second": 0.6}, kind=per_stage))
    runs = []
    for processes in (1, 2):
        found, told = launch(tiny_world, tmp_path, processes, *third, name="third")
        runs.append(found)
        for policy in ("base", "first"):  # each process scored its share, once
            line = next(each for each in told.splitlines() if f"under the policy {policy}:" in each)
            assert "240 responses, 240 computed" in line
    weights = "adapter_model.safetensors" if options else "model.safetensors"
    assert_alike(*runs, weights=weights)
    again, told = launch(tiny_world, tmp_path, 2, *third, "training.max_steps=1", name="again")
    assert told.count("all from the cache") == 3
    assert RunFolder(again).read_manifest()["status"] == "finished"
