"""torchrun's agent and the processes under it, seen from the launcher."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import psutil

from prefopt_cli.launch.plan import LaunchPlan
from prefopt_cli.launch.variables import FOLDER, LAUNCHER

LOOKS_EVERY = 1.0
"""Seconds between two looks for workers, until all are known: each look reads of all processes of the machine."""

PARTING = 10.0
"""Seconds at most that torchrun's agent gets to end once its processes are gone."""


class Processes:
    """One machine's processes.

    Args:
        plan: what to start.
        folder: where they leave failures and what they print, but for the one that speaks.
        debug: whether all speak.
    """

    def __init__(self, plan: LaunchPlan, folder: Path, *, debug: bool) -> None:
        command = [sys.executable, "-m", "prefopt_cli.launch.agent"]
        quiet = [] if debug else ["--redirects", _redirects(plan), "--log-dir", str(folder)]
        command += [*plan.torchrun, *quiet, *plan.command[plan.command.index("-m", 2 + 1) :]]
        environment = {**os.environ, **plan.environment, FOLDER: str(folder), LAUNCHER: str(os.getpid())}
        if not debug:
            environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        # In a session of its own, so that Ctrl-C reaches the launcher alone.
        self._agent = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
        )
        self._known: set[psutil.Process] = set()
        self._count, self._looks_at = plan.processes, 0.0
        # Other machines hear nothing meanwhile, and must not take that for the silence of one that is down.
        self._parting = PARTING if plan.machines == 1 else min(PARTING, plan.timeout / 3)
        self.killed_at: float | None = None
        """When they were killed from here, if they were."""

    def exit_code(self) -> int | None:
        """The agent's, once it has ended."""
        now = time.monotonic()
        if len(self._known) < self._count and now >= self._looks_at:
            self._looks_at = now + LOOKS_EVERY
            self._workers()
        return self._agent.poll()

    def interrupt(self) -> bool:
        """Ask the workers to stop; false if there are none yet."""
        workers = self._workers()
        for worker in workers:
            with suppress(psutil.Error):
                worker.send_signal(signal.SIGINT)
        return bool(workers)

    def kill(self) -> None:
        """End everything at once."""
        workers: list[psutil.Process] = []
        if self._agent.poll() is None:
            self.killed_at = self.killed_at or time.time()
            workers = [*self._descendants()]
        for worker in workers:
            with suppress(psutil.Error):
                worker.kill()
        with suppress(subprocess.TimeoutExpired):
            self._agent.wait(self._parting)
        self._agent.kill()
        self._agent.wait()
        # Those that were started meanwhile, or whose agent was killed.
        for worker in self._known.union(workers):
            with suppress(psutil.Error):
                worker.kill()

    def _workers(self) -> list[psutil.Process]:
        with suppress(psutil.Error):
            found = psutil.Process(self._agent.pid).children()
            self._known |= {*found}
            return found
        return []

    def _descendants(self) -> Iterator[psutil.Process]:
        with suppress(psutil.Error):
            yield from psutil.Process(self._agent.pid).children(recursive=True)


def _redirects(plan: LaunchPlan) -> str:
    """Which processes print into files, as torchrun has it: all but the first of machine 0."""
    if plan.machine_rank > 0:
        return "3"
    return ",".join(f"{rank}:3" for rank in range(1, plan.processes)) or "0"


def last_lines(folder: Path, count: int = 12) -> Iterator[tuple[Path, str]]:
    """What processes printed into files at last, those with anything."""
    for path in sorted(folder.rglob("stderr.log")):
        text = _tail(path.open("rb"))
        if text.strip():
            yield path, "\n".join(text.rstrip().splitlines()[-count:])


def _tail(file: IO[bytes], size: int = 8192) -> str:
    with file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - size))
        return file.read().decode("utf-8", errors="replace")
