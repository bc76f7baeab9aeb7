"""From the section `launch` to torchrun's command line and accelerate's variables."""

from pathlib import Path
from typing import Any

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.launch import plan as planning
from prefopt_cli.launch.plan import LaunchPlan, plan_launch
from prefopt_cli.recipe.launch_settings import LaunchSettings

ARGUMENTS = ["train", "my recipe.yaml", "training.seed=1"]


def plan(environ: dict[str, str] | None = None, **settings: Any) -> LaunchPlan | None:
    return plan_launch(LaunchSettings(**settings), ARGUMENTS, use_cpu=True, environ=environ or {})


def made(environ: dict[str, str] | None = None, **settings: Any) -> LaunchPlan:
    found = plan(environ, **settings)
    assert found is not None
    return found


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "count_accelerators", lambda: 4)
    monkeypatch.setattr(planning, "may_have_accelerator", lambda: True)


def test_one_process_needs_no_launcher() -> None:
    assert plan() is None
    assert plan(processes="auto") is None


def test_processes_on_one_machine() -> None:
    found = made(processes=2)
    assert found.command[1:] == [
        *(
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--local-addr",
            "127.0.0.1",
            "--nproc-per-node",
            "2",
        ),
        *("-m", "prefopt_cli", *ARGUMENTS),
    ]
    assert found.environment["ACCELERATE_USE_CPU"] == "true"
    assert int(found.environment["OMP_NUM_THREADS"]) >= 1
    assert found.shell().endswith("train 'my recipe.yaml' training.seed=1")


def test_threads_that_the_user_has_chosen_stay() -> None:
    assert "OMP_NUM_THREADS" not in made({"OMP_NUM_THREADS": "3"}, processes=2).environment


@pytest.mark.usefixtures("four_gpus")
def test_auto_is_one_process_for_every_gpu() -> None:
    found = plan_launch(LaunchSettings(processes="auto"), ARGUMENTS, environ={})
    assert found is not None
    assert found.processes == 4
    assert "ACCELERATE_USE_CPU" not in found.environment
    assert plan(processes="auto") is None  # use_cpu


def test_machines_meet_where_the_recipe_says() -> None:
    found = made(processes=2, machines=3, machine_rank=1, rendezvous="127.0.0.1:29555", timeout=90)
    words = " ".join(found.command)
    assert "--nnodes 3 --node-rank 1 --nproc-per-node 2 --master-addr 127.0.0.1 --master-port 29555" in words
    assert "--rdzv-backend static --rdzv-conf timeout=90" in words
    # gloo would otherwise take the address that the machine's name resolves to.
    assert found.environment["GLOO_SOCKET_IFNAME"] == "lo"
    given = made({"GLOO_SOCKET_IFNAME": "ib0"}, machines=2, rendezvous="127.0.0.1:29555")
    assert "GLOO_SOCKET_IFNAME" not in given.environment


def test_fsdp() -> None:
    found = made(processes=2, engine="fsdp", reshard_after_forward=False).environment
    assert found["ACCELERATE_USE_FSDP"] == "true"
    assert found["FSDP_VERSION"] == "2"
    assert found["FSDP_RESHARD_AFTER_FORWARD"] == "false"
    assert found["FSDP_OFFLOAD_PARAMS"] == "false"
    assert found["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"


def test_deepspeed(tmp_path: Path) -> None:
    found = made(processes=2, engine="deepspeed", zero_stage=3, cpu_offload=True).environment
    assert found["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert found["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert found["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] == "cpu"
    own = tmp_path / "ds.json"
    own.write_text("{}")
    raw = made(processes=2, engine="deepspeed", config=str(own)).environment
    assert raw["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == str(own)
    assert "ACCELERATE_DEEPSPEED_ZERO_STAGE" not in raw
    assert made(processes=2, engine="deepspeed").environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == "none"
    with pytest.raises(UserError, match=r"launch\.engine: deepspeed"):
        plan(processes=2, config=str(own))


def test_an_engine_is_launched_for_one_process_too() -> None:
    assert made(engine="deepspeed").processes == 1


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        plan(processes=2, config=str(tmp_path / "none.yaml"))
    with pytest.raises(UserError, match="is a folder"):
        plan(processes=2, config=str(tmp_path))


@pytest.mark.parametrize("engine", ["ddp", "fsdp", "deepspeed"])
def test_what_a_shell_has_exported_does_not_choose_the_engine(engine: str) -> None:
    stale = {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "true"}
    environment = {**stale, **made(stale, processes=2, engine=engine).environment}
    assert {name: environment[name] for name in stale} == {
        "ACCELERATE_USE_FSDP": str(engine == "fsdp").lower(),
        "ACCELERATE_USE_DEEPSPEED": str(engine == "deepspeed").lower(),
    }
