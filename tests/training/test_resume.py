"""Stopping and going on: the weights at the end are those of a run that never stopped, bit for bit."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from prefopt_cli.errors import UserError
from prefopt_cli.recipe import load_recipe
from prefopt_cli.runs import metrics
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.reporting import Silent
from prefopt_cli.training.run import train
from tests.training.conftest import LORA, Run

TIMES = ("runtime", "per_second", "total_flos", "train_loss")


class SignalAt(Silent):
    """Sends this process a signal when a step has ended, as a person or a scheduler would."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self._step, self._number = step, number

    def step(self, step: int, total: int, metrics: dict[str, float] | None) -> None:
        if step == self._step and metrics is None:
            os.kill(os.getpid(), self._number)


def weights(run: RunFolder) -> dict[str, Any]:
    (file,) = run.model.glob("*.safetensors")
    return load_file(file)


def figures(run: RunFolder) -> list[dict[str, Any]]:
    """What was logged, without what measures time."""
    return [
        {key: value for key, value in record.items() if not any(word in key for word in TIMES)}
        for record in metrics.read(run.metrics)
    ]


def assert_same(resumed: RunFolder, straight: RunFolder) -> None:
    ours, theirs = weights(resumed), weights(straight)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].equal(theirs[name]), name
    assert figures(resumed) == figures(straight)


CASES = {
    "full": (),
    "lora with dropout": (LORA,),
    # Two epochs of 24 batches in steps of 2, logged every 5 steps: the stop falls inside an epoch, an open
    # logging window, and a warm-up.
    "accumulation": (
        "training.gradient_accumulation_steps=2",
        "training.max_steps=-1",
        "training.num_train_epochs=2",
        "training.logging_steps=5",
        "training.warmup_steps=9",
        "training.lr_scheduler_type=cosine",
    ),
}

LONG = {"accumulation": pytest.mark.slow}

EPOCHS = (
    "training.max_steps=-1",
    "training.num_train_epochs=2",
    "training.per_device_train_batch_size=32",
    "training.save_strategy=epoch",
    "training.eval_strategy=epoch",
    "training.load_best_model_at_end=true",
    "training.metric_for_best_model=heldout_loss",
    "training.greater_is_better=true",  # so that the best one is not simply the last
)
"""Two epochs of three steps; both end with an evaluation and a checkpoint."""


@pytest.mark.parametrize(
    "overrides", [pytest.param(case, id=name, marks=LONG.get(name, ())) for name, case in CASES.items()]
)
@pytest.mark.parametrize("stop_at", [2, 4])
def test_resumed_run_equals_one_that_never_stopped(
    run: Run, overrides: tuple[str, ...], stop_at: int
) -> None:
    straight = run("straight", *overrides)
    stopped = run("stopped", *overrides, reporter=SignalAt(stop_at))
    assert (stopped.status, stopped.step, stopped.signal) == ("interrupted", stop_at, signal.SIGINT)
    assert stopped.run.read_manifest()["status"] == "interrupted"
    assert not stopped.run.model.exists()
    resumed = run("stopped", *overrides, resume=True)
    assert resumed.status == "finished"
    assert resumed.run.read_manifest()["status"] == "finished"
    assert_same(resumed.run, straight.run)


def test_resuming_a_run_that_goes_on_with_an_adapter(run: Run) -> None:
    """Its reference is the adapter as it was at the start, not as the checkpoint has it."""
    first = run("first", LORA)
    start = (LORA, f"model.name_or_path={first.run.path}")
    straight = run("straight", *start)
    run("stopped", *start, reporter=SignalAt(3))
    assert_same(run("stopped", *start, resume=True).run, straight.run)


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [2, 3, 4])
def test_stopping_at_the_end_of_an_epoch_keeps_its_evaluation(run: Run, stop_at: int) -> None:
    straight = run("straight", *EPOCHS)
    assert len([record for record in figures(straight.run) if "eval_heldout_loss" in record]) == 2
    stopped = run("stopped", *EPOCHS, reporter=SignalAt(stop_at))
    assert stopped.step == stop_at
    assert_same(run("stopped", *EPOCHS, resume=True).run, straight.run)


def test_a_signal_during_an_evaluation(run: Run) -> None:
    class DuringEvaluation(SignalAt):
        def progress(self, task: str, done: int, total: int) -> None:
            if task == "evaluating" and done == 1:
                os.kill(os.getpid(), signal.SIGINT)

    every = ("training.eval_strategy=steps", "training.eval_steps=2")
    straight = run("straight", *every)
    stopped = run("stopped", *every, reporter=DuringEvaluation(-1))
    assert (stopped.status, stopped.step) == ("interrupted", 2)
    assert_same(run("stopped", *every, resume=True).run, straight.run)


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param((), id="inside an epoch"),
        pytest.param(EPOCHS, id="best of two epochs", marks=pytest.mark.slow),
    ],
)
def test_nothing_left_to_train(run: Run, extra: tuple[str, ...]) -> None:
    """Killed between the last checkpoint and the export: no further step is taken."""
    constant = ("training.lr_scheduler_type=constant", *extra)
    straight = run("straight", *constant)
    killed = run("killed", *constant).run
    shutil.rmtree(killed.model)
    killed.update_manifest(status="failed", error="lightning")
    resumed = run("killed", *constant, resume=True)
    assert (resumed.status, resumed.step) == ("finished", 6)
    assert_same(resumed.run, straight.run)
    assert not (killed.checkpoints / "checkpoint-7").exists()
    assert "error" not in killed.read_manifest()


def test_sigterm_saves_too(run: Run) -> None:
    outcome = run("run", reporter=SignalAt(2, signal.SIGTERM))
    assert outcome.signal == signal.SIGTERM
    assert outcome.run.last_checkpoint() == outcome.run.checkpoints / "checkpoint-2"


def test_second_signal_stops_at_once(run: Run, tmp_path: Path) -> None:
    class Twice(SignalAt):
        def step(self, step: int, total: int, metrics: dict[str, float] | None) -> None:
            super().step(step, total, metrics)
            super().step(step, total, metrics)

    with pytest.raises(KeyboardInterrupt):
        run("run", reporter=Twice(4))
    folder = RunFolder(tmp_path / "run")
    assert folder.read_manifest()["status"] == "interrupted"
    assert folder.last_checkpoint() == folder.checkpoints / "checkpoint-3"


def test_killed_while_saving(run: Run) -> None:
    """A checkpoint that was cut off is passed over, and lines logged after the good one are not doubled."""
    straight = run("straight")
    killed = run("killed").run
    (killed.checkpoints / "checkpoint-6" / "prefopt.json").unlink()
    (killed.checkpoints / "checkpoint-6" / "model.safetensors").write_bytes(b"torn")
    shutil.rmtree(killed.model)
    killed.update_manifest(status="running")
    assert_same(run("killed", resume=True).run, straight.run)


def test_nothing_saved_yet_starts_over(run: Run) -> None:
    straight = run("straight")
    killed = run("killed").run
    for folder in killed.checkpoints.glob("checkpoint-*"):
        shutil.rmtree(folder)
    killed.update_manifest(status="running")
    assert_same(run("killed", resume=True).run, straight.run)


def test_finished_run_is_left_as_it_is(run: Run) -> None:
    outcome = run("run")
    before = outcome.run.manifest.read_text()
    again = run("run", resume=True)
    assert (again.status, again.step) == ("finished", 6)
    assert outcome.run.manifest.read_text() == before


def test_refusals(run: Run, tiny_world: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run"):
        run("nowhere", resume=True)
    rows = (tiny_world / "pairs.jsonl").read_text().splitlines()
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(rows))
    run("run", f"dataset.train={own}", reporter=SignalAt(2))
    with pytest.raises(UserError, match=r"method\.beta"):
        run("run", f"dataset.train={own}", "method.beta=0.2", resume=True)
    changed = json.loads(rows[0])
    own.write_text("\n".join([json.dumps({**changed, "chosen": " Something else."}), *rows[1:]]))
    with pytest.raises(UserError, match="train has changed"):
        run("run", f"dataset.train={own}", resume=True)
    own.write_text("\n".join(rows))
    stopped = RunFolder(tmp_path / "run")
    with pytest.raises(UserError, match=r"train on 2 rows in a step.* began with 4"):
        run("run", f"dataset.train={own}", "training.per_device_train_batch_size=2", resume=True)
    stopped.update_manifest(engine="fsdp")
    with pytest.raises(UserError, match=r"began with launch\.engine: fsdp"):
        run("run", f"dataset.train={own}", resume=True)
    stopped.update_manifest(
        engine="ddp", processes=2
    )  # with as many rows in a step: DDP's checkpoints are whole
    resumed = run("run", f"dataset.train={own}", "training.save_total_limit=1", resume=True)
    assert resumed.status == "finished"


def test_another_starting_policy_is_noticed(run: Run) -> None:
    """It would be another reference."""
    first = run("first", LORA)
    start = (LORA, f"model.name_or_path={first.run.path}")
    run("second", *start, reporter=SignalAt(2))
    run("first", LORA, "training.seed=1", overwrite=True)
    with pytest.raises(UserError, match="has changed since"):
        run("second", *start, resume=True)


@pytest.mark.parametrize(
    ("module", "method"),
    [
        ("own_resume", "method.loss=own_resume:f"),
        (
            "own_resume_beside",
            "method={name: self_supervised, align: {name: gpo, loss: 'own_resume_beside:f'}}",
        ),
    ],
)
def test_own_function_is_found_again_and_must_be_the_same(
    run: Run, tmp_path: Path, module: str, method: str
) -> None:
    source = tmp_path / f"{module}.py"
    source.write_text("def f(z):\n    return (1 - z).clamp(min=0) ** 3\n")
    stopped = run("run", method, reporter=SignalAt(2)).run
    # The run's own recipe lies elsewhere than the module.
    outcome = train(
        load_recipe(stopped.recipe), recipe_folder=stopped.path, reporter=SignalAt(4), resume=True
    )
    assert outcome.step == 4
    source.write_text("def f(z):\n    return (2 - z).clamp(min=0) ** 3\n")
    sys.modules.pop(module)
    with pytest.raises(UserError, match=f"function {module}:f has changed"):
        run("run", method, resume=True)
