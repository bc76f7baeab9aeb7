"""Who started this process, and what it is to make of that. Reads variables; touches nothing else."""

import os
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING

from prefopt_cli.launch.slurm_step import slurm_step
from prefopt_cli.launch.variables import FOLDER

if TYPE_CHECKING:
    from prefopt_cli.recipe.launch_settings import LaunchSettings

MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where MPI's launchers say how many processes there are."""


def started_by(environ: Mapping[str, str] = os.environ) -> str | None:
    """What started this process as one of several, or as the only one of a launcher's; None: nobody did.

    A process that something started must not start processes again. A task of Slurm that is alone on its node is
    nobody's: it is to start the node's processes.

    Returns:
        "prefopt", "torchrun", "accelerate", "MPI", "Slurm", or None.
    """
    if FOLDER in environ:
        return "prefopt"
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in environ  # which it always sets, for one process too
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return "accelerate" if by_accelerate else "torchrun"
    if by_accelerate:
        return "accelerate"
    if any(environ.get(name, "1") not in ("0", "1") for name in MPI):
        return "MPI"
    step = slurm_step(environ)
    return "Slurm" if step is not None and step.tasks > 1 and not step.one_task_per_node else None


def adopt_slurm(environ: MutableMapping[str, str] = os.environ) -> None:
    """In a task of several that ``srun`` started, set what torchrun would have; elsewhere nothing."""
    step = slurm_step(environ)
    if step is None or step.tasks < 2 or "RANK" in environ or FOLDER in environ:
        return
    for name, value in step.worker_variables().items():
        environ.setdefault(name, value)


def with_slurm(settings: "LaunchSettings", environ: Mapping[str, str] = os.environ) -> "LaunchSettings":
    """The settings with machines and rendezvous from Slurm, where each node has one task and they say nothing."""
    step = slurm_step(environ)
    silent = settings.machines == 1 and settings.machine_rank == 0 and settings.rendezvous is None
    if step is None or not step.one_task_per_node or not silent:
        return settings
    found = {
        "machines": step.tasks,
        "machine_rank": step.node,
        "rendezvous": f"{step.hosts[0]}:{step.port}",
    }
    return settings.model_copy(update=found)
