"""What went wrong in a process, how it is passed on, and which of several failures is told."""

import json
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

Kind = Literal["error", "signal", "silent", "consequence"]
"""An error with words; a signal from outside; an end without words; the loss of another process."""

BY_WEIGHT: Sequence[Kind] = ("error", "signal", "silent", "consequence")

MISTAKE = 2
"""Exit code of the user's mistakes, which concern no rank in particular."""

SIGNAL_EXIT_BASE = 128
"""What a signal ended exits with this and the signal's number, as shells have it."""

INTERRUPTIONS = (SIGNAL_EXIT_BASE + signal.SIGINT, SIGNAL_EXIT_BASE + signal.SIGTERM)
"""Exit codes of what was interrupted at once."""

LONGEST_MESSAGE = 20_000


@dataclass(frozen=True)
class Failure:
    """One process's."""

    message: str
    exit_code: int = 1
    kind: Kind = "error"
    rank: int | None = None
    """Of the process among all; None: of a machine as a whole."""
    machine: int = 0
    host: str = ""
    time: float = field(default_factory=time.time)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Failure":
        """As `asdict` made it, here or on another machine.

        Raises:
            ValueError: it is none.
        """
        try:
            found = cls(**data)
        except TypeError as error:
            raise ValueError("not a failure") from error
        numbers = (found.exit_code, found.machine, found.rank or 0)
        words = isinstance(found.message, str) and found.kind in BY_WEIGHT
        counted = all(isinstance(each, int) for each in numbers) and 0 <= found.exit_code < 256
        if not words or not counted or not isinstance(found.time, int | float):
            raise ValueError("not a failure")
        return found

    def told(self, processes: int, machines: int) -> str:
        """Its message, with the rank and the machine that it concerns."""
        place = f"machine {self.machine}, {self.host}"
        if self.rank is None:
            return self.message
        where = f" ({place})" if machines > 1 else ""
        return f"rank {self.rank} of {processes}{where}: {self.message}"


def write_failure(folder: Path, failure: Failure) -> None:
    """Leave a failure for the launcher."""
    # Written whole or not at all: the launcher looks at any time.
    beside = folder / f".failure-{failure.rank}"
    beside.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    beside.replace(folder / f"failure-{failure.rank}.json")


def read_failures(folder: Path) -> list[Failure]:
    """What workers have left so far."""
    files = folder.glob("failure-*.json")
    return [Failure.from_dict(json.loads(path.read_text(encoding="utf-8"))) for path in files]


def interruption(number: int) -> Failure:
    """Of a machine whose processes a signal ended at once."""
    return Failure("Interrupted.", SIGNAL_EXIT_BASE + number)


def ended_without_words(rank: int, exit_code: int, *, asked: bool = False) -> Failure:
    """The failure of a process that left none.

    Args:
        rank: its.
        exit_code: minus a signal's number, if one killed it.
        asked: whether it had been asked to stop, and may just have done so.
    """
    code = exit_code if exit_code >= 0 else SIGNAL_EXIT_BASE - exit_code
    if asked and code in INTERRUPTIONS:
        return replace(interruption(code - SIGNAL_EXIT_BASE), rank=rank)
    if exit_code >= 0:
        return Failure(f"it ended with exit code {exit_code} and said nothing.", kind="silent", rank=rank)
    number = -exit_code
    hint = "; the system may have run out of memory" if number == signal.SIGKILL else ""
    # NCCL aborts a process whose peers are gone; torchrun ends with SIGTERM what it finds at its own end.
    kind: Kind = "silent" if number in (signal.SIGABRT, signal.SIGTERM) else "signal"
    return Failure(f"it was killed by signal {number} ({_signal_name(number)}){hint}.", kind=kind, rank=rank)


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in {*signal.Signals} else "unknown"


def first_failure(failures: Iterable[Failure]) -> Failure | None:
    """The one to tell: the first of those that explain most."""
    found = sorted(failures, key=lambda failure: (BY_WEIGHT.index(failure.kind), failure.time))
    return found[0] if found else None


def agent_failure(exit_code: int) -> Failure:
    """The failure of torchrun's agent itself, where no process has one to tell."""
    how = f"ended with exit code {exit_code}"
    if exit_code < 0:
        how = f"was killed by signal {-exit_code} ({_signal_name(-exit_code)})"
    return Failure(f"torchrun, which watched over the processes, {how}.", kind="silent")
