"""FSDP2 beside one process, on the CPU: the same losses, the same policy; what goes on from which checkpoint."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefopt_cli.runs import metrics
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.head_optimizer import saved_head
from tests.cli.conftest import environment
from tests.slow.test_processes import (
    ENGINES,
    SAME_TEXTS,
    assert_alike,
    figures,
    soft,
    train,
)
from tests.training.conftest import (
    LORA,
    RECIPE,
    Run,
    make_recipe,  # noqa: F401  (a fixture)
    run,  # noqa: F401  (a fixture)
)
from tests.training.test_sequential import GENTLE, after

pytestmark = pytest.mark.slow

STEPS = ("training.max_steps=10", "training.learning_rate=1e-3")
WITHOUT_DROPOUT = LORA.replace("0.1", "0.0")
GPO = '{"name": "gpo", "loss": "squared", "beta": 0.1}'


def self_supervised(align: str = GPO) -> str:
    settings = {"ssl_coef": 1.0, "pooling": "mean", "head_learning_rate": 3e-3}
    return f"method={json.dumps({'name': 'self_supervised', 'align': json.loads(align), **settings})}"


def beside_one(
    tiny_world: Path, folder: Path, *options: str, weights: str = "model.safetensors", **given: Any
) -> tuple[Path, Path]:
    """One process and two of FSDP2, which must be alike."""
    one = train(tiny_world, folder, 1, *STEPS, *options, **given)
    two = train(tiny_world, folder, 2, *STEPS, *options, engine="fsdp", **given)
    assert RunFolder(two).read_manifest()["engine"] == "fsdp"
    assert_alike(one, two, weights=weights)
    return one, two


@pytest.mark.parametrize(
    "options",
    [
        (f"method={GPO}",),
        (f"method={GPO}", "training.gradient_checkpointing=true"),
        (f"method={GPO}", "training.precompute_ref_log_probs=false"),
        (f"method={GPO}", "training.gradient_accumulation_steps=2"),
        (soft(1, kl_coef=0, mu={"gamma": 0.2}),),
    ],
    ids=["gpo", "checkpointing", "reference in every step", "accumulation", "soft, weighted"],
)
def test_all_weights(tiny_world: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    beside_one(tiny_world, tmp_path, *options, reference='kl_coef": 0' not in options[0])


def test_half_precision_rounds_no_log_probabilities(tiny_world: Path, tmp_path: Path) -> None:
    """accelerate's own policy would bring them to bfloat16, too: the scores before training in the same way."""
    options = (f"method={GPO}", "training.bf16=true", "training.max_steps=2")
    one = train(tiny_world, tmp_path, 1, *options)
    two = train(tiny_world, tmp_path, 2, *options, engine="fsdp")
    ours, theirs = (figures(each, "loss")[0] for each in (two, one))
    assert ours["rewards/chosen"] == ours["rewards/rejected"] == 0
    for side in ("chosen", "rejected"):
        assert ours[f"logps/{side}"] == pytest.approx(theirs[f"logps/{side}"], abs=5e-3)


@pytest.mark.parametrize("precompute", ["true", "false"])
def test_an_adapter(tiny_world: Path, tmp_path: Path, precompute: str) -> None:
    options = (WITHOUT_DROPOUT, f"training.precompute_ref_log_probs={precompute}")
    beside_one(tiny_world, tmp_path, *options, weights="adapter_model.safetensors")


def test_the_degree_classifier(tiny_world: Path, tmp_path: Path) -> None:
    one, two = beside_one(tiny_world, tmp_path, self_supervised())
    left, right = (saved_head(each / "checkpoints" / "checkpoint-10") for each in (one, two))
    for name, tensor in left.items():
        assert tensor.any()
        assert (right[name] - tensor).norm() / tensor.norm() < 1e-4, name


def test_a_stage_after_another(tiny_world: Path, tmp_path: Path, run: Run) -> None:  # noqa: F811
    first = run("first", GENTLE).run
    one, two = beside_one(tiny_world, tmp_path, GENTLE, *after(first), name="second")
    assert figures(one, "loss")[0]["rewards/margins"] == 0
    assert figures(two, "loss")[0]["rewards/margins"] == 0


@pytest.mark.parametrize("adapter", ["adapter=none", WITHOUT_DROPOUT], ids=["full", "lora"])
def test_the_kl_of_given_samples(tiny_world: Path, tmp_path: Path, adapter: str) -> None:
    """Two processes with 3 samples each and one with 6, of the same texts."""
    program = tmp_path / "same_texts.py"
    program.write_text(SAME_TEXTS)
    one, two = (
        train(
            tiny_world, tmp_path, processes, *STEPS, soft(6 // processes), adapter,
            program=(str(program),), engine="fsdp",
        )
        for processes in (1, 2)
    )  # fmt: skip
    assert_alike(one, two, weights="model.safetensors" if "none" in adapter else "adapter_model.safetensors")
    assert figures(two, "kl/ref")[-1]["kl/ref"] > 1e-4


@pytest.mark.parametrize("adapter", ["adapter=none", WITHOUT_DROPOUT], ids=["full", "lora"])
def test_a_sharded_policy_writes_what_a_whole_one_does(
    tiny_world: Path, tmp_path: Path, adapter: str
) -> None:
    """The policy's own samples, drawn three times, and everything that follows from them."""
    options = (soft(4), adapter, *STEPS)
    whole, sharded = (
        train(tiny_world, tmp_path, 2, *options, name=engine, engine=engine) for engine in ("ddp", "fsdp")
    )
    found = [metrics.read(RunFolder(each).samples) for each in (whole, sharded)]
    assert found[0] == found[1]
    assert len({record["step"] for record in found[0]}) == 4
    assert_alike(
        whole, sharded, weights="model.safetensors" if "none" in adapter else "adapter_model.safetensors"
    )


def cut(out: Path, tmp_path: Path, step: int = 3) -> Path:
    """A copy of a finished run, which then ends after a step, as if it had been stopped there."""
    stopped = RunFolder(out)
    straight = Path(shutil.copytree(out, tmp_path / f"straight-{out.name}"))
    for folder in stopped.checkpoints.glob("checkpoint-*"):
        if int(folder.name.removeprefix("checkpoint-")) > step:
            shutil.rmtree(folder)
    shutil.rmtree(stopped.model)
    stopped.update_manifest(status="interrupted")
    return straight


@pytest.mark.parametrize("method", [f"method={GPO}", self_supervised()], ids=["gpo", "self_supervised"])
def test_fsdp_goes_on_bit_for_bit(tiny_world: Path, tmp_path: Path, method: str) -> None:
    out = train(tiny_world, tmp_path, 2, method, engine="fsdp")
    straight = cut(out, tmp_path)
    train(tiny_world, tmp_path, 2, method, "--resume", engine="fsdp")
    assert figures(out, "loss") == figures(straight, "loss")
    ours, theirs = (load_file(each / "model" / "model.safetensors") for each in (out, straight))
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_the_best_checkpoint_of_fsdp_is_exported(tiny_world: Path, tmp_path: Path) -> None:
    """The policy gets worse: by far too high a learning rate."""
    best = (
        "training.load_best_model_at_end=true",
        "training.metric_for_best_model=heldout_loss",
        "training.eval_strategy=steps",
        "training.eval_steps=2",
        "training.save_steps=2",
    )
    options = (*best, f"method={GPO}", "training.learning_rate=1e-3", "training.max_steps=8")
    one, two = (train(tiny_world, tmp_path, n, *options, engine="fsdp") for n in (1, 2))
    assert_alike(one, two)


@pytest.mark.parametrize("direction", [(2, 1), (1, 2)], ids=["2 to 1", "1 to 2"])
def test_checkpoints_of_ddp_serve_another_number_of_processes(
    tiny_world: Path, tmp_path: Path, direction: tuple[int, int]
) -> None:
    before, afterwards = direction
    method = self_supervised()
    out = train(tiny_world, tmp_path, before, method, "training.learning_rate=1e-3", name="first")
    straight = cut(out, tmp_path)
    recipe = tmp_path / "go-on.yaml"
    recipe.write_text(RECIPE.format(world=tiny_world, out=out))
    batch = f"training.per_device_train_batch_size={4 // afterwards}"
    same = ("training.eval_on_start=true", "training.learning_rate=1e-3")
    done = command(recipe, afterwards, method, batch, *same, "--resume", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_alike(straight, out)
    manifest = RunFolder(out).read_manifest()
    assert (manifest["processes"], manifest["rows_per_step"]) == (afterwards, 4)


def command(
    recipe: Path, processes: int, *arguments: str, folder: Path, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """`prefopt train` in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    program = [sys.executable, *(launcher if processes > 1 else []), "-m", "prefopt_cli", "train"]
    own = {**environment(), "PREFOPT_CACHE": str(folder / "cache"), **variables}
    return subprocess.run(
        [*program, str(recipe), *arguments], capture_output=True, text=True, env=own, timeout=400
    )


def test_refusals(tiny_world: Path, tmp_path: Path) -> None:
    out = train(tiny_world, tmp_path, 2, f"method={GPO}", engine="fsdp")
    cut(out, tmp_path)
    recipe = tmp_path / "run-recipe2.yaml"
    given = (f"method={GPO}", "training.eval_on_start=true", "training.per_device_train_batch_size=2")
    ddp = command(recipe, 2, *given, "--resume", folder=tmp_path)
    assert ddp.returncode == 1, "torchrun's own"
    assert "began with launch.engine: fsdp, whose checkpoints ddp cannot read" in ddp.stderr
    old = command(
        recipe, 2, *given, "--overwrite", folder=tmp_path, ACCELERATE_USE_FSDP="true", FSDP_VERSION="1"
    )
    assert old.returncode == 1
    assert "FSDP 1" in old.stderr
    alone = command(recipe, 1, *given, "--overwrite", folder=tmp_path, **ENGINES["fsdp"])
    assert alone.returncode == 2
    assert "shards a model over several processes, and there is one" in alone.stderr
    assert os.path.isdir(out / "checkpoints"), "nothing was deleted"
