"""Who started a process, judged by environments as the launchers really make them."""

import os

import pytest

from prefopt_cli.cli import common
from prefopt_cli.errors import UserError
from prefopt_cli.launch.environment import adopt_task, started_by, with_slurm
from prefopt_cli.launch.slurm_step import expand_counts, expand_nodes, slurm_step
from prefopt_cli.recipe.launch_settings import LaunchSettings

TORCHRUN = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "GROUP_RANK": "0",
}

JOB = {
    "SLURM_JOB_ID": "4182337",
    "SLURM_JOBID": "4182337",
    "SLURM_JOB_NAME": "gpo",
    "SLURM_JOB_NODELIST": "gpu[09-10]",
    "SLURM_NODELIST": "gpu[09-10]",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_CLUSTER_NAME": "cluster",
}

BATCH = {
    **JOB,
    "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
"""The shell of a batch script: it has a task's number too, and no step."""

A_TASK_PER_GPU = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[09-10]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_SRUN_COMM_HOST": "10.2.0.9",
}

A_TASK_PER_NODE = {
    **JOB,
    "SLURM_NTASKS": "2",
    "SLURM_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NODELIST": "gpu[09-10]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize(
    ("environment", "starter"),
    [
        ({}, None),
        (TORCHRUN, "torchrun"),
        ({**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}, "accelerate"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "False"}, "accelerate"),  # one process
        ({**TORCHRUN, "PREFOPT_LAUNCH": "/tmp/somewhere"}, "prefopt"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        # mpirun within a job of Slurm's: its own helpers are the step's tasks, one on each node.
        ({**A_TASK_PER_NODE, "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5"}, "MPI"),
        # srun speaks PMI itself.
        ({**A_TASK_PER_NODE, "PMI_RANK": "1", "PMI_SIZE": "2"}, None),
        ({**A_TASK_PER_GPU, "PMI_RANK": "5", "PMI_SIZE": "8"}, "Slurm"),
        (BATCH, None),
        (A_TASK_PER_GPU, "Slurm"),
        (A_TASK_PER_NODE, None),
        ({**A_TASK_PER_NODE, **TORCHRUN}, "torchrun"),
    ],
)
def test_who_started_it(environment: dict[str, str], starter: str | None) -> None:
    assert started_by(environment) == starter


def test_a_task_of_slurm_learns_what_torchrun_would_have_told_it() -> None:
    environment = dict(A_TASK_PER_GPU)
    adopt_task(environment)
    assert {name: value for name, value in environment.items() if not name.startswith("SLURM")} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu09",
        "MASTER_PORT": str(20000 + 4182337 * 2 % 10000),
    }
    other = {**A_TASK_PER_GPU, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    adopt_task(other)
    assert other["MASTER_PORT"] == environment["MASTER_PORT"]


@pytest.mark.parametrize("environment", [{}, BATCH, {**A_TASK_PER_GPU, "RANK": "3"}])
def test_others_learn_nothing_from_slurm(environment: dict[str, str]) -> None:
    changed = dict(environment)
    adopt_task(changed)
    assert changed == environment


def test_machines_of_slurm() -> None:
    found = with_slurm(LaunchSettings(processes=4), A_TASK_PER_NODE)
    assert (found.processes, found.machines, found.machine_rank) == (4, 2, 1)
    step = slurm_step(A_TASK_PER_NODE)
    assert step is not None
    assert found.rendezvous == f"gpu09:{step.port}"
    assert step.port % 2 == 0  # the next one is taken too
    assert 20000 <= step.port < 30000


@pytest.mark.parametrize("said", [{"machines": 2}, {"machines": 2, "machine_rank": 1}])
def test_slurm_knows_where_the_machines_of_a_recipe_meet(said: dict[str, int]) -> None:
    found = with_slurm(LaunchSettings(**said), A_TASK_PER_NODE)  # type: ignore[arg-type]
    assert found == with_slurm(LaunchSettings(), A_TASK_PER_NODE)
    assert (found.machines, found.machine_rank, str(found.rendezvous)[:6]) == (2, 1, "gpu09:")


@pytest.mark.parametrize(
    "said",
    [
        {"machines": 2, "machine_rank": 1, "rendezvous": "10.0.0.1:29500"},
        {"machines": 4, "machine_rank": 3, "rendezvous": "10.0.0.1:29500"},
    ],
)
def test_what_the_recipe_says_of_machines_counts(said: dict[str, object]) -> None:
    settings = LaunchSettings(**said)  # type: ignore[arg-type]
    assert with_slurm(settings, A_TASK_PER_NODE) is settings


def test_another_rank_than_slurms_needs_a_rendezvous_of_its_own() -> None:
    settings = LaunchSettings(machines=2, machine_rank=1)
    first = {**A_TASK_PER_NODE, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    assert with_slurm(settings, first) is settings


ALONE = {
    **A_TASK_PER_NODE,
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
}


@pytest.mark.parametrize(
    ("environment", "machines", "nodes"),
    [(A_TASK_PER_NODE, 3, "2 nodes"), (ALONE, 2, "1 node")],
)
def test_other_machines_than_slurms_are_refused(
    environment: dict[str, str], machines: int, nodes: str
) -> None:
    with pytest.raises(UserError) as raised:
        with_slurm(LaunchSettings(machines=machines), environment)
    assert str(raised.value).startswith(f"launch.machines: {machines}, but srun started a task on {nodes}.")
    assert f"srun --nodes={machines} --ntasks-per-node=1" in str(raised.value)


@pytest.mark.parametrize("environment", [{}, BATCH])
def test_without_a_step_nothing_is_known_of_the_machines(environment: dict[str, str]) -> None:
    settings = LaunchSettings(machines=2)
    assert with_slurm(settings, environment) is settings


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu[01-03,7],login2", ["gpu01", "gpu02", "gpu03", "gpu7", "login2"]),
        ("a", ["a"]),
        ("node-1.cluster,node-2.cluster", ["node-1.cluster", "node-2.cluster"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("rack[1-2]n[1,3]", ["rack1n1", "rack1n3", "rack2n1", "rack2n3"]),
        ("c[1-2]-ib,d5", ["c1-ib", "c2-ib", "d5"]),
    ],
)
def test_lists_of_nodes(text: str, hosts: list[str]) -> None:
    assert [*expand_nodes(text)] == hosts


def test_tasks_of_nodes() -> None:
    assert [*expand_counts("2(x3),1")] == [2, 2, 2, 1]
    assert [*expand_counts("4")] == [4]


def test_an_incomplete_environment_is_no_step() -> None:
    assert slurm_step({"SLURM_PROCID": "1", "SLURM_STEP_ID": "0"}) is None
    assert slurm_step({**A_TASK_PER_GPU, "SLURM_STEP_NUM_TASKS": "many"}) is None


MPI = {
    "Open MPI": {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "PMIX_RANK": "1",
    },
    "MVAPICH": {
        "MV2_COMM_WORLD_RANK": "1",
        "MV2_COMM_WORLD_SIZE": "2",
        "MV2_COMM_WORLD_LOCAL_RANK": "1",
        "MV2_COMM_WORLD_LOCAL_SIZE": "2",
    },
    "MPICH": {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
}


@pytest.mark.parametrize("variables", MPI.values(), ids=MPI)
def test_a_process_of_mpi_learns_what_torchrun_would_have_told_it(variables: dict[str, str]) -> None:
    environment = dict(variables)
    assert started_by(environment) == "MPI"
    adopt_task(environment)
    assert {name: value for name, value in environment.items() if name not in variables} == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


def test_processes_of_mpi_on_several_machines_must_be_told_where_to_meet() -> None:
    apart = {**MPI["Open MPI"], "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        adopt_task(apart)
    apart["MASTER_ADDR"] = "gpu09"
    adopt_task(apart)
    assert (apart["MASTER_ADDR"], apart["RANK"], apart["LOCAL_RANK"]) == ("gpu09", "1", "0")


def test_an_mpi_that_does_not_say_who_is_who() -> None:
    with pytest.raises(
        UserError, match=r"PMI_SIZE says .* but MPI_LOCALRANKID and MPI_LOCALNRANKS is no number"
    ):
        adopt_task({"PMI_SIZE": "2", "PMI_RANK": "0"})


@pytest.mark.parametrize(("rank", "speaks"), [("0", True), ("1", False)])
def test_one_process_of_mpi_speaks(rank: str, speaks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that all are as before afterwards
        del os.environ[name]
    for name, value in {**MPI["Open MPI"], "OMPI_COMM_WORLD_RANK": rank}.items():
        monkeypatch.setenv(name, value)
    assert common.main_process() is speaks
    assert common.several_processes()


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "x"), ("RANK", "-1"), ("WORLD_SIZE", "two"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "")],
)
def test_a_variable_that_is_no_number_is_named(name: str, value: str) -> None:
    for judge in (started_by, adopt_task):
        with pytest.raises(UserError, match=f"^{name} is '{value}' in the environment"):
            judge({**TORCHRUN, name: value})
