"""What a process does that prefopt's launcher started: outlive nobody, stop when told, leave its failure behind."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

from prefopt_cli.errors import UserError
from prefopt_cli.launch.failures import Failure, Kind, write_failure
from prefopt_cli.launch.signals import INTERRUPTING, children_hear_sigterm
from prefopt_cli.launch.variables import AGENT, FOLDER

STOP_FILE = "stop"
"""There once a signal has asked the launcher to stop, for workers that were not there yet to hear it."""

LOOKS_EVERY = 1.0
"""Seconds between two looks at whether those above live."""


def launched() -> bool:
    """Whether prefopt's launcher started this process."""
    return FOLDER in os.environ


def begin() -> None:
    """Take up the launcher's ways; nothing in a process that it did not start.

    Signals come from the launcher alone, as SIGINT: one that reaches all processes, as Slurm sends it, would count
    twice, and torchrun's agent sends SIGTERM to those whose peer has failed.

    Raises:
        UserError: the environment says that there is a launcher, and there is none.
        KeyboardInterrupt: the run was asked to stop before this process was there.
    """
    if FOLDER in os.environ and AGENT not in os.environ:
        raise UserError(
            f"{FOLDER} is set in the environment, which prefopt's own launcher does for its processes alone: unset "
            f"{FOLDER}."
        )
    if not launched():
        return
    signal.signal(signal.SIGTERM, _nothing)
    children_hear_sigterm()
    signal.signal(signal.SIGINT, INTERRUPTING)
    threading.Thread(target=_watch, args=(os.environ[AGENT],), daemon=True).start()
    if (launch_folder() / STOP_FILE).exists():
        raise KeyboardInterrupt


def launch_folder() -> Path:
    """Where failures are left."""
    return Path(os.environ[FOLDER])


def rank() -> int:
    """This process's among all."""
    return _number("RANK")


def leave_failure(message: str, exit_code: int, kind: Kind = "error") -> bool:
    """Tell the launcher, which tells the user, what went wrong; false where there is none, or it cannot be told."""
    if not launched() or AGENT not in os.environ:
        return False
    host = socket.gethostname()
    machine = _number("GROUP_RANK")
    try:
        write_failure(launch_folder(), Failure(message, exit_code, kind, rank(), machine, host))
    except OSError:  # the disk may be the very thing that is full
        return False
    return True


def lives_under(parent: str) -> bool:
    """Whether the process that started this one still lives: whoever loses its parent is given another.

    No times are compared: those that systems tell of processes move with their clock.

    Args:
        parent: its process id.
    """
    return str(os.getppid()) == parent


def stay_stopped() -> None:
    """Once all processes have agreed to stop: a signal that comes late, as from another machine, ends none of them.

    Ignored rather than handled, because Python gives handlers up before it has ended.
    """
    if launched():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _number(name: str) -> int:
    """A variable of torchrun's; 0 where it says nothing that can be used."""
    text = os.environ.get(name, "0")
    return int(text) if text.isdecimal() else 0


def _watch(agent: str) -> None:
    """End at once with torchrun's agent, which ends with the launcher: nobody would stop this process any more."""
    while lives_under(agent):
        time.sleep(LOOKS_EVERY)
    os._exit(1)


def _nothing(*_: object) -> None:
    """A handler rather than no signal: programs that this process starts do not inherit it."""
