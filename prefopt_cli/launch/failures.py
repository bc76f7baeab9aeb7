"""What went wrong in a process, how it is passed on, and which of several failures is told."""

import json
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["error", "signal", "silent", "consequence"]
"""An error with words; a signal from outside; an end without words; the loss of another process."""

BY_WEIGHT: Sequence[Kind] = ("error", "signal", "silent", "consequence")

MISTAKE, INTERRUPTED = 2, 130
"""Exit codes of the user's mistakes, which concern no rank in particular, and of a second Ctrl-C."""

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
        numbers = (found.exit_code, found.machine, found.time, found.rank or 0)
        words = isinstance(found.message, str) and found.kind in BY_WEIGHT
        if not words or not all(isinstance(each, int | float) for each in numbers):
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


def ended_without_words(rank: int, exit_code: int) -> Failure:
    """The failure of a process that left none, by its exit code; minus a signal's number, if one killed it."""
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
