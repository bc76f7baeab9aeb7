"""Whether the machines of a run can meet at the address that its recipe names."""

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

from prefopt_cli.launch.addresses import join_endpoint, split_endpoint
from prefopt_cli.launch.doctor.finding import Finding, note, ok, problem
from prefopt_cli.launch.meeting import PORT_OFFSET

PATIENCE = 5.0
"""Seconds for machine 0 to answer."""


def rendezvous(endpoint: str, machine_rank: int) -> Iterator[Finding]:
    """On machine 0, whether its two ports are free here; on the others, whether machine 0 can be reached.

    Args:
        endpoint: host:port; an IPv6 address stands in brackets.
        machine_rank: which machine this is.
    """
    host, port = split_endpoint(endpoint)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        yield problem(
            f"launch.rendezvous: the name {host} is not known here ({error.strerror})",
            "write machine 0's address, as `hostname -I` prints it there: launch.rendezvous=10.0.0.1:29500",
        )
        return
    family, kind, protocol, _, address = found[0]
    examine = _here if machine_rank == 0 else _there
    for offset in (0, PORT_OFFSET) if machine_rank == 0 else (0,):
        with contextlib.closing(socket.socket(family, kind, protocol)) as tried:
            tried.settimeout(PATIENCE)
            place = (address[0], port + offset, *address[2:])
            yield examine(tried, place, join_endpoint(host, port + offset))


def _here(tried: socket.socket, address: tuple[Any, ...], endpoint: str) -> Finding:
    port = address[1]
    try:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tried.bind(address)
    except OSError as error:
        with contextlib.suppress(OSError):
            tried.bind((address[0], 0, *address[2:]))
            return problem(
                f"launch.rendezvous: port {port} is taken on this machine",
                f"take another, or see who has it: ss -ltnp 'sport = :{port}'",
            )
        return problem(
            f"launch.rendezvous: {endpoint} is no address of this machine, which is machine 0 ({error.strerror})",
            "write this machine's address, as `hostname -I` prints it, or set launch.machine_rank here",
        )
    return ok(f"launch.rendezvous: port {port} is free on this machine, which is machine 0")


def _there(tried: socket.socket, address: tuple[Any, ...], endpoint: str) -> Finding:
    try:
        tried.connect(address)
    except ConnectionRefusedError:
        return ok(f"launch.rendezvous: machine 0 can be reached; nothing waits at {endpoint} yet")
    except TimeoutError:
        return problem(
            f"launch.rendezvous: machine 0 does not answer at {endpoint} within {PATIENCE:g} s",
            f"start machine 0 first, and open the port in its firewall: nc -vz {address[0]} {address[1]}",
        )
    except OSError as error:
        return problem(
            f"launch.rendezvous: machine 0 cannot be reached at {endpoint} ({error.strerror})",
            f"check address and network: ping {address[0]}",
        )
    return note(
        f"launch.rendezvous: something answers at {endpoint}; it should be machine 0's waiting run",
        "if nothing was started there, take another port",
    )
