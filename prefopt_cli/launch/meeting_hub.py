"""Machine 0's side: the others come here."""

import secrets
import socket
import time
from contextlib import suppress
from typing import Any

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.launch.ending import Ending, printable, whole
from prefopt_cli.launch.meeting import MARKER, PORT_OFFSET, TICK, Meeting
from prefopt_cli.launch.wire import Connection


class Hub(Meeting):
    """Machine 0."""

    def gather(self) -> None:
        """See `Meeting`."""
        self._guests: dict[int, _Guest] = {}
        self._strangers: list[Connection] = []
        self._require_free_port()
        self._listener = _listening(self.place.port + PORT_OFFSET)
        others = self.identity.machines - 1
        self.told(f"Machine 0 of {self.identity.machines}: waiting for {others} more.")
        self._token = secrets.token_hex(8)
        marker = self.place.folder / MARKER.format(self._token)
        try:
            self.place.folder.mkdir(parents=True, exist_ok=True)
            marker.touch()
            self._wait_for_all()
        except PrefoptError as error:
            refusal = {"type": "refused", "message": str(error), "exit_code": error.exit_code}
            for guest in self._guests.values():
                guest.link.send(refusal)
            raise
        finally:  # a signal comes through here, too
            marker.unlink(missing_ok=True)
        self.processes = self.identity.processes + sum(each.processes for each in self._guests.values())
        for guest in self._guests.values():
            guest.link.send({"type": "go", "processes": self.processes})
            guest.link.listen_from_now()  # they only waited, too
        self.told(f"All {self.identity.machines} machines are there: {self.processes} processes.")

    def close(self) -> None:
        """See `Meeting`."""
        for _, _, link in self._links():
            link.close()
        if hasattr(self, "_listener"):
            self._listener.close()

    def _links(self) -> list[tuple[int, str, Connection]]:
        return [(machine, guest.host, guest.link) for machine, guest in self._guests.items()]

    def _exchange(self) -> None:
        for guest in self._guests.values():
            guest.link.flush()
            for message in guest.link.receive():
                self._hear(message)

    def _ended(self, ending: Ending) -> None:
        if ending.machine in self.endings:
            return
        super()._ended(ending)
        for machine, guest in self._guests.items():
            if machine != ending.machine:
                guest.link.send(ending.to_message())

    def _wait_for_all(self) -> None:
        deadline = time.monotonic() + self.place.timeout
        while not self._complete():
            if time.monotonic() > deadline:
                raise PrefoptError(self._missing())
            self._admit()
            for machine, guest in [*self._guests.items()]:
                for message in guest.link.receive():
                    guest.sees = guest.sees or message.get("type") == "sees"
                    if message.get("type") == "blind":
                        raise UserError(self._not_shared(machine, guest, str(message.get("folder"))))
                if guest.link.closed:
                    del self._guests[machine]  # it may come again
            time.sleep(TICK)

    def _complete(self) -> bool:
        all_there = len(self._guests) == self.identity.machines - 1
        return all_there and all(guest.sees for guest in self._guests.values())

    def _admit(self) -> None:
        with suppress(BlockingIOError):
            self._strangers.append(Connection(self._listener.accept()[0]))
        for stranger in [*self._strangers]:
            for message in stranger.receive():
                if message.get("type") == "hello" and stranger in self._strangers:
                    self._strangers.remove(stranger)
                    self._welcome(stranger, message)
            if stranger.closed and stranger in self._strangers:
                self._strangers.remove(stranger)

    def _welcome(self, link: Connection, said: dict[str, Any]) -> None:
        try:
            machine, guest = whole(said["machine"]), _Guest(link, said)
        except (KeyError, ValueError):
            link.close()
            return
        if machine in self._guests or not 0 < machine < self.identity.machines:
            words = f"launch.machine_rank: there is a machine {machine} already; every machine needs its own"
            link.send({"type": "refused", "message": f"{words}.", "exit_code": UserError.exit_code})
            link.close()
            return
        self._guests[machine] = guest
        self._require_alike(machine, guest, said)
        self.address = self.address or link.socket.getsockname()[0]
        link.send({"type": "welcome", "token": self._token, "host": self.identity.host})
        for each in self._guests.values():
            each.link.send({"type": "there", "count": len(self._guests) + 1})

    def _require_alike(self, machine: int, guest: "_Guest", said: dict[str, Any]) -> None:
        who = f"machine {machine} ({guest.host})"
        if said.get("machines") != self.identity.machines:
            raise UserError(
                f"launch.machines: {self.identity.machines} on machine 0, but {said.get('machines')} on {who}."
            )
        if said.get("versions") != self.identity.versions:
            theirs = printable(said.get("versions"))
            raise UserError(
                f"Machine 0 has {self.identity.versions}, but {who} has {theirs}. Install the same."
            )
        if said.get("recipe") != self.identity.recipe:
            raise UserError(
                f"{who} was started with another recipe than machine 0. Start all with the same recipe and overrides, "
                "but for launch.machine_rank."
            )

    def _missing(self) -> str:
        ranks = [rank for rank in range(1, self.identity.machines) if rank not in self._guests]
        late = f"machine {', '.join(map(str, ranks))} did not come" if ranks else "one did not answer"
        return (
            f"{len(self._guests) + 1} of {self.identity.machines} machines came within {self.place.timeout:.0f} s "
            f"(launch.timeout): {late}. Start the same command there with its own launch.machine_rank, and check that "
            f"ports {self.place.port} and {self.place.port + PORT_OFFSET} of {self.place.host} are open to it."
        )

    def _not_shared(self, machine: int, guest: "_Guest", folder: str) -> str:
        theirs = printable(folder)
        return (
            f"output_dir: machine {machine} ({guest.host}) does not see in {theirs} what machine 0 writes to "
            f"{self.place.folder}. Put output_dir on a disk that all machines share, under the same path."
        )

    def _require_free_port(self) -> None:
        """torchrun's store will listen there; it would wait for a port that is taken, and say little."""
        _listening(self.place.port).close()


class _Guest:
    """A machine that came.

    Raises:
        KeyError, ValueError: what it says is not what a launcher says.
    """

    def __init__(self, link: Connection, said: dict[str, Any]) -> None:
        self.link = link
        self.host = printable(said["host"])[:256]
        self.processes = whole(said["processes"])
        self.sees = False


def _listening(port: int) -> socket.socket:
    """A socket to which others can connect, by IPv4 and, where there is one, IPv6."""
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        found = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024)
    except OSError as error:
        raise UserError(
            f"launch.rendezvous: port {port} of this machine cannot be used ({error.strerror}); another run may have "
            "it. Machines meet at the port of launch.rendezvous and the next one: choose another."
        ) from error
    found.setblocking(False)
    return found
