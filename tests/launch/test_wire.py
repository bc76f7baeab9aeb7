"""Lines from the network, whoever wrote them."""

import socket
from collections.abc import Iterator

import pytest

from prefopt_cli.launch.wire import Connection


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Connection]]:
    """A plain socket, and the connection at its other end."""
    plain, other = socket.socketpair()
    connection = Connection(other)
    yield plain, connection
    plain.close()
    connection.close()


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 50_000,
        b'{"a":' * 20_000,
        b'{"type": "hello", "machine": 1e999}',
        b'{"type": "hello", "machine": NaN}',
        b'{"machine": -Infinity}',
        b'{"machine": ' + b"9" * 10_000 + b"}",
        b"\xff\xfe",
        b"[1, 2]",
        b"",
    ],
    ids=lambda line: line[:20],
)
def test_what_is_no_message_is_passed_over(ends: tuple[socket.socket, Connection], line: bytes) -> None:
    plain, connection = ends
    plain.sendall(line + b'\n{"type": "beat"}\n')
    found = []
    while not found:
        found = connection.receive()
    assert found == [{"type": "beat"}]
