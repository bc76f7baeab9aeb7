"""Who started this process, and what it is to make of that. Reads variables; touches nothing else."""

import os
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING

from prefopt_cli.errors import UserError
from prefopt_cli.launch.mpi_task import by_mpi, mpi_task
from prefopt_cli.launch.slurm_step import SlurmStep, slurm_step
from prefopt_cli.launch.variables import FOLDER

if TYPE_CHECKING:
    from prefopt_cli.recipe.launch_settings import LaunchSettings

NUMBERS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
"""Variables by which launchers tell a process which it is, and the least that each may be."""


def started_by(environ: Mapping[str, str] = os.environ) -> str | None:
    """What started this process as one of several, or as the only one of a launcher's; None: nobody did.

    A process that something started must not start processes again. A task of Slurm that is alone on its node is
    nobody's: it is to start the node's processes.

    Returns:
        "prefopt", "torchrun", "accelerate", "MPI", "Slurm", or None.

    Raises:
        UserError: a launcher's variable is no number.
    """
    _require_numbers(environ)
    if FOLDER in environ:
        return "prefopt"
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environ  # which it always sets, for one process too
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return "accelerate" if by_accelerate else "torchrun"
    if by_accelerate:
        return "accelerate"
    if by_mpi(environ):
        return "MPI"
    step = slurm_step(environ)
    return "Slurm" if step is not None and step.tasks > 1 and not step.one_task_per_node else None


def adopt_task(environ: MutableMapping[str, str] = os.environ) -> None:
    """In a task of several that ``mpirun`` or ``srun`` started, set what torchrun would have; elsewhere nothing.

    Raises:
        UserError: a launcher's variable is no number, or MPI's tasks do not know where to meet.
    """
    _require_numbers(environ)
    if "RANK" in environ or FOLDER in environ:
        return
    task, step = mpi_task(environ), slurm_step(environ)
    found: dict[str, str] = {}
    if task is not None:
        found = task.worker_variables(environ)
    elif step is not None and step.tasks > 1:
        found = step.worker_variables()
    for name, value in found.items():
        environ.setdefault(name, value)


def _require_numbers(environ: Mapping[str, str]) -> None:
    for name, least in NUMBERS.items():
        text = environ.get(name)
        if text is not None and not (text.isdecimal() and int(text) >= least):
            raise UserError(
                f"{name} is {text!r} in the environment, where launchers such as torchrun put a whole number from "
                f"{least} on: unset {name}, or correct it."
            )


def with_slurm(settings: "LaunchSettings", environ: Mapping[str, str] = os.environ) -> "LaunchSettings":
    """The settings with machines, rank and rendezvous from Slurm, where each node has one task.

    Settings that name a rendezvous, or another rank than Slurm's, stay as they are.

    Raises:
        UserError: they ask for another number of machines than the step has nodes.
    """
    step = slurm_step(environ)
    if step is None or settings.rendezvous is not None:
        return settings
    _require_nodes(settings, step)
    if not step.one_task_per_node or settings.machine_rank not in (0, step.node):
        return settings
    if settings.machines == 1 and settings.machine_rank > 0:  # of the machines in launch.config
        return settings
    found = {
        "machines": step.tasks,
        "machine_rank": step.node,
        "rendezvous": f"{step.hosts[0]}:{step.port}",
    }
    return settings.model_copy(update=found)


def _require_nodes(settings: "LaunchSettings", step: SlurmStep) -> None:
    """Refuse several machines that are not those of the step, one task on each."""
    if settings.machines in (1, step.tasks):
        return
    if step.one_task_per_node or step.tasks == 1:
        nodes = f"{step.tasks} node{'s' if step.tasks > 1 else ''}"
        raise UserError(
            f"launch.machines: {settings.machines}, but srun started a task on {nodes}. Leave launch.machines out, "
            f"as Slurm says how many there are; or ask for them: srun --nodes={settings.machines} "
            f"--ntasks-per-node=1."
        )
