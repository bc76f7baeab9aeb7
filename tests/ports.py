"""Ports for tests that run side by side."""

import random
import socket
from contextlib import ExitStack

# Below those that systems hand out by themselves, so that no connection of another test takes one between our look
# and its use.
RANGE = range(10_000, 32_000)


def free_ports(many: int = 2) -> int:
    """The first of so many ports in a row that nobody uses."""
    while True:
        first = random.SystemRandom().choice(RANGE)  # workers seed `random` alike
        with ExitStack() as opened:
            try:
                for port in range(first, first + many):
                    opened.enter_context(socket.create_server(("", port)))
            except OSError:
                continue
        return first
