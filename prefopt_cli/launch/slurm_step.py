"""What Slurm tells a task of a job step about itself and its like."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

REPEATED = re.compile(r"(\d+)(?:\(x(\d+)\))?")
"""Tasks of a node, and of how many nodes in a row: ``2(x3)``."""

RANGE = re.compile(r"(\d+)(?:-(\d+))?")

FIRST_PORT, PORTS = 20000, 10000
"""Ports that a job's number is spread over: below those that systems hand out to clients."""


@dataclass(frozen=True)
class SlurmStep:
    """One task within the step that ``srun`` started."""

    task: int
    """Of all, from 0."""
    tasks: int
    local_task: int
    """Of those on this node, from 0."""
    node: int
    """Of the step's, from 0."""
    tasks_of_nodes: tuple[int, ...]
    hosts: tuple[str, ...]
    port: int
    """One that other jobs on these nodes hardly choose; the next one goes with it."""

    @property
    def one_task_per_node(self) -> bool:
        """Whether several nodes have a single task each, which is to start the node's processes."""
        return len(self.tasks_of_nodes) > 1 and set(self.tasks_of_nodes) == {1}

    def worker_variables(self) -> dict[str, str]:
        """What torchrun would have set for this task."""
        return {
            "RANK": str(self.task),
            "WORLD_SIZE": str(self.tasks),
            "LOCAL_RANK": str(self.local_task),
            "LOCAL_WORLD_SIZE": str(self.tasks_of_nodes[self.node]),
            "MASTER_ADDR": self.hosts[0],
            "MASTER_PORT": str(self.port),
        }


def slurm_step(environ: Mapping[str, str]) -> SlurmStep | None:
    """The step that this process is a task of; None outside, in a batch script's own shell too.

    Slurm gives a batch script a task's number as well, but no step's; ``srun`` alone does.

    Args:
        environ: the environment's variables.
    """
    in_step = "SLURM_STEP_NUM_TASKS" in environ or "SLURM_STEP_ID" in environ
    try:
        task = int(environ["SLURM_PROCID"])
        tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"])
        hosts = tuple(expand_nodes(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]))
        layout = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or str(tasks)
        job, step = int(environ.get("SLURM_JOB_ID", "0")), environ.get("SLURM_STEP_ID", "0")
        node, local_task = int(environ.get("SLURM_NODEID", "0")), int(environ.get("SLURM_LOCALID", "0"))
    except (KeyError, ValueError):
        return None
    of_nodes = tuple(expand_counts(layout))
    if not in_step or not hosts or node >= len(of_nodes):
        return None
    # Pairs of ports: machines that wait for one another take the next one too.
    place = (job + 101 * (int(step) if step.isdigit() else 0)) * 2 % PORTS
    return SlurmStep(task, tasks, local_task, node, of_nodes, hosts, FIRST_PORT + place)


def expand_nodes(text: str) -> Iterator[str]:
    """The hosts that a list of Slurm's names: ``gpu[01-03,7],login2`` are gpu01, gpu02, gpu03, gpu7 and login2."""
    for name in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        pieces = re.split(r"\[([^\]]*)\]", name)
        choices = [[*_numbers(piece)] if index % 2 else [piece] for index, piece in enumerate(pieces)]
        yield from ("".join(chosen) for chosen in product(*choices))


def _numbers(text: str) -> Iterator[str]:
    for first, last in RANGE.findall(text):
        for number in range(int(first), int(last or first) + 1):
            yield str(number).zfill(len(first))


def expand_counts(text: str) -> Iterator[int]:
    """How many tasks each node has: ``2(x3),1`` are 2, 2, 2 and 1."""
    for count, times in REPEATED.findall(text):
        yield from [int(count)] * int(times or 1)
