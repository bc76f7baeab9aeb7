"""Ports for tests that run side by side."""

import random
import socket
from contextlib import ExitStack

# Below those that systems hand out by themselves, so that no connection of another test takes one between our look
# and its use.
RANGE = range(10_000, 32_000)


def free_ports(among: range = RANGE) -> int:
    """The first of two ports in a row that nobody uses."""
    while True:
        first = random.SystemRandom().choice(among)  # workers seed `random` alike
        with ExitStack() as opened:
            try:
                for port in (first, first + 1):
                    opened.enter_context(socket.create_server(("", port)))
            except OSError:
                continue
        return first
