"""A launch from its start to its end: processes watched, signals passed on, the first failure found."""

import json
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from prefopt_cli.errors import PrefoptError
from prefopt_cli.launch.agent import FAILING_FILE, RESULT_FILE
from prefopt_cli.launch.ending import Ending
from prefopt_cli.launch.failures import (
    BY_WEIGHT,
    INTERRUPTIONS,
    MISTAKE,
    Failure,
    agent_failure,
    ended_without_words,
    first_failure,
    interruption,
    read_failures,
)
from prefopt_cli.launch.meeting import TICK, Meeting
from prefopt_cli.launch.plan import LaunchPlan, as_machine
from prefopt_cli.launch.processes import Processes, last_lines
from prefopt_cli.launch.worker import STOP_FILE

AFTER_FAILURE = 3.0
"""Seconds that the others get to end by themselves, and to say why, once one has failed."""

AFTER_SECOND_SIGNAL = 30.0
"""Seconds in which processes must have ended that were asked twice."""

STOPPING = "\nStopping as soon as what is being computed is done; once more to stop at once."

Told = Callable[[str], None]


@dataclass(frozen=True)
class Ended:
    """How a launch ended."""

    ending: Ending
    """This machine's, or that of the machine whose failure ended it."""
    message: str | None = None
    """What went wrong."""
    output: Path | None = None
    """Where what the other processes printed was kept."""


def supervise(plan: LaunchPlan, *, told: Told, debug: bool = False, meeting: Meeting | None = None) -> Ended:
    """Start a plan's processes and stay until they, and those of the other machines, have ended.

    Args:
        plan: what to start here.
        told: called with what the user should know meanwhile.
        debug: whether torch and all processes may print.
        meeting: of several machines; closed at the end.

    Raises:
        UserError: the machines do not fit together.
        PrefoptError: a machine did not come.
        KeyboardInterrupt: a signal where none is passed on, such as while machines are waited for.
    """
    if meeting is None:
        return _in_a_folder(_Launch(plan, told, debug, None))
    try:
        meeting.gather()
        return _in_a_folder(_Launch(as_machine(plan, meeting.address), told, debug, meeting))
    finally:
        meeting.close()


def _in_a_folder(launch: "_Launch") -> "Ended":
    """Run a launch with a folder for what its processes leave, which goes unless it may explain something."""
    folder = Path(tempfile.mkdtemp(prefix="prefopt-launch-"))
    kept = False
    try:
        ended = launch.run(folder)
        kept = ended.output is not None
        return ended
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


class _Launch:
    """One machine's launch while it runs."""

    def __init__(self, plan: LaunchPlan, told: Told, debug: bool, meeting: Meeting | None) -> None:
        self.plan, self.told, self.debug, self.meeting = plan, told, debug, meeting
        self.received: list[int] = []
        """Signals that came to this launcher, in their order."""
        self.obeyed = 0
        """How often the processes have been asked to stop."""
        self.kill_at: float | None = None
        self.other: Ending | None = None
        """Of another machine that failed."""

    def run(self, folder: Path) -> Ended:
        """Start, watch, and judge."""
        self.folder = folder
        with self._listening():
            self.processes = Processes(self.plan, self.folder, debug=self.debug)
            try:
                while self.processes.exit_code() is None:
                    self._look()
                    time.sleep(TICK)
            finally:
                self.processes.kill()  # nothing is left behind, whatever happened
            own = self._own_ending()
            if self.meeting is not None:
                self.meeting.part(own, self._leaves)
        return self._judged(own)

    @property
    def asked(self) -> list[int]:
        """Signals to obey: another machine's is the first one here too, which may come by both ways, as Slurm's."""
        elsewhere = self.meeting.stop if self.meeting is not None else None
        return self.received or ([] if elsewhere is None else [elsewhere])

    def _look(self) -> None:
        now = time.monotonic()
        while len(self.asked) > self.obeyed:
            self._obey(now)
        if self.meeting is not None:
            for ending in self.meeting.beat():
                if ending.failed and self.other is None:
                    self.other = ending
                    self._kill_within(now, AFTER_FAILURE)
        if any(self.folder.glob("failure-*.json")) or (self.folder / FAILING_FILE).exists():
            self._kill_within(now, AFTER_FAILURE)
        if self.kill_at is not None and now >= self.kill_at:
            self.processes.kill()

    def _kill_within(self, now: float, seconds: float) -> None:
        self.kill_at = min(now + seconds, self.kill_at or float("inf"))

    def _obey(self, now: float) -> None:
        self.obeyed += 1
        if self.obeyed == 1:
            (self.folder / STOP_FILE).touch()
            self.told(STOPPING)
            if self.meeting is not None:
                self.meeting.ask_to_stop(self.asked[0])
        there = self.processes.interrupt()
        if self.obeyed > 2 or not there:
            self.processes.kill()
        elif self.obeyed == 2:
            self._kill_within(now, AFTER_SECOND_SIGNAL)

    def _leaves(self) -> bool:
        """Once the processes here have ended: a first signal is passed on to the other machines, a second is obeyed."""
        if self.received and not self.obeyed and self.meeting is not None:
            self.obeyed = 1
            self.meeting.ask_to_stop(self.received[0])
        return len(self.received) > max(self.obeyed, 1)

    @contextmanager
    def _listening(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self.received.append(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _own_ending(self) -> Ending:
        """How the processes here ended."""
        host, asked = socket.gethostname(), self.asked[0] if self.asked else None
        own = Ending(self.plan.machine_rank, host, 0, asked)
        code = self.processes.exit_code()
        if code == 0:
            return own
        failures = [*self._failures()]
        taken = [each for each in failures if asked and each.exit_code in INTERRUPTIONS]
        failure = first_failure(each for each in failures if each not in taken)
        if failure is None and self.other is not None:
            return replace(own, exit_code=1)
        at_once = len(self.asked) > 1 or bool(taken)
        if asked and (failure is None or (at_once and failure.kind != "error")):
            failure = interruption(asked)  # however they took it
        failure = failure or agent_failure(code or 0)
        failure = replace(failure, machine=own.machine, host=host)
        return replace(own, exit_code=failure.exit_code, failure=failure)

    def _failures(self) -> Iterator[Failure]:
        """What the workers and the agent say, without those whom the launcher killed itself."""
        said = {failure.rank: failure for failure in read_failures(self.folder)}
        yield from said.values()
        result = self.folder / RESULT_FILE
        found = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
        ended = found.get("failures", [])
        # What comes later are those that torchrun or this launcher ended because of the first.
        until = min((each["time"] for each in ended), default=0) + AFTER_FAILURE / 2
        if self.processes.killed_at is not None:
            until = min(until, int(self.processes.killed_at) - 1)
        for each in ended:
            if each["rank"] not in said and each["time"] <= until:
                failure = ended_without_words(each["rank"], each["exit_code"], asked=bool(self.asked))
                yield replace(failure, time=each["time"])
        if "error" in found:
            yield Failure(f"torchrun failed: {found['error']}", kind="silent")

    def _judged(self, own: Ending) -> Ended:
        """The ending that counts: the one that explains most, this machine's if several do."""
        endings = [own, *(self.meeting.endings.values() if self.meeting is not None else ())]
        failed = [each for each in endings if each.failed and each.failure is not None]
        if failed:
            first = min(
                failed, key=lambda each: BY_WEIGHT.index(each.failure.kind if each.failure else "silent")
            )
            return Ended(first, self._words(first), self._kept(first))
        signals = [each.signal for each in endings if each.signal is not None]
        return Ended(replace(own, signal=signals[0] if signals else None))

    def _words(self, ending: Ending) -> str:
        failure = ending.failure
        if failure is None or failure.exit_code in INTERRUPTIONS:
            return "Interrupted." if ending.machine == self.plan.machine_rank else _interrupted(ending)
        if failure.exit_code == MISTAKE:
            return failure.message
        processes = self.plan.processes if self.meeting is None else self.meeting.processes
        return failure.told(processes, self.plan.machines)

    def _kept(self, ending: Ending) -> Path | None:
        """The folder, where what processes printed may explain more than the failure does."""
        explained = (
            ending.failure is None
            or ending.exit_code in (MISTAKE, *INTERRUPTIONS)
            or ending.failure.kind == "error"
        )
        if self.debug or explained or not any(last_lines(self.folder)):
            return None
        return self.folder


def _interrupted(ending: Ending) -> str:
    return f"machine {ending.machine} ({ending.host}) was interrupted."


def raise_ended(ended: Ended) -> None:
    """Raise what went wrong, if anything did."""
    if ended.message is not None:
        error = PrefoptError(ended.message)
        error.exit_code = ended.ending.exit_code
        raise error
