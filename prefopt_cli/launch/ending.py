"""How a machine's part in a run ended."""

import re
from dataclasses import asdict, dataclass
from typing import Any

from prefopt_cli.launch.failures import LONGEST_MESSAGE, Failure

UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""What a terminal would obey, and halves of characters, which cannot be written."""

LARGEST = 2**31


@dataclass(frozen=True)
class Ending:
    """One machine's."""

    machine: int
    host: str
    exit_code: int = 0
    signal: int | None = None
    """That asked it to stop, if one did."""
    failure: Failure | None = None

    @property
    def failed(self) -> bool:
        """Whether the other machines cannot go on."""
        return self.exit_code != 0

    @property
    def explains(self) -> bool:
        """Whether it says more than that something happened elsewhere."""
        return self.failure is not None and self.failure.kind != "consequence"

    def to_message(self) -> dict[str, Any]:
        """For the other machines."""
        return {"type": "end", **asdict(self)}

    @classmethod
    def from_message(cls, message: dict[str, Any]) -> "Ending":
        """What another machine says, made fit for a terminal.

        Raises:
            ValueError: it makes no sense.
        """
        try:
            failure = Failure.from_dict(message["failure"]) if message["failure"] is not None else None
            machine, code, signal = whole(message["machine"]), whole(message["exit_code"]), message["signal"]
            host = printable(message["host"])[:256]
        except (KeyError, TypeError) as error:
            raise ValueError("not an ending") from error
        if failure is not None:
            words = printable(failure.message)[:LONGEST_MESSAGE]
            failure = Failure(words, failure.exit_code, failure.kind, failure.rank, machine, host)
        return cls(machine, host, code, signal if isinstance(signal, int) else None, failure)


def printable(said: object) -> str:
    """What another machine says, made fit for a terminal."""
    return UNPRINTABLE.sub("?", str(said))


def whole(said: object) -> int:
    """A count, a rank or an exit code that another machine tells.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(said, int) or not 0 <= said < LARGEST:
        raise ValueError("not a count, a rank or an exit code")
    return said


def vanished(machine: int, host: str, after: float | None = None) -> Ending:
    """A machine that said nothing before it went.

    Args:
        machine: its rank.
        host: its name.
        after: seconds of silence; None: its connection closed.
    """
    how = (
        "ended without a word: it was killed, or went down"
        if after is None
        else f"has been silent for {after:.0f} s (launch.timeout): it went down, or the network did"
    )
    words = f"machine {machine} ({host}) {how}."
    return Ending(machine, host, 1, None, Failure(words, kind="signal", machine=machine, host=host))
