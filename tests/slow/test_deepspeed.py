"""DeepSpeed beside one process, on the CPU, where the package is installed: the same losses, the same policy."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefopt_cli.runs import metrics
from prefopt_cli.runs.folder import RunFolder
from tests.slow.test_engines import GPO, STEPS, WITHOUT_DROPOUT, cut, self_supervised
from tests.slow.test_processes import assert_alike, figures, soft, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        (f"method={GPO}",),
        (f"method={GPO}", "training.gradient_accumulation_steps=2"),
        (f"method={GPO}", "training.precompute_ref_log_probs=false"),
        (f"method={GPO}", WITHOUT_DROPOUT),
        (self_supervised(),),
    ],
    ids=["gpo", "accumulation", "reference in every step", "lora", "self_supervised"],
)
def test_two_processes_equal_one(
    tiny_world: Path, tmp_path: Path, stage: int, options: tuple[str, ...]
) -> None:
    one = train(tiny_world, tmp_path, 1, *STEPS, *options)
    two = train(tiny_world, tmp_path, 2, *STEPS, *options, engine=f"zero{stage}")
    assert RunFolder(two).read_manifest()["engine"] == "deepspeed"
    weights = "adapter_model.safetensors" if WITHOUT_DROPOUT in options else "model.safetensors"
    assert_alike(one, two, weights=weights)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_policy_writes_what_a_whole_one_does(tiny_world: Path, tmp_path: Path, stage: int) -> None:
    options = (soft(4), *STEPS)
    whole, sharded = (
        train(tiny_world, tmp_path, 2, *options, name=engine, engine=engine)
        for engine in ("ddp", f"zero{stage}")
    )
    found = [metrics.read(RunFolder(each).samples) for each in (whole, sharded)]
    assert found[0] == found[1]
    assert_alike(whole, sharded)


@pytest.mark.parametrize("stage", [2, 3])
def test_it_goes_on(tiny_world: Path, tmp_path: Path, stage: int) -> None:
    out = train(tiny_world, tmp_path, 2, f"method={GPO}", engine=f"zero{stage}")
    straight = cut(out, tmp_path)
    train(tiny_world, tmp_path, 2, f"method={GPO}", "--resume", engine=f"zero{stage}")
    assert figures(out, "loss") == figures(straight, "loss")
    ours, theirs = (load_file(each / "model" / "model.safetensors") for each in (out, straight))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
