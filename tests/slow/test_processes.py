"""One process and two: the same losses, the same figures, the same policy."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prefopt_cli.runs import metrics
from tests.cli.conftest import environment
from tests.training.conftest import RECIPE

pytestmark = pytest.mark.slow

PAIRS_PER_STEP = 4


def train(tiny_world: Path, folder: Path, processes: int, *extra: str, name: str = "run") -> Path:
    """Train with a global batch of 4 pairs, in one process or in several over gloo, with a cache for each number."""
    out = folder / f"{name}{processes}"
    recipe = folder / f"recipe{processes}.yaml"
    recipe.write_text(RECIPE.format(world=tiny_world, out=out))
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        if processes > 1
        else [sys.executable]
    )
    command = [*launcher, "-m", "prefopt_cli", "train", str(recipe), "training.eval_on_start=true", *extra]
    command.append(f"training.per_device_train_batch_size={PAIRS_PER_STEP // processes}")
    variables = {**environment(), "PREFOPT_CACHE": str(folder / f"cache{processes}")}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    # Only the first process speaks.
    assert done.stderr.count("Reference policy:") == 1
    assert done.stdout.count("Policy: ") == 1
    return out


def figures(run: Path, kind: str) -> list[dict[str, float]]:
    """The records that hold `kind`, without what measures time or speed."""
    skipped = ("runtime", "per_second")
    return [
        {key: value for key, value in record.items() if not any(word in key for word in skipped)}
        for record in metrics.read(run / "metrics.jsonl")
        if kind in record
    ]


def test_two_processes_equal_one(tiny_world: Path, tmp_path: Path) -> None:
    """23 held-out pairs do not divide by two processes times their batch, so one of them sees some twice."""
    held_out = tmp_path / "heldout.jsonl"
    held_out.write_text("".join((tiny_world / "heldout.jsonl").read_text().splitlines(keepends=True)[:23]))
    extra = (f"dataset.eval.heldout={held_out}", "training.per_device_eval_batch_size=5")
    one, two = (train(tiny_world, tmp_path, processes, *extra) for processes in (1, 2))
    for kind in ("loss", "eval_heldout_loss"):
        ours, theirs = figures(two, kind), figures(one, kind)
        assert len(ours) == len(theirs) > 0
        for left, right in zip(ours, theirs, strict=True):
            assert left == pytest.approx(right, rel=1e-4, abs=1e-5)
    left, right = (load_file(run / "model" / "model.safetensors") for run in (two, one))
    for name, weights in right.items():
        difference = (left[name] - weights).norm() / weights.norm()
        assert difference < 1e-4, name
    computed = [run.joinpath("manifest.json").read_text().count('"computed": 238') for run in (one, two)]
    assert computed == [1, 1], "each scored all responses, two processes a share each"
    again = train(tiny_world, tmp_path, 2, *extra, "training.max_steps=1", name="again")
    assert '"computed": 0' in (again / "manifest.json").read_text()
