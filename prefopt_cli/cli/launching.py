"""How `train` and `chain` start their processes, and what they make of how these end."""

import hashlib
import json
import shlex
import socket
import time
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from prefopt_cli.cli.common import SIGNAL_EXIT_BASE
from prefopt_cli.errors import PrefoptError
from prefopt_cli.launch.environment import started_by
from prefopt_cli.launch.worker import launched

if TYPE_CHECKING:
    from prefopt_cli.launch.ending import Ending
    from prefopt_cli.launch.meeting import Meeting
    from prefopt_cli.launch.plan import LaunchPlan
    from prefopt_cli.launch.supervise import Ended
    from prefopt_cli.recipe.launch_settings import LaunchSettings

OF_A_MACHINE = ("machine_rank", "rendezvous")
"""Settings of `launch` in which machines of one run may differ."""


@dataclass(frozen=True)
class Job:
    """A command that may want several processes."""

    settings: "LaunchSettings"
    arguments: list[str]
    """Of prefopt, for each process."""
    output_dir: str
    use_cpu: bool
    content: Any
    """What the command is about, in JSON's terms: all machines must have been given the same."""
    again: str
    """The command line that goes on with it."""


def in_processes(job: Job, *, debug: bool) -> None:
    """Do the command in the processes that its recipe asks for, and end with them.

    Returns at once where this process is to do the work: it is one of several that a launcher started, or one is
    enough.

    Raises:
        UserError, PrefoptError: what went wrong in them first.
        typer.Exit: they are done, or a signal stopped them.
    """
    if started_by() is not None:
        from prefopt_cli.launch.resolving import adopt_engine

        adopt_engine(job.settings)
        return
    from prefopt_cli.launch.plan import plan_launch

    plan = plan_launch(job.settings, job.arguments, use_cpu=job.use_cpu)
    if plan is None:
        return
    from prefopt_cli.launch.supervise import raise_ended, supervise

    if plan.processes > 1:
        _tell(f"Starting {plan.processes} processes ({plan.engine}).")
    begun = time.time()
    ended = supervise(plan, told=_tell, debug=debug, meeting=_meeting(plan, job))
    ending = ended.ending
    if ended.message is not None:
        if plan.machine_rank == 0:
            _write_down(Path(job.output_dir).expanduser(), ended, since=begun)
        raise_ended(replace(ended, message=_with_hints(ended, plan, job)))
    if plan.machine_rank > 0:
        _tell(_done_elsewhere(ending))
    raise typer.Exit(0 if ending.signal is None else SIGNAL_EXIT_BASE + ending.signal)


def exit_code(signal: int | None) -> int:
    """Of a command that a signal may have stopped gently.

    To prefopt's launcher a gentle stop is a success: others would make torchrun end the processes that still write.
    """
    return 0 if signal is None or launched() else SIGNAL_EXIT_BASE + signal


def command_again(command: str, file: str, overrides: list[str], options: list[str]) -> str:
    """The command line that goes on with what is being done, in the way in which it was started."""
    import os

    # Under torchrun, each process sees how many there are.
    by_torchrun = [
        "torchrun",
        "--nproc-per-node",
        os.environ.get("LOCAL_WORLD_SIZE", "1"),
        "-m",
        "prefopt_cli",
    ]
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    program = by_torchrun if several and not launched() and "SLURM_STEP_ID" not in os.environ else ["prefopt"]
    return shlex.join([*program, command, file, *overrides, *options])


def _tell(message: str) -> None:
    typer.echo(message, err=True)


def _write_down(folder: Path, ended: "Ended", *, since: float) -> None:
    """Let what was begun since then say how it ended: its main process was killed, or only lost another."""
    from prefopt_cli.launch.failures import INTERRUPTIONS
    from prefopt_cli.runs.closing import close

    if ended.ending.exit_code in INTERRUPTIONS:
        close(folder, "interrupted", None, since=since)
    elif ended.ending.exit_code == PrefoptError.exit_code:
        close(folder, "failed", ended.message, since=since)


def _done_elsewhere(ending: "Ending") -> str:
    return (
        "Done: machine 0 tells what came of it."
        if ending.signal is None
        else "Stopped: machine 0 tells where."
    )


def _with_hints(ended: "Ended", plan: "LaunchPlan", job: Job) -> str:
    from prefopt_cli.launch.failures import INTERRUPTIONS, MISTAKE
    from prefopt_cli.launch.processes import last_lines

    words = str(ended.message)
    if ended.output is not None:
        for path, lines in last_lines(ended.output):
            words += f"\nLast lines of {path}:\n{lines}"
    failure = ended.ending.failure
    explained = failure is not None and failure.kind == "error" and plan.machines == 1
    going_on = _going_on(Path(job.output_dir).expanduser())
    if going_on and not explained and ended.ending.exit_code not in (MISTAKE, *INTERRUPTIONS):
        everywhere = ", on every machine with its launch.machine_rank" if plan.machines > 1 else ""
        words += f"\n{going_on}{everywhere}:\n  {job.again}"
    return words


def _going_on(folder: Path) -> str | None:
    """What the command that goes on with a run or a chain does; None where neither has begun."""
    from prefopt_cli.runs.folder import RunFolder

    if RunFolder(folder).last_checkpoint() is not None:
        return "Go on from the last checkpoint"
    if RunFolder(folder).manifest.is_file():
        return "There is no checkpoint yet. Start over"
    return "Go on with the chain" if (folder / "chain.json").is_file() else None


def _meeting(plan: "LaunchPlan", job: Job) -> "Meeting | None":
    """Where the machines find one another; None on a single one."""
    if plan.rendezvous is None:
        return None
    from prefopt_cli.launch.addresses import split_endpoint
    from prefopt_cli.launch.meeting import Identity, Place
    from prefopt_cli.launch.meeting_guest import Guest
    from prefopt_cli.launch.meeting_hub import Hub

    host, port = split_endpoint(plan.rendezvous)
    folder = Path(job.output_dir).expanduser().absolute().parent
    identity = Identity(
        machine=plan.machine_rank,
        machines=plan.machines,
        processes=plan.processes,
        host=socket.gethostname(),
        versions=", ".join(f"{name} {_version(name)}" for name in ("prefopt", "torch")),
        recipe=hashlib.sha256(json.dumps(job.content, sort_keys=True).encode()).hexdigest(),
    )
    side = Hub if plan.machine_rank == 0 else Guest
    return side(identity, Place(host, port, plan.timeout, folder), _tell)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of unknown version"
