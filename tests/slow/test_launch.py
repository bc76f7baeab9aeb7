"""`prefopt train` that starts its processes itself: two over gloo on the CPU, and what may happen to them."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from prefopt_cli.runs.folder import RunFolder
from tests.chain.conftest import CHAIN
from tests.cli.conftest import environment
from tests.training.conftest import RECIPE

pytestmark = pytest.mark.slow

SECOND = """\
import os
import signal
import time

import torch


def f(x):
    if os.environ.get("RANK") == "1" and (MARK := os.environ.get("ACCIDENT")) and x.requires_grad and x.numel() == 4:
        if MARK == "raises":
            raise RuntimeError("rank one is unhappy")
        if MARK == "exits":
            os._exit(7)
        if MARK == "nan":
            return x * torch.tensor([1.0, float("nan"), 1.0, 1.0])
        os.kill(os.getpid(), getattr(signal, MARK))
    time.sleep(0.05 if x.requires_grad else 0)
    return torch.nn.functional.softplus(-x)
"""
"""A loss that has an accident in the second process, in its first step."""

ENDLESS = (
    "training.max_steps=50000",
    "training.num_train_epochs=50000",
    "training.save_steps=50000",
    "training.eval_strategy=no",
)


@pytest.fixture
def recipe(tiny_world: Path, tmp_path: Path) -> Path:
    """A recipe for two processes, with a loss of its own beside it."""
    (tmp_path / "second.py").write_text(SECOND)
    path = tmp_path / "my.yaml"
    text = RECIPE.format(world=tiny_world, out=tmp_path / "run").replace("loss: logistic", "loss: second:f")
    path.write_text(text + "launch: {processes: 2}\n")
    return path


def variables(folder: Path, **more: str) -> dict[str, str]:
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    return {**environment(), "PREFOPT_CACHE": str(folder / "cache"), "TMPDIR": str(temporary), **more}


def finish(
    recipe: Path, *extra: str, launcher: tuple[str, ...] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    """`prefopt train` to its end."""
    command = [sys.executable, *launcher, "-m", "prefopt_cli", "train", str(recipe), *extra]
    return subprocess.run(
        command, capture_output=True, text=True, env=variables(recipe.parent, **more), timeout=400
    )


@pytest.fixture
def started(recipe: Path) -> Iterator[subprocess.Popen[str]]:
    """An endless run, in its steps."""
    process = subprocess.Popen(
        [sys.executable, "-m", "prefopt_cli", "train", str(recipe), *ENDLESS, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables(recipe.parent),
        start_new_session=True,
    )
    try:
        wait_for_steps(recipe, process)
        yield process
    finally:
        if process.poll() is None:
            process.kill()


def wait_for_steps(recipe: Path, process: subprocess.Popen[str]) -> None:
    file = RunFolder(recipe.parent / "run").metrics
    for _ in range(1800):
        if file.is_file() and file.read_text().count("\n") > 2:
            return
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.1)
    raise AssertionError("no step in three minutes")


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    assert len(found) >= 3, "torchrun's agent and two workers"
    return found


def assert_gone(processes: list[psutil.Process]) -> None:
    psutil.wait_procs(processes, timeout=10)
    assert not [each for each in processes if each.is_running()]


def left_behind(recipe: Path) -> list[Path]:
    return [*(recipe.parent / "temporary").glob("prefopt-launch-*")]


def test_one_object_on_standard_output_and_one_voice(recipe: Path) -> None:
    done = finish(recipe, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
    assert done.stderr.count("Reference policy:") == 1
    assert done.stderr.startswith("Starting 2 processes (ddp).\n")
    for noise in ("OMP_NUM_THREADS", "torch.distributed", "torchelastic", "[W"):
        assert noise not in done.stderr
    assert RunFolder(recipe.parent / "run").read_manifest()["processes"] == 2
    assert not left_behind(recipe)
    again = finish(recipe, "--json", "--resume")
    assert (again.returncode, json.loads(again.stdout)["step"]) == (0, 6)


@pytest.mark.parametrize(
    ("accident", "words"),
    [
        ("raises", "rank 1 of 2: Unexpected RuntimeError: rank one is unhappy"),
        ("exits", "rank 1 of 2: it ended with exit code 7 and said nothing."),
        (
            "SIGKILL",
            "rank 1 of 2: it was killed by signal 9 (SIGKILL); the system may have run out of memory.",
        ),
    ],
)
def test_the_first_error_and_its_rank(recipe: Path, accident: str, words: str) -> None:
    begun = time.monotonic()
    done = finish(recipe, ACCIDENT=accident)
    assert done.returncode == 1
    assert done.stderr.count("prefopt: ") == 1
    assert f"prefopt: {words}" in done.stderr
    for noise in ("Traceback", "elastic", "gloo"):
        assert noise not in done.stderr
    manifest = RunFolder(recipe.parent / "run").read_manifest()
    assert (manifest["status"], words in manifest["error"]) == ("failed", True)
    assert time.monotonic() - begun < 120


def test_the_row_with_a_loss_that_is_not_finite_is_named_whichever_process_has_it(recipe: Path) -> None:
    """The gradient, a sum over all processes, is not finite in any of them."""
    done = finish(recipe, ACCIDENT="nan")
    assert done.returncode == 1
    told = re.search(r"step 1: the loss is not finite\. Rows: (\S+)\. The step was not taken", done.stderr)
    assert told, done.stderr
    assert re.fullmatch(r"pairs\.jsonl:\d+", told[1]), "one row"
    assert told[0] in RunFolder(recipe.parent / "run").read_manifest()["error"]


def test_a_users_mistake_is_told_as_by_one_process(recipe: Path) -> None:
    several, one = (
        finish(recipe, "model.name_or_path=none/such"),
        finish(recipe, "model.name_or_path=none/such", "launch.processes=1"),
    )
    assert several.returncode == one.returncode == 2
    assert (
        several.stderr.removeprefix("Starting 2 processes (ddp).\n").splitlines()[-1]
        == one.stderr.splitlines()[-1]
    )
    assert not left_behind(recipe)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(
    started: subprocess.Popen[str], recipe: Path, number: signal.Signals
) -> None:
    processes = descendants(started)
    started.send_signal(number)
    out, err = started.communicate(timeout=120)
    assert started.returncode == 128 + number, err
    assert json.loads(out)["status"] == "interrupted"
    assert err.count("Stopping as soon as what is being computed is done") == 1
    assert f"  prefopt train {recipe} {' '.join(ENDLESS)} --resume" in err
    assert RunFolder(recipe.parent / "run").last_checkpoint() is not None
    assert_gone(processes)
    assert not left_behind(recipe)


def test_a_signal_to_every_process_counts_once(started: subprocess.Popen[str], recipe: Path) -> None:
    """Slurm sends SIGTERM to all processes of a step, not only to the one that it started."""
    for process in [*descendants(started), psutil.Process(started.pid)]:
        process.send_signal(signal.SIGTERM)
    out, err = started.communicate(timeout=120)
    assert started.returncode == 143, err
    assert json.loads(out)["status"] == "interrupted"
    assert RunFolder(recipe.parent / "run").last_checkpoint() is not None


def test_a_second_ctrl_c_ends_at_once(started: subprocess.Popen[str], recipe: Path) -> None:
    processes = descendants(started)
    worker = next(each for each in processes if each.parent() != psutil.Process(started.pid))
    worker.suspend()  # so that the step takes as long as it takes
    for _ in range(3):
        started.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, err = started.communicate(timeout=60)
    assert started.returncode == 130
    assert err.endswith("prefopt: Interrupted.\n")
    assert_gone(processes)
    manifest = RunFolder(recipe.parent / "run").read_manifest()
    assert (manifest["status"], manifest.get("error")) == ("interrupted", None)


@pytest.mark.parametrize("who", ["launcher", "torchrun"])
def test_nothing_outlives_a_launcher_that_is_killed(
    started: subprocess.Popen[str], recipe: Path, who: str
) -> None:
    processes = descendants(started)
    agent = psutil.Process(started.pid).children()[0]
    (psutil.Process(started.pid) if who == "launcher" else agent).kill()
    started.wait(60)
    assert_gone(processes)
    if who == "torchrun":
        assert started.returncode == 1
        assert started.stderr is not None
        assert (
            "torchrun, which watched over the processes, was killed by signal 9 (SIGKILL)"
            in started.stderr.read()
        )
    assert not left_behind(recipe)


CLOCK_THAT_STEPS = """\
import sys
import time

import psutil

begun, boot_time = time.time(), psutil._pslinux.boot_time


def stepping():
    return boot_time() + (3600 if time.time() > begun + 2 else 0)


if "prefopt_cli" in " ".join(sys.orig_argv):
    psutil._pslinux.boot_time = stepping
"""
"""The time at which the system was started moves with its clock, and with it all times of processes."""


@pytest.mark.skipif(sys.platform != "linux", reason="psutil computes these times elsewhere in other ways")
def test_a_step_of_the_systems_clock_ends_nothing(recipe: Path) -> None:
    (recipe.parent / "sitecustomize.py").write_text(CLOCK_THAT_STEPS)
    path = os.pathsep.join([str(recipe.parent), environment()["PYTHONPATH"]])
    done = finish(recipe, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert not left_behind(recipe)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [0.3, 4.0])
def test_a_signal_while_workers_start(recipe: Path, number: signal.Signals, after: float) -> None:
    """Before they can hear it, and while they load their libraries."""
    process = subprocess.Popen(
        [sys.executable, "-m", "prefopt_cli", "train", str(recipe), *ENDLESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables(recipe.parent),
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("Starting 2 processes")
    time.sleep(after)
    processes = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.splitlines()[-1]) == (128 + number, "prefopt: Interrupted."), err
    assert_gone(processes)
    assert not left_behind(recipe)


def test_ctrl_c_while_one_process_starts(recipe: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "prefopt_cli", "train", str(recipe), "launch.processes=1", *ENDLESS],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=variables(recipe.parent),
    )
    while "torch" not in str([each.path for each in psutil.Process(process.pid).memory_maps()]):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "prefopt: Interrupted.\n")


def test_ctrl_c_on_a_terminal(recipe: Path) -> None:
    """The terminal itself makes the signal, for the processes in its foreground."""
    command = [sys.executable, "-m", "prefopt_cli", "train", str(recipe), *ENDLESS]
    process, leader = pty.fork()
    if process == 0:  # the child, whose terminal it is
        os.execve(command[0], command, {**variables(recipe.parent), "TERM": "xterm"})
    shown, pressed = b"", False
    with suppress(OSError):  # the other side is closed
        while piece := os.read(leader, 65536):
            shown += piece
            if not pressed and b"loss" in shown:
                os.write(leader, b"\x03")
                pressed = True
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 130, shown.decode()
    assert b"a checkpoint was saved" in shown


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

ACCELERATE = (
    *("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)


@pytest.mark.parametrize(
    ("launcher", "processes", "engine"),
    [(TORCHRUN, 2, "ddp"), (TORCHRUN, 2, "fsdp"), (ACCELERATE, 1, "ddp")],
    ids=["torchrun", "torchrun with an engine", "accelerate"],
)
def test_inside_another_launcher_it_starts_nothing(
    recipe: Path, launcher: tuple[str, ...], processes: int, engine: str
) -> None:
    asked = () if engine == "ddp" else (f"launch.engine={engine}",)
    done = finish(recipe, *asked, launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert "Starting 2 processes" not in done.stderr
    assert done.stdout.count("Policy: ") == 1
    manifest = RunFolder(recipe.parent / "run").read_manifest()
    assert (manifest["processes"], manifest["engine"]) == (processes, engine)


def test_what_launch_prints_can_be_pasted(recipe: Path) -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "prefopt_cli", "launch", "--print", str(recipe)],
        capture_output=True,
        text=True,
        env=variables(recipe.parent),
        check=True,
    ).stdout
    done = subprocess.run(["sh", "-c", printed], capture_output=True, text=True, env=variables(recipe.parent))
    assert done.returncode == 0, done.stderr
    assert RunFolder(recipe.parent / "run").read_manifest()["processes"] == 2


def test_a_configuration_of_accelerate(recipe: Path, tmp_path: Path) -> None:
    config = tmp_path / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nmixed_precision: 'no'\nnum_machines: 1\n"
        "num_processes: 2\nmachine_rank: 0\nuse_cpu: true\n"
    )
    done = finish(recipe, f"launch={{config: {config}}}")
    assert done.returncode == 0, done.stderr
    assert RunFolder(recipe.parent / "run").read_manifest()["processes"] == 2


@pytest.mark.parametrize("stages", [1, 2])
def test_a_chain_in_two_processes(stages: int, tiny_world: Path, tmp_path: Path) -> None:
    file = tmp_path / "chain.yaml"
    chain = CHAIN.format(world=tiny_world, out=tmp_path / "out")
    if stages == 1:
        chain = chain.partition("  - dimension: facts")[0]
    file.write_text(chain + "launch: {processes: 2}\n")
    done = subprocess.run(
        [sys.executable, "-m", "prefopt_cli", "chain", str(file), "--json"],
        capture_output=True,
        text=True,
        env=variables(tmp_path),
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
    assert done.stderr.count("Starting 2 processes") == 1
    for dimension in ("tone", "facts")[:stages]:
        assert RunFolder(tmp_path / "out" / dimension).read_manifest()["processes"] == 2
