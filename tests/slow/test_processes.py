"""One process and two: the same losses, the same figures, the same policy."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prefopt_cli.recipe import load_recipe
from prefopt_cli.runs import metrics
from prefopt_cli.runs.folder import CHECKPOINT_MARK, RunFolder
from prefopt_cli.training.preparation import prepare
from prefopt_cli.training.reporting import Silent
from tests.cli.conftest import environment
from tests.tiny import write_pairs
from tests.training.conftest import LORA, RECIPE

pytestmark = pytest.mark.slow

PAIRS_PER_STEP = 4

ENGINES = {
    "ddp": {},
    "fsdp": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    },
    **{
        f"zero{stage}": {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
            "DS_ACCELERATOR": "cpu",
        }
        for stage in (1, 2, 3)
    },
}
"""What a launcher's environment says of each."""

SAME_TEXTS = """\
import sys

from prefopt_cli.cli import main
from prefopt_cli.training import samples


def backwards(model, prompts, *, stop_ids, **_):
    return [[*reversed(prompt[-6:]), stop_ids[0]] for prompt in prompts]


samples.sample_responses = backwards
main.main()
"""
"""The command line with a policy that always writes the end of the prompt backwards, whatever the seed."""


def launch(
    tiny_world: Path,
    folder: Path,
    processes: int,
    *extra: str,
    name: str = "run",
    program: tuple[str, ...] = ("-m", "prefopt_cli"),
    reference: bool = True,
    engine: str = "ddp",
) -> tuple[Path, str]:
    """Train with a global batch of 4 rows, in one process or in several over gloo, with a cache for each number.

    Returns:
        The run and what was written to standard error.
    """
    out = folder / f"{name}{processes}"
    recipe = folder / f"{name}-recipe{processes}.yaml"
    recipe.write_text(RECIPE.format(world=tiny_world, out=out))
    launcher = (
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        if processes > 1
        else [sys.executable]
    )
    command = [*launcher, *program, "train", str(recipe), "training.eval_on_start=true", *extra]
    command.append(f"training.per_device_train_batch_size={PAIRS_PER_STEP // processes}")
    variables = {**environment(), "PREFOPT_CACHE": str(folder / f"cache{processes}")}
    if processes > 1:
        variables |= ENGINES[engine]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    # Only the first process speaks.
    assert done.stderr.count("Reference policy:") == reference
    assert done.stdout.count("Policy: ") == 1
    return out, done.stderr


def train(tiny_world: Path, folder: Path, processes: int, *extra: str, **options: Any) -> Path:
    """The run of `launch`."""
    return launch(tiny_world, folder, processes, *extra, **options)[0]


def figures(run: Path, kind: str) -> list[dict[str, float]]:
    """The records that hold `kind`, without what measures time or speed."""
    skipped = ("runtime", "per_second")
    return [
        {key: value for key, value in record.items() if not any(word in key for word in skipped)}
        for record in metrics.read(run / "metrics.jsonl")
        if kind in record
    ]


def assert_alike(one: Path, two: Path, *, weights: str = "model.safetensors") -> None:
    """Two runs with the same figures and the same policy, up to rounding."""
    for kind in ("loss", "eval_heldout_loss"):
        ours, theirs = figures(two, kind), figures(one, kind)
        assert len(ours) == len(theirs) > 0
        for left, right in zip(ours, theirs, strict=True):
            assert left == pytest.approx(right, rel=1e-4, abs=1e-5)
    left, right = (load_file(run / "model" / weights) for run in (two, one))
    for name, tensor in right.items():
        difference = (left[name] - tensor).norm() / tensor.norm()
        assert difference < 1e-4, name


def test_two_processes_equal_one(tiny_world: Path, tmp_path: Path) -> None:
    """23 held-out pairs do not divide by two processes times their batch, so one of them sees some twice."""
    held_out = tmp_path / "heldout.jsonl"
    held_out.write_text("".join((tiny_world / "heldout.jsonl").read_text().splitlines(keepends=True)[:23]))
    extra = (f"dataset.eval.heldout={held_out}", "training.per_device_eval_batch_size=5")
    one, two = (train(tiny_world, tmp_path, processes, *extra) for processes in (1, 2))
    assert_alike(one, two)
    computed = [run.joinpath("manifest.json").read_text().count('"computed": 238') for run in (one, two)]
    assert computed == [1, 1], "each scored all responses, two processes a share each"
    again = train(tiny_world, tmp_path, 2, *extra, "training.max_steps=1", name="again")
    assert '"computed": 0' in (again / "manifest.json").read_text()


@pytest.mark.parametrize(
    "method",
    [
        "method={name: gpo, loss: logistic, beta: 0.1}",
        "method={name: soft, alpha: 0.5, kl_coef: 0, mu: {gamma: 0.2}}",
        "method={name: self_supervised, head_learning_rate: 3e-3, align: {name: gpo, loss: squared, beta: 0.1}}",
    ],
    ids=["gpo", "soft", "self_supervised"],
)
@pytest.mark.parametrize("rows", [17, 19], ids=["one row", "three rows"])
def test_rows_that_fill_up_an_epochs_last_batch_count_for_nothing(
    tiny_world: Path, tmp_path: Path, method: str, rows: int
) -> None:
    """17 or 19 rows in batches of 4: the fifth step of each of two epochs has 1 or 3, whoever has them."""
    data = tmp_path / "train.jsonl"
    data.write_text("".join((tiny_world / "pairs.jsonl").read_text().splitlines(keepends=True)[:rows]))
    options = (f"dataset.train={data}", "training.max_steps=10", "training.learning_rate=1e-3", method)
    reference = "soft" not in method
    one, two = (train(tiny_world, tmp_path, n, *options, reference=reference) for n in (1, 2))
    for run in (one, two):  # such rows do go through the policy
        for record in (records := metrics.read(run / "metrics.jsonl")):
            record.pop("num_tokens", None)
        run.joinpath("metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    assert_alike(one, two)


SLOW_FIRST = """\
import os
import time

from prefopt_cli.cli import main
from prefopt_cli.scoring import frozen

plain = frozen._Scorer.logps


def slowly(self, batch):
    time.sleep(0.5 if os.environ["RANK"] == os.environ["SLOW"] else 0)
    return plain(self, batch)


frozen._Scorer.logps = slowly
main.main()
"""
"""The command line with a process that scores so slowly that the other one waits for it."""


@pytest.mark.parametrize("slow", [0, 1])
def test_a_signal_while_one_process_scores_and_the_other_waits(
    tiny_world: Path, tmp_path: Path, slow: int
) -> None:
    recipe, program = tmp_path / "recipe.yaml", tmp_path / "program.py"
    recipe.write_text(RECIPE.format(world=tiny_world, out=tmp_path / "run"))
    program.write_text(SLOW_FIRST)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(program), "train", str(recipe), "training.precompute_ref_batch_size=1"]
    variables = {**environment(), "PREFOPT_CACHE": str(tmp_path / "cache"), "SLOW": str(slow)}
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=variables)
    try:
        while not (tmp_path / "run" / "manifest.json").exists():
            assert running.poll() is None
            time.sleep(0.1)
        time.sleep(8)
        for worker in psutil.Process(running.pid).children():
            worker.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=60)
    finally:
        running.kill()
    assert "Stopped while scoring" in told
    assert RunFolder(tmp_path / "run").read_manifest()["status"] == "interrupted"


# --- the policy's own samples


def soft(prompts: int, *, kl_coef: float = 1.0, **settings: Any) -> str:
    """The method with so many samples in each process, of which there are draws before steps 1 and 4."""
    regularizer = {"sample_every": 3, "num_prompts": prompts, "max_new_tokens": 12}
    method = {"name": "soft", "alpha": 0.5, "kl_coef": kl_coef, "regularizer": regularizer, **settings}
    return f"method={json.dumps(method)}"


def lists(path: Path, count: int) -> Path:
    """Ranked lists of two to four responses, with ties."""
    rankings = [[0, 1, 2], [1, 0], [0, 0, 1, 2], [2, 1, 1, 0], [0, 1, 1], [3, 1, 0]]
    rows = [
        {
            "prompt": f"Human: Question {number}?\nAssistant:",
            "responses": [f" answer {n} " + "word " * (n + number % 3) for n in range(len(ranking))],
            "ranking": ranking,
        }
        for number, ranking in enumerate((rankings * count)[:count])
    ]
    write_pairs(path, rows)
    return path


def test_weights_of_pairs_are_relative_to_all_processes(tiny_world: Path, tmp_path: Path) -> None:
    method = soft(1, kl_coef=0, mu={"gamma": 0.2})
    one, two = (train(tiny_world, tmp_path, processes, method, reference=False) for processes in (1, 2))
    assert_alike(one, two)


def test_ranked_lists(tiny_world: Path, tmp_path: Path) -> None:
    """11 held-out lists do not divide by two processes times their batch: some are seen twice, and count once."""
    data = (
        f"dataset.train={lists(tmp_path / 'train.jsonl', 24)}",
        f"dataset.eval.heldout={lists(tmp_path / 'heldout.jsonl', 11)}",
    )
    one, two = (
        train(tiny_world, tmp_path, processes, soft(1, kl_coef=0), *data, reference=False)
        for processes in (1, 2)
    )
    assert_alike(one, two)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("adapter", ["adapter=none", LORA.replace("0.1", "0.0")], ids=["full", "lora"])
def test_the_kl_is_the_mean_over_the_samples_of_all_processes(
    tiny_world: Path, tmp_path: Path, adapter: str, checkpointing: str
) -> None:
    """Two processes with 3 samples each and one with 6, of the same texts."""
    program = tmp_path / "same_texts.py"
    program.write_text(SAME_TEXTS)
    options = (adapter, f"training.gradient_checkpointing={checkpointing}")
    (one, _), (two, together) = (
        launch(tiny_world, tmp_path, processes, soft(6 // processes), *options, program=(str(program),))
        for processes in (1, 2)
    )
    assert_alike(one, two, weights="model.safetensors" if "none" in adapter else "adapter_model.safetensors")
    assert figures(two, "kl/ref")[-1]["kl/ref"] > 1e-3
    # Torch has nothing to remark on two forward passes before one backward pass, but the library's default.
    assert together.count("Warning") == together.count("find_unused_parameters=True was specified")


def kl(folder: Path, reference: Path, prompt: list[int], response: list[int]) -> float:
    """KL(policy || reference) summed over a response, in nats, by a plain forward pass of both."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        policy, other = (
            AutoModelForCausalLM.from_pretrained(each)
            .eval()(ids)
            .logits[0, len(prompt) - 1 : -1]
            .log_softmax(-1)
            for each in (folder, reference)
        )
    return float((policy.exp() * (policy - other)).sum())


def test_every_process_draws_its_own_samples_and_goes_on_bit_for_bit(
    tiny_world: Path, tmp_path: Path
) -> None:
    options = (soft(5), "training.save_steps=2", "training.max_steps=6")
    out = train(tiny_world, tmp_path, 2, *options)
    run = RunFolder(out)
    straight = Path(shutil.copytree(out, tmp_path / "straight"))

    # The samples of checkpoint 4 were drawn before step 4.
    checkpoint = run.checkpoints / "checkpoint-4"
    samples = json.loads((checkpoint / CHECKPOINT_MARK).read_text())["samples"]
    assert samples["drawn_at"] == 3
    first, second = samples["by_process"]
    assert not {row for row, _ in first} & {row for row, _ in second}, "other prompts"
    assert [tokens for _, tokens in first] != [tokens for _, tokens in second]
    prompts = prepare(load_recipe(out / "recipe.yaml"), Silent()).sampling.rows
    divergences = [
        kl(checkpoint, tiny_world / "model", prompts[row]["prompt_ids"], tokens)
        for row, tokens in (*first, *second)
    ]
    (fifth,) = (record for record in figures(out, "kl/ref") if record["step"] == 5)
    assert fifth["kl/ref"] == pytest.approx(sum(divergences) / 10, rel=1e-3)

    shutil.rmtree(run.checkpoints / "checkpoint-6")
    shutil.rmtree(run.model)
    run.update_manifest(status="running")
    train(tiny_world, tmp_path, 2, *options, "--resume")
    assert metrics.read(run.samples) == metrics.read(RunFolder(straight).samples)
    assert figures(out, "loss") == figures(straight, "loss")
    ours, theirs = (load_file(each / "model" / "model.safetensors") for each in (out, straight))
    for name, tensor in theirs.items():
        assert ours[name].equal(tensor), name
