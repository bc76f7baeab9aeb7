"""Degrees told in one process and in two: the same losses, the same policy, the same head."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from prefopt_cli.runs import metrics
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.head_optimizer import saved_head
from tests.slow.test_processes import assert_alike, figures, train
from tests.tiny import write_pairs
from tests.training.conftest import LORA
from tests.training.test_self_supervised import lists  # noqa: F401 - a fixture

pytestmark = pytest.mark.slow

WITHOUT_DROPOUT = LORA.replace("0.1", "0.0")


def beside(align: str, **settings: Any) -> str:
    given = {"ssl_coef": 1.0, "pooling": "mean", "head_learning_rate": 3e-3, **settings}
    return f"method={json.dumps({'name': 'self_supervised', 'align': json.loads(align), **given})}"


GPO = '{"name": "gpo", "beta": 0.1}'
SOFT = '{"name": "soft", "alpha": 0.5, "kl_coef": 0}'


def head(run: Path) -> Any:
    return saved_head(run / "checkpoints" / "checkpoint-6")


def assert_alike_with_heads(one: Path, two: Path, *, weights: str = "model.safetensors") -> None:
    assert_alike(one, two, weights=weights)
    left, right = head(one), head(two)
    for name, tensor in left.items():
        assert tensor.any()
        assert (right[name] - tensor).norm() / tensor.norm() < 1e-4, name
    evaluated = figures(two, "eval_heldout_ssl/loss")
    assert len(evaluated) > 1
    for record in evaluated:
        assert {f"eval_heldout_ssl/accuracy_level_{level}" for level in range(4)} <= record.keys()


@pytest.fixture
def uneven(tiny_world: Path, tmp_path: Path) -> tuple[str, ...]:
    """24 pairs and 23 held-out ones, of which some have no degrees and some have them on one side only.

    Training takes whole batches only: two processes fill up the last one of an epoch with the first rows again,
    whatever the method.
    """
    options = []
    for name, file, count in (("train", "pairs.jsonl", 24), ("eval.heldout", "heldout.jsonl", 23)):
        lines = (tiny_world / file).read_text().splitlines()[:count]
        rows = [json.loads(line) for line in lines]
        for row in rows[::3]:
            row["rejected"] = " It is."
        for row in rows[::6]:
            row["chosen"] = " Of it."
        path = tmp_path / f"{name}.jsonl"
        write_pairs(path, rows)
        options.append(f"dataset.{name}={path}")
    return (*options, "training.per_device_eval_batch_size=5")


@pytest.mark.parametrize("adapter", ["adapter=none", WITHOUT_DROPOUT], ids=["full", "lora"])
def test_two_processes_equal_one(
    tiny_world: Path, tmp_path: Path, uneven: tuple[str, ...], adapter: str
) -> None:
    """Six steps of four pairs; evaluations at the start and the end, by all levels of rows that fill no batch."""
    one, two = (train(tiny_world, tmp_path, processes, beside(GPO), *uneven, adapter) for processes in (1, 2))
    assert_alike_with_heads(
        one, two, weights="model.safetensors" if "none" in adapter else "adapter_model.safetensors"
    )


def test_lists_beside_soft(tiny_world: Path, tmp_path: Path, lists: Path) -> None:  # noqa: F811
    """11 held-out lists do not divide by two processes times their batch."""
    held_out = tmp_path / "heldout.jsonl"
    held_out.write_text("".join(lists.read_text().splitlines(keepends=True)[:11]))
    data = (f"dataset.train={lists}", f"dataset.eval.heldout={held_out}")
    one, two = (
        train(tiny_world, tmp_path, processes, beside(SOFT, levels_per_step=2), *data, reference=False)
        for processes in (1, 2)
    )
    assert_alike_with_heads(one, two)


def test_accumulation_and_checkpointing(tiny_world: Path, tmp_path: Path) -> None:
    options = ("training.gradient_accumulation_steps=2", "training.gradient_checkpointing=true")
    one, two = (train(tiny_world, tmp_path, processes, beside(GPO), *options) for processes in (1, 2))
    assert_alike_with_heads(one, two)


def test_two_processes_go_on_bit_for_bit(tiny_world: Path, tmp_path: Path) -> None:
    """Over the end of an epoch: 16 pairs are four steps."""
    lines = (tiny_world / "pairs.jsonl").read_text().splitlines(keepends=True)[:16]
    (tmp_path / "few.jsonl").write_text("".join(lines))
    options = (beside(GPO), f"dataset.train={tmp_path / 'few.jsonl'}", LORA, "training.save_steps=3")
    out = train(tiny_world, tmp_path, 2, *options)
    straight = Path(shutil.copytree(out, tmp_path / "straight"))
    run = RunFolder(out)
    shutil.rmtree(run.checkpoints / "checkpoint-6")
    shutil.rmtree(run.model)
    run.update_manifest(status="running")
    train(tiny_world, tmp_path, 2, *options, "--resume")
    assert figures(out, "loss") == figures(straight, "loss")
    assert metrics.read(run.metrics)[-1]["step"] == 6
    for ours, theirs in (
        (head(out), head(straight)),
        *[[load_file(each / "model" / "adapter_model.safetensors") for each in (out, straight)]],
    ):
        for name, tensor in theirs.items():
            assert ours[name].equal(tensor), name
