"""The scripts for clusters, started for real: two "nodes" on this machine train one tiny policy together."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from prefopt_cli.launch.skypilot import SkyOptions, skypilot_task
from prefopt_cli.launch.slurm import SlurmOptions, slurm_script
from prefopt_cli.recipe import load_recipe
from prefopt_cli.runs import metrics
from tests.cli.conftest import environment
from tests.launch import fake_slurm
from tests.ports import free_ports
from tests.training.conftest import RECIPE

pytestmark = pytest.mark.slow

PATIENCE = 240
OF_A_JOB = range(20_000, 30_000, 2)
"""The ports that a script makes of its job's number."""

MORE = ["dataset.eval={}", "launch.timeout=60"]


@pytest.fixture
def recipe(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recipe in the present folder, whose run comes to lie in `run`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(RECIPE.format(world=tiny_world, out="run"))
    return "my.yaml"


def require_one_run(steps: int) -> None:
    """One run of so many steps, each of them taken once, by two processes."""
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert (manifest["status"], manifest["processes"]) == ("finished", 2)
    taken = [record["step"] for record in metrics.read(Path("run/metrics.jsonl")) if "loss" in record]
    assert taken == list(range(1, steps + 1))
    assert Path("run/model/model.safetensors").is_file()


def python_first() -> dict[str, str]:
    """The environment of someone whose Python comes first in PATH."""
    programs = str(Path(sys.executable).parent)
    return {**environment(), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def test_slurms_tasks_train_together(recipe: str, tmp_path: Path) -> None:
    """`srun` and its like are stand-ins that really start the tasks."""
    fake_slurm.write(tmp_path / "bin")
    options = SlurmOptions(nodes=2, gpus_per_node="0", setup=[f"PATH={tmp_path}/bin:$PATH"])
    Path("job.sbatch").write_text(slurm_script(recipe, MORE, load_recipe(recipe, MORE), options))
    job = free_ports(OF_A_JOB) // 2  # of which the script makes its port
    done = subprocess.run(
        ["bash", "job.sbatch"],
        env={**python_first(), **fake_slurm.variables(2, job)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "All 2 machines are there" in done.stderr
    require_one_run(6)


def test_skypilots_machines_train_together(recipe: str) -> None:
    options = SkyOptions(nodes=2)
    task = yaml.safe_load(skypilot_task(recipe, MORE, load_recipe(recipe, MORE), options))
    script = (
        task["run"].replace(":29500", f":{free_ports()}").replace(". ~/prefopt-environment/bin/activate", "")
    )
    machines = []
    for rank in range(2):
        own = {
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
        }
        machines.append(
            subprocess.Popen(
                ["bash", "-c", script], env={**python_first(), **own}, stderr=subprocess.PIPE, text=True
            )
        )
    for machine in machines:
        _, said = machine.communicate(timeout=PATIENCE)
        assert machine.returncode == 0, said[-3000:]
    require_one_run(6)


CONFIGURATION = """\
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
AuthType=auth/none
FirstJobId={job}
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/control.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
NodeName=127.0.0.1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=2000
NodeName=127.0.0.2 NodeHostname={host} NodeAddr=127.0.0.2 Port={second} CPUs=2 RealMemory=2000
PartitionName=main Nodes=127.0.0.1,127.0.0.2 Default=YES MaxTime=INFINITE State=UP
"""
"""A cluster of two nodes on one machine; their names are addresses, so that nothing needs to resolve them."""


ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A real controller and two real node daemons."""
    missing = [name for name in ("slurmctld", "slurmd", "sbatch", "scontrol") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"Slurm is not here: no {', '.join(missing)}" if missing else "slurmd wants to be root")
    # The names of its sockets must not get long, so it does not lie in tmp_path.
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    for name in ("state", "spool-127.0.0.1", "spool-127.0.0.2"):
        (folder / name).mkdir(parents=True)
    ports = {name: free_ports() for name in ("control", "first", "second")}
    file = folder / "slurm.conf"
    host, job = socket.gethostname().partition(".")[0], free_ports(OF_A_JOB) // 2
    file.write_text(CONFIGURATION.format(host=host, job=job, folder=folder, **ports))
    monkeypatch.setenv("SLURM_CONF", str(file))
    commands = [["slurmctld", "-D"], ["slurmd", "-D", "-N", "127.0.0.1"], ["slurmd", "-D", "-N", "127.0.0.2"]]
    daemons = []
    for number, command in enumerate(commands):
        with (folder / f"log-{number}").open("w") as log:
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
    try:
        if not eventually(lambda: asked("sinfo", "--noheader", "--format=%T %D") == "idle 2", 30):
            logs = "".join((folder / f"log-{number}").read_text()[-1000:] for number in range(3))
            pytest.skip(f"Slurm does not start here: {logs}")
        yield
    finally:
        for job in asked("squeue", "--noheader", "--format=%i").split():
            subprocess.run(["scancel", "--signal=KILL", "--full", job], check=False)
            subprocess.run(["scancel", job], check=False)
        eventually(lambda: not asked("squeue", "--noheader", "--format=%i"), 30)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def asked(*command: str) -> str:
    """What a program of Slurm's answers."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def eventually(condition: Callable[[], bool], seconds: float = PATIENCE) -> bool:
    """Whether something comes true in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.2)
    return False


def test_real_slurm_saves_requeues_and_resumes(recipe: str, slurm: None, tmp_path: Path) -> None:
    """The signal that comes before the time limit is sent by hand; all else is Slurm's own doing."""
    steps = 60
    overrides = [*MORE, f"training.max_steps={steps}", "training.save_steps=1000"]
    options = SlurmOptions(nodes=2, gpus_per_node="0", time="30", mem="500M")
    Path("job.sbatch").write_text(slurm_script(recipe, overrides, load_recipe(recipe, overrides), options))
    assert "error" not in asked("sbatch", "--test-only", "job.sbatch")
    submitted = subprocess.run(
        ["sbatch", "--parsable", "job.sbatch"], env=python_first(), capture_output=True, text=True
    )
    job = submitted.stdout.strip()
    log = Path(f"my-{job}.log")

    def state() -> str:
        return asked("scontrol", "--oneliner", "show", "job", job).partition("JobState=")[2].partition(" ")[0]

    assert eventually(lambda: Path("run/metrics.jsonl").exists() and "step 3/" in log.read_text()), (
        log.read_text() if log.exists() else submitted.stderr + asked("scontrol", "show", "job", job)
    )
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], check=True)
    assert eventually(lambda: state() == "PENDING"), log.read_text()
    assert "a checkpoint was saved" in log.read_text()
    assert json.loads(Path("run/manifest.json").read_text())["status"] == "interrupted"
    # Slurm lets a requeued job wait for two minutes, and refuses one that starts in the second in which it ended.
    soon = ["scontrol", "update", f"JobId={job}", "StartTime=now+10"]
    assert eventually(lambda: subprocess.run(soon, capture_output=True).returncode == 0)
    assert eventually(lambda: state() in ENDED), log.read_text()
    assert state() == "COMPLETED", log.read_text()
    require_one_run(steps)
