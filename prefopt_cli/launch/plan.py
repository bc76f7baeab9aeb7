"""What starts a recipe's processes: torchrun's command line and its environment."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.launch.accelerate_file import AccelerateFile, read_accelerate_file
from prefopt_cli.launch.addresses import interface_variables, own_address_towards, split_endpoint
from prefopt_cli.launch.devices import count_accelerators, count_cores, may_have_accelerator
from prefopt_cli.launch.engine_variables import chosen, engine_variables
from prefopt_cli.launch.environment import with_slurm
from prefopt_cli.recipe.launch_settings import LaunchSettings

TORCHRUN = "torch.distributed.run"


@dataclass(frozen=True)
class LaunchPlan:
    """One machine's part in starting a command in several processes."""

    arguments: tuple[str, ...]
    """prefopt's, as each process gets them."""
    environment: dict[str, str]
    """What is set for the processes, beside what is there."""
    processes: int
    """On this machine."""
    engine: str = "ddp"
    machines: int = 1
    machine_rank: int = 0
    rendezvous: str | None = None
    """host:port of machine 0's store, of several machines."""
    timeout: int = 300
    torchrun: tuple[str, ...] = field(default=())
    """Its options."""

    @property
    def command(self) -> list[str]:
        """The command line, which can be run as it is."""
        return [sys.executable, "-m", TORCHRUN, *self.torchrun, "-m", "prefopt_cli", *self.arguments]

    def shell(self) -> str:
        """Environment and command as one line for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.command)])

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "command": self.command,
            "environment": self.environment,
            "processes": self.processes,
            "engine": self.engine,
            "machines": self.machines,
            "machine_rank": self.machine_rank,
            "rendezvous": self.rendezvous,
        }


def plan_launch(
    settings: LaunchSettings,
    arguments: Sequence[str],
    *,
    use_cpu: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> LaunchPlan | None:
    """Plan how a command's processes are started here.

    Args:
        settings: the recipe's.
        arguments: of prefopt, beginning with the command.
        use_cpu: whether the recipe keeps off accelerators.
        environ: the environment's variables; what the user has set there stays.

    Returns:
        The plan; None where one process does, without a launcher.

    Raises:
        UserError: the settings contradict `launch.config` or this machine.
    """
    settings = with_slurm(settings, environ)
    settings, variables = _with_config(settings)
    variables |= chosen(settings.engine)
    processes = _count(settings, use_cpu=use_cpu)
    alone = processes == 1 and settings.machines == 1
    if alone and settings.engine == "ddp" and settings.config is None:
        return None
    if use_cpu or not may_have_accelerator():
        variables["ACCELERATE_USE_CPU"] = "true"
    variables["OMP_NUM_THREADS"] = str(max(1, count_cores() // processes))
    if settings.machines > 1:
        host, port = split_endpoint(_meeting_place(settings))
        variables |= interface_variables(own_address_towards(host, port))
    given = {name for name in variables if name in environ and name.endswith(("_THREADS", "_IFNAME"))}
    return LaunchPlan(
        arguments=tuple(arguments),
        environment={name: value for name, value in sorted(variables.items()) if name not in given},
        processes=processes,
        engine=settings.engine,
        machines=settings.machines,
        machine_rank=settings.machine_rank,
        rendezvous=settings.rendezvous if settings.machines > 1 else None,
        timeout=settings.timeout,
        torchrun=_torchrun_options(settings, processes),
    )


def _count(settings: LaunchSettings, *, use_cpu: bool) -> int:
    """Processes on this machine."""
    if isinstance(settings.processes, int):
        return settings.processes
    return 1 if use_cpu else max(1, count_accelerators())


def _torchrun_options(settings: LaunchSettings, processes: int) -> tuple[str, ...]:
    each = ("--nproc-per-node", str(processes))
    if settings.machines == 1:
        # On a port of its own choice, and without asking what this machine's name resolves to.
        return ("--standalone", "--local-addr", "127.0.0.1", *each)
    host, port = split_endpoint(_meeting_place(settings))
    return (
        *("--nnodes", str(settings.machines), "--node-rank", str(settings.machine_rank), *each),
        *("--master-addr", host, "--master-port", str(port)),
        *("--rdzv-backend", "static", "--rdzv-conf", f"timeout={settings.timeout}"),
    )


def _meeting_place(settings: LaunchSettings) -> str:
    if settings.rendezvous is None:
        raise UserError(
            "launch.machines: several machines must know where to meet; add launch.rendezvous: HOST:PORT of machine 0"
        )
    return settings.rendezvous


def _with_config(settings: LaunchSettings) -> tuple[LaunchSettings, dict[str, str]]:
    """The settings, with what `launch.config` says where they say nothing; and the engine's variables."""
    if settings.config is None:
        return settings, engine_variables(settings)
    path = Path(settings.config).expanduser()
    if path.is_dir():
        raise UserError(f"launch.config: {path} is a folder; name the file in it.")
    if not path.is_file():
        raise UserError(f"launch.config: there is no file {path}.")
    if path.suffix == ".json":
        if settings.engine != "deepspeed":
            raise UserError(
                f"launch.config: {path} is taken for DeepSpeed's (JSON), and the engine is {settings.engine}; add "
                "launch.engine: deepspeed, or give an accelerate configuration (YAML)."
            )
        settings = settings.model_copy(update={"config": str(path.resolve())})
        return settings, engine_variables(settings)
    found = read_accelerate_file(str(path))
    _require_agreement(settings, found, path)
    update: dict[str, Any] = {"engine": found.engine}
    if settings.processes == 1:
        update["processes"] = found.processes
    if settings.machines == 1 and found.machines > 1:
        update |= {
            "machines": found.machines,
            "machine_rank": settings.machine_rank or found.machine_rank,
            "rendezvous": settings.rendezvous or found.rendezvous,
        }
    return settings.model_copy(update=update), found.variables


def _require_agreement(settings: LaunchSettings, found: AccelerateFile, path: Path) -> None:
    if settings.engine not in ("ddp", found.engine):
        raise UserError(
            f"launch.engine: {settings.engine}, but {path} (launch.config) asks for {found.engine}; leave the engine "
            "out, or change the file."
        )


def as_machine(plan: LaunchPlan, address: str | None) -> LaunchPlan:
    """The plan with this machine's own address as the other machines know it, where the user has not named one."""
    found = {name: value for name, value in interface_variables(address).items() if name not in os.environ}
    return replace(plan, environment={**plan.environment, **found})
