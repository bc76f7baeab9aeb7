"""From the section `launch` to torchrun's command line and accelerate's variables."""

from pathlib import Path
from typing import Any

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.launch import plan as planning
from prefopt_cli.launch.addresses import INTERFACES, is_loopback, is_own_address
from prefopt_cli.launch.plan import LaunchPlan, as_machine, plan_launch
from prefopt_cli.recipe.launch_settings import LaunchSettings

ARGUMENTS = ["train", "my recipe.yaml", "training.seed=1"]

SLURM = {
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
"""Of the task on the second of two nodes."""


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


def names(plan: LaunchPlan) -> set[str]:
    return set(INTERFACES) & set(plan.environment)


@pytest.mark.parametrize("rank", [0, 1])
def test_several_machines_never_meet_by_loopback(rank: int) -> None:
    """Machine 0's name may resolve to it on machine 0; once the machines have met, each knows its own address."""
    found = made(machines=2, machine_rank=rank, rendezvous="127.0.0.1:29555")
    assert (names(found), found.interface_open) == (set(), True)
    repaired = as_machine(found, "127.0.0.1")
    assert repaired.environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert not repaired.interface_open


@pytest.mark.parametrize(
    ("rank", "own", "environ", "known"),
    [
        (0, True, {}, True),
        (0, False, {}, False),  # it is printed for machine 0 elsewhere
        (1, True, {}, False),
        (1, False, {}, False),
        (1, False, SLURM, True),
        (0, False, SLURM, False),
    ],
)
def test_an_interface_is_named_only_of_the_machine_that_is_meant(
    rank: int, own: bool, environ: dict[str, str], known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gloo would otherwise take the address that the machine's name resolves to."""
    monkeypatch.setattr(planning, "own_address_towards", lambda *_: "10.9.8.7")
    monkeypatch.setattr(planning, "is_own_address", lambda *_: own)
    monkeypatch.setattr(planning, "interface_variables", lambda _: dict.fromkeys(INTERFACES, "eth7"))
    asked = {"machines": 2, "machine_rank": rank, "rendezvous": "10.9.8.1:29555"}
    found = made(environ, **asked)
    assert names(found) == (set(INTERFACES) if known else set())
    assert found.interface_open is not known
    given = made({**environ, "GLOO_SOCKET_IFNAME": "ib0"}, **asked)
    assert "GLOO_SOCKET_IFNAME" not in given.environment


def test_own_addresses() -> None:
    assert is_own_address("127.0.0.1", 29500)
    assert not is_own_address("no-such-host.invalid", 29500)
    assert not is_own_address("192.0.2.1", 29500)
    for address in ("127.0.1.1", "::1", "::ffff:127.0.0.1"):
        assert is_loopback(address)
    for another in ("10.0.0.1", "fe80::1%eth0", None):
        assert not is_loopback(another)


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
    for processes in (1, "auto"):
        with pytest.raises(UserError, match="shards a model over several processes, and there is one"):
            plan(engine="fsdp", processes=processes)


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
