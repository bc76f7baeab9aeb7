"""JSON lines over TCP between the launchers of several machines; nothing here waits."""

import json
import math
import socket
import time
from contextlib import suppress
from typing import Any

LONGEST_LINE = 200_000
"""Bytes; whoever sends more is none of ours."""

PIECE = 65536


class Connection:
    """One connection: messages out, messages in, and when the other side was last heard of.

    Args:
        connected: the socket; it is closed with the connection.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self.socket = connected
        self.closed = False
        self.heard = time.monotonic()
        self._out = b""
        self._in = b""

    def send(self, message: dict[str, Any]) -> None:
        """Put a message on its way; what the network does not take yet goes with the next one."""
        self._out += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Send what is waiting, as far as the network takes it."""
        try:
            while self._out and not self.closed:
                self._out = self._out[self.socket.send(self._out) :]
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come; afterwards `closed` tells whether more can come."""
        try:
            while not self.closed:
                piece = self.socket.recv(PIECE)
                self.closed = not piece or len(self._in) > LONGEST_LINE
                self._in += piece
                self.heard = time.monotonic()
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True
        *lines, self._in = self._in.split(b"\n")
        return [message for message in map(_message, lines) if message is not None]

    def listen_from_now(self) -> None:
        """Count no silence that was nobody's turn to break."""
        self.heard = time.monotonic()

    def silent_for(self) -> float:
        """Seconds since anything came."""
        return time.monotonic() - self.heard

    def close(self) -> None:
        """Send what is waiting if that is possible at once, and part."""
        self.flush()
        self.receive()  # closing over what was not read would cut off what was sent
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        self.socket.close()


def _message(line: bytes) -> dict[str, Any] | None:
    """The message of a line; None where it is none, or holds what no launcher says."""
    try:
        found = json.loads(line, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no number that could be used")
    return number
