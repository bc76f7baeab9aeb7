"""What a process does that prefopt's launcher started: outlive nobody, stop when told, leave its failure behind."""

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

from prefopt_cli.launch.failures import Failure, Kind, write_failure
from prefopt_cli.launch.variables import AGENT, FOLDER

LAUNCHER_FILE = "launcher.json"
"""Process id and time of creation of the launcher."""

STOP_FILE = "stop"
"""There once a signal has asked the launcher to stop, for workers that were not there yet to hear it."""

LOOKS_EVERY = 1.0
"""Seconds between two looks at whether the launcher lives."""


def launched() -> bool:
    """Whether prefopt's launcher started this process."""
    return FOLDER in os.environ


def begin() -> None:
    """Take up the launcher's ways; nothing in a process that it did not start.

    Signals come from the launcher alone, as SIGINT: one that reaches all processes, as Slurm sends it, would count
    twice, and torchrun's agent sends SIGTERM to those whose peer has failed.

    Raises:
        KeyboardInterrupt: the run was asked to stop before this process was there.
    """
    if not launched():
        return
    signal.signal(signal.SIGTERM, _nothing)
    os.register_at_fork(after_in_child=_hear_again)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_watch, args=(launch_folder(), os.environ[AGENT]), daemon=True).start()
    if (launch_folder() / STOP_FILE).exists():
        raise KeyboardInterrupt


def launch_folder() -> Path:
    """Where failures are left."""
    return Path(os.environ[FOLDER])


def rank() -> int:
    """This process's among all."""
    return int(os.environ.get("RANK", "0"))


def leave_failure(message: str, exit_code: int, kind: Kind = "error") -> bool:
    """Tell the launcher, which tells the user, what went wrong; false where there is none, or it cannot be told."""
    if not launched():
        return False
    host = socket.gethostname()
    machine = int(os.environ.get("GROUP_RANK", "0"))
    try:
        write_failure(launch_folder(), Failure(message, exit_code, kind, rank(), machine, host))
    except OSError:  # the disk may be the very thing that is full
        return False
    return True


def launcher_lives(folder: Path) -> bool:
    """Whether the process that made the folder is still there."""
    import psutil

    try:
        data = json.loads((folder / LAUNCHER_FILE).read_text(encoding="utf-8"))
        launcher = psutil.Process(data["pid"])
        return launcher.create_time() == data["created"] and launcher.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, KeyError, psutil.Error):
        return False


def write_launcher(folder: Path) -> None:
    """Let `launcher_lives` know this process."""
    import psutil

    own = psutil.Process()
    data = {"pid": own.pid, "created": own.create_time()}
    (folder / LAUNCHER_FILE).write_text(json.dumps(data), encoding="utf-8")


def _watch(folder: Path, agent: str) -> None:
    """End at once with the launcher, or with torchrun's agent: nobody would stop this process any more."""
    while str(os.getppid()) == agent and launcher_lives(folder):
        time.sleep(LOOKS_EVERY)
    os._exit(1)


def _nothing(*_: object) -> None:
    """A handler rather than no signal: programs that this process starts do not inherit it."""


def _hear_again() -> None:
    """In processes forked from this one, such as data loaders, which are ended by SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
