"""Two machines on one: network namespaces with addresses of their own, and one training run across them.

It needs `ip` (iproute2) and the right to make namespaces (root, or CAP_SYS_ADMIN), and is skipped elsewhere.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from prefopt_cli.runs.folder import RunFolder
from tests.cli.conftest import environment
from tests.training.conftest import RECIPE

pytestmark = pytest.mark.slow

SLOW_F = """\
import time

import torch


def f(x):
    time.sleep(0.1 if x.requires_grad else 0)
    return torch.nn.functional.softplus(-x)
"""
"""A loss that leaves time for accidents."""

ENDLESS = (
    "training.max_steps=5000",
    "training.num_train_epochs=5000",
    "training.save_steps=5",
    "training.logging_steps=5",
    "training.eval_strategy=no",
)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@dataclass(frozen=True)
class Machine:
    """A namespace that is connected with the other one."""

    rank: int
    namespace: str
    address: str

    def start(self, recipe: Path, *extra: str) -> subprocess.Popen[str]:
        """`prefopt train` in it."""
        command = [
            "ip",
            "netns",
            "exec",
            self.namespace,
            sys.executable,
            "-m",
            "prefopt_cli",
            "train",
            str(recipe),
        ]
        command += [*extra, f"launch.machine_rank={self.rank}"]
        variables = {**environment(), "PREFOPT_CACHE": str(recipe.parent / "cache"), "OMP_NUM_THREADS": "1"}
        with (recipe.parent / f"{self.rank}.out").open("w") as output:
            return subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, text=True, env=variables
            )


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two, joined by a cable (veth); all that runs in them is ended afterwards."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        pytest.skip("there is no `ip` (iproute2) to make network namespaces with")
    names = [f"prefopt-{os.getpid()}-{rank}" for rank in (0, 1)]
    made = tuple(Machine(rank, name, f"10.213.7.{rank + 1}") for rank, name in enumerate(names))
    try:
        try:
            for machine in made:
                ip("netns", "add", machine.namespace)
            ip(
                "link",
                "add",
                "eth0",
                "netns",
                names[0],
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                names[1],
            )
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        for machine in made:
            ip("-n", machine.namespace, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            ip("-n", machine.namespace, "link", "set", "eth0", "up")
            ip("-n", machine.namespace, "link", "set", "lo", "up")
        yield made  # type: ignore[misc]
    finally:
        for name in names:
            inside = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            )
            for process in inside.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.fixture
def recipe(tiny_world: Path, tmp_path: Path) -> Path:
    """A recipe for both machines, with a loss of its own beside it."""
    (tmp_path / "slow_f.py").write_text(SLOW_F)
    path = tmp_path / "my.yaml"
    launch = "launch: {machines: 2, rendezvous: '10.213.7.1:29531', timeout: 60}\n"
    path.write_text(RECIPE.format(world=tiny_world, out=tmp_path / "run") + launch)
    return path


def output(recipe: Path, rank: int) -> str:
    return (recipe.parent / f"{rank}.out").read_text()


def wait_for_checkpoint(recipe: Path, *started: subprocess.Popen[str]) -> None:
    run = RunFolder(recipe.parent / "run")
    for _ in range(1800):
        if run.path.exists() and run.last_checkpoint():
            return
        assert all(process.poll() is None for process in started), output(recipe, 0) + output(recipe, 1)
        time.sleep(0.1)
    raise AssertionError(output(recipe, 0))


def test_a_machine_that_dies_ends_the_other_and_resume_finishes_the_run(
    machines: tuple[Machine, Machine], recipe: Path
) -> None:
    options = ("method.loss=slow_f:f", "training.max_steps=20", *ENDLESS[2:])
    started = [machine.start(recipe, *options) for machine in machines]
    wait_for_checkpoint(recipe, *started)
    left = psutil.Process(started[0].pid).children(recursive=True)
    for process in [*psutil.Process(started[1].pid).children(recursive=True), psutil.Process(started[1].pid)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    assert started[0].wait(60) == 1
    told = output(recipe, 0)
    assert "prefopt: machine 1 (" in told, told
    assert "ended without a word" in told
    assert "Traceback" not in told
    assert "launch.machine_rank=0 --resume" in told
    psutil.wait_procs(left, timeout=10)
    assert not [process for process in left if process.is_running()]

    again = [machine.start(recipe, *options, "--resume") for machine in machines]
    assert [process.wait(180) for process in again] == [0, 0], output(recipe, 0) + output(recipe, 1)
    assert "Resuming from" in output(recipe, 0)
    assert RunFolder(recipe.parent / "run").read_manifest()["status"] == "finished"
    assert RunFolder(recipe.parent / "run").read_manifest()["processes"] == 2


def test_a_machine_that_falls_silent_is_noticed_by_both(
    machines: tuple[Machine, Machine], recipe: Path
) -> None:
    options = ("method.loss=slow_f:f", *ENDLESS, "launch.timeout=40")
    started = [machine.start(recipe, *options) for machine in machines]
    wait_for_checkpoint(recipe, *started)
    ip("-n", machines[1].namespace, "link", "set", "eth0", "down")
    begun = time.monotonic()
    assert [process.wait(120) for process in started] == [1, 1]
    assert time.monotonic() - begun < 40 + 20
    for rank, other in ((0, 1), (1, 0)):
        assert f"prefopt: machine {other} (" in output(recipe, rank), output(recipe, rank)
        assert "has been silent for 40 s" in output(recipe, rank)


def test_a_mistake_of_one_machine_is_told_on_both(machines: tuple[Machine, Machine], recipe: Path) -> None:
    started = [
        machine.start(recipe, f"training.learning_rate={rate}")
        for machine, rate in zip(machines, ("1e-3", "1e-4"), strict=True)
    ]
    assert [process.wait(60) for process in started] == [2, 2]
    for rank in (0, 1):
        assert "another recipe than machine 0" in output(recipe, rank)
    assert not (recipe.parent / "run").exists()


def test_machines_that_never_come_are_not_waited_for(machines: tuple[Machine, Machine], recipe: Path) -> None:
    alone = [machine.start(recipe, "launch.timeout=4") for machine in machines[:1]]
    assert alone[0].wait(60) == 1
    told = output(recipe, 0)
    assert "1 of 2 machines came within 4 s" in told
    assert "machine 1 did not come" in told
    assert "29531 and 29532" in told
    late = machines[1].start(recipe, "launch.timeout=4")
    assert late.wait(60) == 1
    assert "was not reached at 10.213.7.1:29532 within 4 s" in output(recipe, 1)


def test_a_signal_on_one_machine_stops_the_run_on_both(
    machines: tuple[Machine, Machine], recipe: Path
) -> None:
    started = [machine.start(recipe, "method.loss=slow_f:f", *ENDLESS) for machine in machines]
    wait_for_checkpoint(recipe, *started)
    psutil.Process(started[1].pid).send_signal(signal.SIGTERM)
    assert [process.wait(90) for process in started] == [143, 143], output(recipe, 0) + output(recipe, 1)
    assert "a checkpoint was saved. Go on with:" in output(recipe, 0)
    assert "Stopped: machine 0 tells where." in output(recipe, 1)
    assert RunFolder(recipe.parent / "run").read_manifest()["status"] == "interrupted"


def test_a_signal_that_reaches_a_machine_late_ends_nothing(
    machines: tuple[Machine, Machine], recipe: Path
) -> None:
    """Its processes have heard from the others, agreed to stop, and are leaving, when its launcher hears of it."""
    started = [machine.start(recipe, "method.loss=slow_f:f", *ENDLESS) for machine in machines]
    wait_for_checkpoint(recipe, *started)
    late = psutil.Process(started[1].pid)
    workers = [each for each in late.children(recursive=True) if each.ppid() != late.pid]
    late.suspend()
    psutil.Process(started[0].pid).send_signal(signal.SIGTERM)
    run = RunFolder(recipe.parent / "run")
    for _ in range(600):
        if run.read_manifest()["status"] == "interrupted":
            break
        time.sleep(0.02)
    for worker in workers:  # as its launcher does, as soon as it hears
        with suppress(psutil.NoSuchProcess):
            worker.send_signal(signal.SIGINT)
    late.resume()
    assert [process.wait(90) for process in started] == [143, 143], output(recipe, 0) + output(recipe, 1)
    assert "a checkpoint was saved. Go on with:" in output(recipe, 0)
    assert "Stopped: machine 0 tells where." in output(recipe, 1)
