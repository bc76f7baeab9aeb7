"""Launchers of several machines watch over one another, machine 0 in their midst.

They meet at the port after the rendezvous's, before any process is started: so a machine that does not come, runs
something else, or does not share the disk is told of in words. From then on each says every second that it is there.
"""

import signal as signals
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.launch.ending import Ending, printable, vanished
from prefopt_cli.launch.wire import Connection

PORT_OFFSET = 1
"""The launchers' port is the rendezvous's and this."""

TICK = 0.1
"""Seconds between two looks while waiting."""

FAREWELL = 10.0
"""Seconds in which another machine may tell why a connection was lost."""

MARKER = ".prefopt-meeting-{}"
"""File by which machines see that they share the disk of output_dir; deleted again."""

STOPS = (signals.SIGINT, signals.SIGTERM)
"""The signals that are passed on."""

SEEN_WITHIN = 20.0
"""Seconds that a network file system may take to show a file."""


@dataclass(frozen=True)
class Identity:
    """What a machine says of itself when it comes."""

    machine: int
    machines: int
    processes: int
    host: str
    versions: str
    recipe: str
    """A digest of the recipe, without the machine's rank."""


@dataclass(frozen=True)
class Place:
    """Where and how long machines wait for one another."""

    host: str
    port: int
    """The rendezvous's; launchers meet at the next one."""
    timeout: float
    folder: Path
    """In which all machines must see the same files: output_dir's."""


class Meeting(ABC):
    """One machine's side.

    Args:
        identity: of this machine.
        place: where they meet.
        told: called with what the user should know while waiting.
    """

    def __init__(self, identity: Identity, place: Place, told: Callable[[str], None]) -> None:
        self.identity, self.place, self.told = identity, place, told
        self.processes = identity.processes
        """Of all machines together, once they have met."""
        self.address: str | None = None
        """This machine's, as the others know it, once they have met."""
        self.endings: dict[int, Ending] = {}
        """Of the machines that have ended, by rank."""
        self.stop: int | None = None
        """The signal that asked a machine, and by it all, to stop."""
        self._fresh: list[Ending] = []
        self._said = 0.0

    @abstractmethod
    def gather(self) -> None:
        """Wait until all machines are there.

        Raises:
            UserError: they do not fit together.
            PrefoptError: one did not come in time.
        """

    @abstractmethod
    def _exchange(self) -> None:
        """Hear what has come, and pass on what others should hear."""

    @abstractmethod
    def _links(self) -> list[tuple[int, str, Connection]]:
        """Rank, name and connection of the machines that this one is connected with."""

    @abstractmethod
    def close(self) -> None:
        """Part."""

    def beat(self) -> list[Ending]:
        """Say that this machine is there, and hear of the others; returns those that have ended since."""
        if time.monotonic() - self._said > min(1.0, self.place.timeout / 4):
            self._said = time.monotonic()
            for _, _, link in self._links():
                link.send({"type": "beat"})
        self._exchange()
        for machine, host, link in self._links():
            if machine in self.endings:
                continue
            if link.closed:
                self._ended(vanished(machine, host))
            elif link.silent_for() > self.place.timeout:
                self._ended(vanished(machine, host, self.place.timeout))
        fresh, self._fresh = self._fresh, []
        return fresh

    def ask_to_stop(self, signal: int) -> None:
        """Pass on a signal that came to this machine; once is enough."""
        if self.stop is None:
            self.stop = signal
            for _, _, link in self._links():
                link.send({"type": "stop", "signal": signal})

    def part(self, own: Ending, enough: Callable[[], bool] = lambda: False) -> None:
        """Tell the others how this machine ended, and wait for their endings where theirs may matter.

        A machine that ended well waits until all have; one that lost a connection, for the one that knows why.

        Args:
            own: how this machine ended.
            enough: whether the user does not want to wait any longer.
        """
        for _, _, link in self._links():
            link.send(own.to_message())
        until = time.monotonic() + (0.0 if own.explains else FAREWELL)
        while not enough() and (not own.failed or time.monotonic() < until):
            self.beat()
            known = [*self.endings.values()]
            parted = all(link.closed for _, _, link in self._links())
            explained = any(each.explains if own.failed else each.failed for each in known)
            if explained or parted or len(known) == self.identity.machines - 1:
                break
            time.sleep(TICK)

    def _ended(self, ending: Ending) -> None:
        if ending.machine not in self.endings and ending.machine != self.identity.machine:
            self.endings[ending.machine] = ending
            self._fresh.append(ending)

    def _hear(self, message: dict[str, object]) -> None:
        signal = message.get("signal")
        if message.get("type") == "stop" and isinstance(signal, int) and signal in STOPS:
            self.ask_to_stop(signal)
        elif message.get("type") == "end":
            with suppress(ValueError):
                self._ended(Ending.from_message(message))


def hello(identity: Identity) -> dict[str, object]:
    """The first message of a machine."""
    return {"type": "hello", **asdict(identity)}


def raise_refusal(message: dict[str, object]) -> None:
    """Raise what machine 0 refused with."""
    words = printable(message.get("message"))
    raise UserError(words) if message.get("exit_code") == UserError.exit_code else PrefoptError(words)
