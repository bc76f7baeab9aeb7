"""`prefopt launch`, and what is told before any process is started."""

import json
from pathlib import Path

import pytest

from prefopt_cli.cli import launching
from prefopt_cli.cli.launching import command_again
from prefopt_cli.errors import PrefoptError
from prefopt_cli.launch.ending import Ending
from prefopt_cli.launch.failures import Failure
from prefopt_cli.launch.signals import Terminated
from prefopt_cli.launch.supervise import Ended
from tests.cli.conftest import Prefopt, in_a_process


@pytest.mark.parametrize("spelling", [("--print",), ("print",)])
def test_the_command_and_its_environment(prefopt: Prefopt, recipe: Path, spelling: tuple[str, ...]) -> None:
    result = prefopt("launch", *spelling, str(recipe), "launch.processes=2", "launch.engine=fsdp")
    assert result.code == 0, result.err
    comment, command = result.out.splitlines()
    assert comment == "# 2 processes; engine: fsdp."
    assert "ACCELERATE_USE_FSDP=true" in command
    assert "-m torch.distributed.run --standalone" in command
    assert command.endswith(f"-m prefopt_cli train {recipe} launch.processes=2 launch.engine=fsdp")


def test_print_is_an_option_of_none_of_the_commands(prefopt: Prefopt, recipe: Path) -> None:
    for command in ("slurm", "skypilot"):
        result = prefopt("launch", command, "--print", str(recipe))
        assert result.code == 2
        assert "--print" in result.err
        assert "does not exist" not in result.err


def test_as_json(prefopt: Prefopt, recipe: Path) -> None:
    found = json.loads(prefopt("launch", str(recipe), "--print", "launch.processes=2", "--json").out)
    assert found["processes"] == 2
    assert found["command"][-3:] == ["train", str(recipe), "launch.processes=2"]
    assert found["environment"]["ACCELERATE_USE_CPU"] == "true"
    alone = json.loads(prefopt("launch", "print", str(recipe), "--json").out)
    assert alone["command"] == ["prefopt", "train", str(recipe)]
    assert (alone.keys(), alone["engine"], alone["machine_rank"]) == (found.keys(), "ddp", 0)


def test_one_process_needs_no_launcher(prefopt: Prefopt, recipe: Path) -> None:
    out = prefopt("launch", "--print", str(recipe)).out
    assert out == f"# One process, which needs no launcher.\nprefopt train {recipe}\n"


def test_every_machine_has_its_own(prefopt: Prefopt, recipe: Path) -> None:
    asked = ("launch.machines=2", "launch.rendezvous=127.0.0.1:29500", "launch.machine_rank=1")
    out = prefopt("launch", "--print", str(recipe), *asked).out
    assert "Machine 1 of 2" in out
    assert "--node-rank 1" in out


def test_mistakes_are_told_before_anything_starts(prefopt: Prefopt, recipe: Path) -> None:
    for command in (("launch", "--print"), ("train",)):
        result = prefopt(*command, str(recipe), "launch.processes=2", "launch.config=none.yaml")
        assert result.code == 2
        assert "launch.config: there is no file none.yaml." in result.err


@pytest.mark.parametrize("command", [("train",), ("launch", "print")])
def test_several_machines_that_do_not_know_where_to_meet_start_nothing(
    command: tuple[str, ...], prefopt: Prefopt, recipe: Path
) -> None:
    result = prefopt(*command, str(recipe), "launch.machines=2", "model.name_or_path=none/such")
    assert result.code == 2
    assert "add launch.rendezvous: HOST:PORT of machine 0" in result.err
    assert not (recipe.parent / "run").exists()


def test_machines_without_a_place_to_meet_are_no_fault_of_the_recipe(prefopt: Prefopt, recipe: Path) -> None:
    checked = prefopt("check", str(recipe), "launch.machines=2", "--pairs", "1")
    assert checked.code == 0, checked.err
    examined = prefopt("doctor", str(recipe), "launch.machines=2", "--quick")
    assert "is sound" in examined.out


def test_the_launcher_stays_light() -> None:
    """It is there as long as the run: torch would take a quarter of a gigabyte for nothing."""
    program = (
        "import sys, prefopt_cli.launch.supervise, prefopt_cli.launch.meeting_hub, prefopt_cli.cli.main; "
        "print(sorted({'torch', 'transformers', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_inside_a_launcher_nothing_is_started(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, prefopt: Prefopt
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setattr(launching, "time", None)  # which a launch would need
    assert prefopt("train", str(recipe), "launch.processes=2", "model.name_or_path=none/such").code == 2


@pytest.mark.parametrize(
    ("environment", "program"),
    [
        ({}, "prefopt"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, "torchrun --nproc-per-node 2 -m prefopt_cli"),
        ({"WORLD_SIZE": "4", "PREFOPT_LAUNCH": "/tmp/x"}, "prefopt"),
        ({"WORLD_SIZE": "4", "SLURM_STEP_ID": "0"}, "prefopt"),
    ],
)
def test_the_command_that_goes_on(
    environment: dict[str, str], program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "PREFOPT_LAUNCH", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (
        command_again("train", "my.yaml", ["a=b c"], ["--resume"])
        == f"{program} train my.yaml 'a=b c' --resume"
    )


def test_a_failure_ends_the_command_with_its_code(
    recipe: Path, prefopt: Prefopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = Ended(Ending(0, "here", 1, None, Failure("no.", rank=1)), "rank 1 of 2: no.")
    monkeypatch.setattr("prefopt_cli.launch.supervise.supervise", lambda *_, **__: ended)
    result = prefopt("train", str(recipe), "launch.processes=2")
    assert (result.code, result.err) == (
        PrefoptError.exit_code,
        "Starting 2 processes (ddp).\nprefopt: rank 1 of 2: no.\n",
    )


def test_srun_with_a_task_for_each_process_is_no_place_for_sample(recipe: Path) -> None:
    import os

    os.environ |= {
        "SLURM_PROCID": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_NODELIST": "a",
        "SLURM_STEP_TASKS_PER_NODE": "2",
    }
    try:
        done = in_a_process("sample", "some/run")
    finally:
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            del os.environ[name]
    assert done.returncode == 2
    assert "runs in one process" in done.stderr


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ((), None),
        (("manifest.json",), "There is no checkpoint yet. Start over:"),
        (("manifest.json", "checkpoints/checkpoint-5/model.bin"), "There is no checkpoint yet. Start over:"),
        (("manifest.json", "checkpoints/checkpoint-5/prefopt.json"), "Go on from the last checkpoint:"),
        (("chain.json",), "Go on with the chain:"),
    ],
)
def test_what_can_be_gone_on_with(
    made: tuple[str, ...],
    words: str | None,
    recipe: Path,
    prefopt: Prefopt,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in made:
        path = recipe.parent / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    ended = Ended(Ending(0, "here", 1, None, Failure("killed.", kind="signal", rank=1)), "killed.")
    monkeypatch.setattr("prefopt_cli.launch.supervise.supervise", lambda *_, **__: ended)
    told = prefopt("train", str(recipe), "launch.processes=2").err.split("prefopt: killed.\n")[1]
    assert told == (
        "" if words is None else f"{words}\n  prefopt train {recipe} launch.processes=2 --resume\n"
    )


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_an_interruption_has_a_word_and_a_code(
    error: type[BaseException], code: int, prefopt: Prefopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise error

    monkeypatch.setattr("prefopt_cli.recipe.load_recipe", interrupted)
    result = prefopt("train", "x.yaml")
    assert (result.code, result.err) == (code, "prefopt: Interrupted.\n")


def test_variables_of_a_launcher_are_judged_before_anything_is_loaded(
    recipe: Path, prefopt: Prefopt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    result = prefopt("train", str(recipe), "model.name_or_path=none/such")
    assert result.code == 2
    assert result.err.startswith("prefopt: WORLD_SIZE is 'two' in the environment")


def test_skypilot_asks_for_the_machines_of_a_configuration_file(
    prefopt: Prefopt, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe.parent)
    Path("accelerate.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_machines: 2\nnum_processes: 4\n"
        "machine_rank: 0\nmain_process_ip: 10.0.0.1\nmain_process_port: 29500\nuse_cpu: true\n"
    )
    asked = ("launch", "skypilot", recipe.name, "launch.config=accelerate.yaml")
    assert "num_nodes: 2" in prefopt(*asked).out
    assert "launch.machines=1" in prefopt(*asked, "--nodes", "1").out
