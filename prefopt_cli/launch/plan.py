"""What starts a recipe's processes: torchrun's command line and its environment."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from prefopt_cli.errors import UserError
from prefopt_cli.launch.addresses import (
    INTERFACES,
    interface_variables,
    is_loopback,
    is_own_address,
    own_address_towards,
    split_endpoint,
)
from prefopt_cli.launch.devices import count_accelerators, count_cores, may_have_accelerator
from prefopt_cli.launch.engine_variables import chosen
from prefopt_cli.launch.resolving import NO_MEETING_PLACE, ONE_PROCESS, resolve_launch
from prefopt_cli.launch.slurm_step import slurm_step
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

    @property
    def interface_open(self) -> bool:
        """Whether `prefopt train` is still to find the network interface by which this machine meets the others."""
        return self.machines > 1 and not any(name in self.environment for name in INTERFACES)

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
    with_file = settings.config is not None
    resolved = resolve_launch(settings, environ)
    settings = resolved.settings
    variables = {**resolved.variables, **chosen(settings.engine)}
    processes = _count(settings, use_cpu=use_cpu)
    if processes == 1 and settings.machines == 1:
        if settings.engine == "ddp" and not with_file:
            return None
        if settings.engine == "fsdp":
            raise UserError(ONE_PROCESS)
    if use_cpu or not may_have_accelerator():
        variables["ACCELERATE_USE_CPU"] = "true"
    variables["OMP_NUM_THREADS"] = str(max(1, count_cores() // processes))
    if settings.machines > 1:
        variables |= _own_interface(settings, environ)
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
        raise UserError(NO_MEETING_PLACE)
    return settings.rendezvous


def _own_interface(settings: LaunchSettings, environ: Mapping[str, str]) -> dict[str, str]:
    """What binds gloo and NCCL to the way to machine 0, where this is certainly the machine that the plan is for.

    Elsewhere they are left to `as_machine`: a plan may be printed for another machine, and by the loopback interface,
    which machine 0's name may resolve to on machine 0 itself, no other machine is reached.
    """
    host, port = split_endpoint(_meeting_place(settings))
    address = own_address_towards(host, port)
    step = slurm_step(environ)
    by_slurm = step is not None and step.one_task_per_node and step.node == settings.machine_rank
    known = by_slurm or (settings.machine_rank == 0 and is_own_address(host, port))
    return interface_variables(address) if known and not is_loopback(address) else {}


def as_machine(plan: LaunchPlan, address: str | None) -> LaunchPlan:
    """The plan with this machine's own address as the other machines know it, where the user has not named one."""
    found = {name: value for name, value in interface_variables(address).items() if name not in os.environ}
    return replace(plan, environment={**plan.environment, **found})
