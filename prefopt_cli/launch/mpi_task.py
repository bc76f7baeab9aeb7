"""What MPI's launchers tell a process about itself and its like."""

from collections.abc import Mapping
from dataclasses import dataclass

from prefopt_cli.errors import UserError
from prefopt_cli.launch.slurm_step import slurm_step

PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
NAMES = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    PMI,
)
"""Rank and number of all processes, and of those on this machine, as Open MPI, MVAPICH and MPICH (Intel) call them."""

PORT = 29500
"""Torch's own choice."""


@dataclass(frozen=True)
class MpiTask:
    """One process of several."""

    rank: int
    processes: int
    local_rank: int
    local_processes: int

    def worker_variables(self, environ: Mapping[str, str]) -> dict[str, str]:
        """What torchrun would have set for this process.

        Args:
            environ: the environment's variables.

        Raises:
            UserError: there are several machines, and nothing says where their processes meet.
        """
        if "MASTER_ADDR" not in environ and self.local_processes < self.processes:
            raise UserError(
                "MASTER_ADDR is not set: MPI's processes on several machines must be told where to meet. Give mpirun "
                "the name of the first machine, as in -x MASTER_ADDR=HOST (Open MPI) or -genv MASTER_ADDR HOST."
            )
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.processes),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(PORT),
        }


def by_mpi(environ: Mapping[str, str]) -> bool:
    """Whether MPI started this process as one of several.

    Args:
        environ: the environment's variables.
    """
    return _names(environ) is not None


def mpi_task(environ: Mapping[str, str]) -> MpiTask | None:
    """The task of MPI's that this process is; None outside, and where it is the only one.

    Args:
        environ: the environment's variables.

    Raises:
        UserError: they do not say which of how many this process is, or which on this machine.
    """
    names = _names(environ)
    if names is None:
        return None
    found = [environ.get(name, "") for name in names]
    lacking = [name for name, text in zip(names, found, strict=True) if not text.isdecimal()]
    if lacking:
        raise UserError(
            f"{names[1]} says that MPI started this process as one of several, but {' and '.join(lacking)} is no "
            "number. Start them by torchrun, or by mpirun of Open MPI, MVAPICH or Intel MPI."
        )
    return MpiTask(*map(int, found))


def _names(environ: Mapping[str, str]) -> tuple[str, str, str, str] | None:
    """The variables in which the launcher at work speaks."""
    for names in NAMES:
        if environ.get(names[1], "1") not in ("0", "1") and not (names is PMI and _by_srun(environ)):
            return names
    return None


def _by_srun(environ: Mapping[str, str]) -> bool:
    """Whether it is Slurm that says so, which speaks PMI where a cluster's default is that."""
    step = slurm_step(environ)
    return step is not None and environ.get("PMI_SIZE") == str(step.tasks)
