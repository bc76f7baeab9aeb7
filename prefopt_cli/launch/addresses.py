"""Where machines meet, and by which network interface they get there."""

import ipaddress
import socket

from prefopt_cli.recipe.launch_settings import ENDPOINT

INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables by which gloo and NCCL are told which network interface to use."""


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """Host, without an IPv6 address's brackets, and port of ``host:port``."""
    found = ENDPOINT.fullmatch(endpoint)
    assert found is not None  # the recipe has been judged
    return found[1].strip("[]"), int(found[2])


def join_endpoint(host: str, port: int) -> str:
    """``host:port``, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def own_address_towards(host: str, port: int) -> str | None:
    """This machine's address on the way to a host; None where there is no way. Nothing is sent."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                found: str = probe.getsockname()[0]
                return found
    except OSError:
        pass
    return None


def is_own_address(host: str, port: int) -> bool:
    """Whether a host is this machine: the way to an own address begins at that address. Nothing is sent."""
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                if probe.getsockname()[0] == probe.getpeername()[0]:
                    return True
    except OSError:
        pass
    return False


def is_loopback(address: str | None) -> bool:
    """Whether an address is one by which a machine reaches only itself."""
    if address is None:
        return False
    plain = address.removeprefix("::ffff:").partition("%")[0]  # IPv4 seen through an IPv6 socket
    return ipaddress.ip_address(plain).is_loopback


def interface_of(address: str | None) -> str | None:
    """The name of the network interface that has an address."""
    import psutil

    if address is None:
        return None
    plain = address.removeprefix("::ffff:").partition("%")[0]  # IPv4 seen through an IPv6 socket
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address.partition("%")[0] == plain for each in addresses):
            return name
    return None


def interface_variables(address: str | None) -> dict[str, str]:
    """What binds gloo and NCCL to the interface with an address; they would guess by the machine's name."""
    name = interface_of(address)
    if name is None:
        return {}
    return dict(zip(INTERFACES, (name, f"={name}"), strict=True))
