"""The side of the machines from 1 on: they go to machine 0."""

import socket
import time
from contextlib import suppress
from typing import Any

from prefopt_cli.errors import PrefoptError
from prefopt_cli.launch.addresses import join_endpoint
from prefopt_cli.launch.ending import printable, whole
from prefopt_cli.launch.meeting import (
    MARKER,
    PORT_OFFSET,
    SEEN_WITHIN,
    TICK,
    Meeting,
    hello,
    raise_refusal,
)
from prefopt_cli.launch.wire import Connection

TRIES_EVERY = 0.5
"""Seconds between two attempts to reach machine 0."""

LONGEST_TOKEN = 64

ATTEMPT = 5.0
"""Seconds of one attempt."""


class Guest(Meeting):
    """A machine that goes to machine 0."""

    _link: Connection | None = None
    _host = "its name is not known yet"
    _there = 1
    _token: str | None = None
    _looks_until = 0.0
    _goes = False

    def gather(self) -> None:
        """See `Meeting`."""
        deadline = time.monotonic() + self.place.timeout
        where = join_endpoint(self.place.host, self.place.port + PORT_OFFSET)
        own = f"Machine {self.identity.machine} of {self.identity.machines}"
        self.told(f"{own}: waiting for machine 0 at {where}.")
        self._link = self._connected(deadline, where)
        self.address = self._link.socket.getsockname()[0]
        self._link.send(hello(self.identity))
        while not self._goes:
            if time.monotonic() > deadline:
                raise PrefoptError(
                    f"Machine 0 is there, but only {self._there} of {self.identity.machines} machines came within "
                    f"{self.place.timeout:.0f} s (launch.timeout). Start the others with their launch.machine_rank."
                )
            self._exchange()
            self._look_for_marker()
            if self._link.closed and not self._goes:
                raise PrefoptError(
                    f"Machine 0 ({self._host}) ended before all machines were there. What it says tells why."
                )
            time.sleep(TICK)
        self.told(f"All {self.identity.machines} machines are there. Progress is shown on machine 0.")

    def close(self) -> None:
        """See `Meeting`."""
        if self._link is not None:
            self._link.close()

    def _links(self) -> list[tuple[int, str, Connection]]:
        return [(0, self._host, self._link)] if self._link is not None else []

    def _exchange(self) -> None:
        assert self._link is not None
        self._link.flush()
        for message in self._link.receive():
            with suppress(KeyError, ValueError):
                self._obey(message)

    def _obey(self, message: dict[str, Any]) -> None:
        """What machine 0 says.

        Raises:
            KeyError, ValueError: it is not what a launcher says.
        """
        kind = message.get("type")
        if kind == "refused":
            raise_refusal(message)
        elif kind == "welcome":
            self._host, self._token = printable(message["host"])[:256], _token(message["token"])
            self._looks_until = time.monotonic() + SEEN_WITHIN
        elif kind == "there":
            self._there = whole(message["count"])
        elif kind == "go":
            self.processes = whole(message["processes"])
            self._goes = True
        else:
            self._hear(message)

    def _look_for_marker(self) -> None:
        """Answer machine 0, once, whether its file is seen here."""
        if self._token is None or self._link is None:
            return
        seen = (self.place.folder / MARKER.format(self._token)).is_file()
        if seen or time.monotonic() > self._looks_until:
            self._link.send({"type": "sees" if seen else "blind", "folder": str(self.place.folder)})
            self._token = None

    def _connected(self, deadline: float, where: str) -> Connection:
        error: Any = "no attempt was made"
        while time.monotonic() < deadline:
            try:
                left = max(0.1, min(ATTEMPT, deadline - time.monotonic()))
                target = (self.place.host, self.place.port + PORT_OFFSET)
                return Connection(socket.create_connection(target, timeout=left))
            except OSError as caught:
                error = caught
            time.sleep(TRIES_EVERY)
        raise PrefoptError(
            f"Machine 0 was not reached at {where} within {self.place.timeout:.0f} s (launch.timeout): "
            f"{getattr(error, 'strerror', None) or error}. Check that it was started with launch.machine_rank=0, that "
            f"launch.rendezvous is its address, and that no firewall closes ports {self.place.port} and "
            f"{self.place.port + PORT_OFFSET}."
        )


def _token(said: object) -> str:
    """A part of a file's name.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(said, str) or not said.isalnum() or len(said) > LONGEST_TOKEN:
        raise ValueError("not a token")
    return said
