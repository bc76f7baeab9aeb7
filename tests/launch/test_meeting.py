"""Launchers of several machines, met over this machine's own network."""

import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.launch import meeting_guest
from prefopt_cli.launch.ending import Ending
from prefopt_cli.launch.failures import Failure
from prefopt_cli.launch.meeting import Identity, Meeting, Place
from prefopt_cli.launch.meeting_guest import Guest
from prefopt_cli.launch.meeting_hub import Hub
from tests.ports import free_ports


@pytest.fixture
def meet(tmp_path: Path) -> Any:
    """`meet(machines, **changes of a rank)` -> the machines' sides, gathered or with what they raised."""
    sides: list[Meeting] = []

    def start(
        machines: int,
        *,
        timeout: float = 20,
        present: Callable[[int], bool] = lambda rank: True,
        **other: Any,
    ) -> list[Future[Meeting]]:
        place = Place("127.0.0.1", free_ports(), timeout, tmp_path)

        def gathered(rank: int) -> Meeting:
            identity = Identity(rank, machines, 2, f"host{rank}", "prefopt 1, torch 2", "digest")
            identity = replace(identity, **other.get(f"rank{rank}", {}))
            here = replace(place, folder=other.get(f"folder{rank}", tmp_path))
            side = (Hub if rank == 0 else Guest)(identity, here, lambda _: None)
            sides.append(side)
            try:
                side.gather()
            except PrefoptError:
                side.close()
                raise
            return side

        with ThreadPoolExecutor(machines) as pool:
            return [pool.submit(gathered, rank) for rank in range(machines) if present(rank)]

    yield start
    for side in sides:
        side.close()


def beats(side: Meeting, until: Callable[[], bool], seconds: float = 10) -> list[Ending]:
    found: list[Ending] = []
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        found += side.beat()
        time.sleep(0.02)
    return found


def test_machines_find_one_another(meet: Any, tmp_path: Path) -> None:
    sides = [each.result() for each in meet(3)]
    assert [side.processes for side in sides] == [6, 6, 6]
    assert [side.address for side in sides][1] == "127.0.0.1"
    assert not [*tmp_path.iterdir()], "the file by which they see the same disk is gone"


def test_all_hear_of_a_failure(meet: Any) -> None:
    hub, first, second = (each.result() for each in meet(3))
    failure = Failure("out of memory", rank=3, machine=1)
    threading.Thread(target=first.part, args=(Ending(1, "host1", 1, None, failure),)).start()
    at_hub = beats(hub, lambda: 1 in hub.endings)
    at_other = beats(second, lambda: 1 in second.endings)
    for heard in (at_hub, at_other):
        assert [each.machine for each in heard] == [1]
        assert heard[0].failure is not None
        assert heard[0].failure.message == "out of memory"


@pytest.mark.parametrize("gone", [0, 1])
def test_a_machine_that_goes_without_a_word(meet: Any, gone: int) -> None:
    sides = [each.result() for each in meet(2)]
    sides[gone].close()
    heard = beats(sides[1 - gone], lambda: bool(sides[1 - gone].endings))
    assert heard[0].failure is not None
    assert f"machine {gone} (host{gone}) ended without a word" in heard[0].failure.message


def test_a_machine_that_falls_silent(meet: Any) -> None:
    hub, _ = (each.result() for each in meet(2, timeout=2.4))
    heard = beats(hub, lambda: bool(hub.endings))
    assert heard[0].failure is not None
    assert "silent for 2 s" in heard[0].failure.message


def test_a_signal_is_passed_on_to_all(meet: Any) -> None:
    hub, first, second = (each.result() for each in meet(3))
    first.ask_to_stop(15)
    beats(hub, lambda: hub.stop is not None)
    beats(second, lambda: second.stop is not None)
    assert (hub.stop, second.stop) == (15, 15)


def test_those_that_are_done_wait_for_the_others(meet: Any) -> None:
    hub, guest = (each.result() for each in meet(2))
    with ThreadPoolExecutor(2) as pool:
        done = pool.submit(hub.part, Ending(0, "host0", 0, 2))
        time.sleep(0.5)
        assert not done.done()
        pool.submit(guest.part, Ending(1, "host1")).result(10)
        done.result(10)
    assert guest.endings[0].signal == 2
    assert not hub.endings[1].failed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"recipe": "other"}, r"machine 1 \(host1\) was started with another recipe than machine 0"),
        ({"versions": "prefopt 0"}, r"but machine 1 \(host1\) has prefopt 0"),
        ({"machines": 4}, "2 on machine 0, but 4 on machine 1"),
    ],
)
def test_machines_that_do_not_fit(meet: Any, changes: dict[str, Any], words: str) -> None:
    for each in meet(2, rank1=changes):
        with pytest.raises(UserError, match=words):
            each.result()


def test_every_machine_needs_a_rank_of_its_own(meet: Any) -> None:
    late, hub = [], meet(3, timeout=3, rank2={"machine": 1})
    for each in hub:
        try:
            each.result()
        except PrefoptError as error:
            late.append(str(error))
    assert any("there is a machine 1 already" in words for words in late)
    assert any("machine 2 did not come" in words for words in late)


def test_a_disk_that_is_not_shared(meet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting_guest, "SEEN_WITHIN", 0.3)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for each in meet(2, folder1=elsewhere):
        with pytest.raises(
            UserError, match=r"output_dir: machine 1 .* does not see in .*elsewhere what machine 0"
        ):
            each.result()


def test_a_machine_that_never_comes(meet: Any) -> None:
    (alone,) = meet(2, timeout=1, present=lambda rank: rank == 0)
    with pytest.raises(PrefoptError, match="1 of 2 machines came within 1 s") as caught:
        alone.result()
    assert caught.value.exit_code == 1
    (late,) = meet(2, timeout=1, present=lambda rank: rank == 1)
    with pytest.raises(PrefoptError, match=r"was not reached at 127\.0\.0\.1:.*Connection refused"):
        late.result()


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        hub = Hub(Identity(0, 2, 1, "here", "", ""), Place("127.0.0.1", port, 5, tmp_path), lambda _: None)
        with pytest.raises(UserError, match=f"port {port} of this machine cannot be used"):
            hub.gather()


def test_strangers_are_not_heard(meet: Any, tmp_path: Path) -> None:
    port = free_ports()
    hub = Hub(Identity(0, 2, 1, "here", "v", "r"), Place("127.0.0.1", port, 10, tmp_path), lambda _: None)
    guest = Guest(
        Identity(1, 2, 1, "there", "v", "r"), Place("127.0.0.1", port, 10, tmp_path), lambda _: None
    )
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(hub.gather)
        time.sleep(0.3)
        for junk in (
            b"GET / HTTP/1.1\r\n\r\n",
            b'{"type": "hello"}\n',
            b"[1, 2]\n",
            b"[" * 50_000 + b"\n",
            b'{"type": "hello", "machine": 1e999, "host": "x", "processes": 1}\n',
            b'{"type": "hello", "machine": 1, "host": "x", "processes": [1]}\n',
        ):
            with socket.create_connection(("127.0.0.1", port + 1)) as stranger:
                stranger.sendall(junk)
                time.sleep(0.2)
        pool.submit(guest.gather).result(10)
        waiting.result(10)
    hub.close()
    guest.close()


def test_the_wait_for_others_is_no_silence(tmp_path: Path) -> None:
    place = Place("127.0.0.1", free_ports(), 3, tmp_path)
    hub, early, late = (
        (Hub if rank == 0 else Guest)(Identity(rank, 3, 1, f"host{rank}", "v", "r"), place, lambda _: None)
        for rank in range(3)
    )
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(side.gather) for side in (hub, early)]
        time.sleep(2)
        for each in [*waiting, pool.submit(late.gather)]:
            each.result(10)
    try:
        time.sleep(1.3)  # in which processes are started
        assert not hub.beat()
        assert not hub.endings
    finally:
        for side in (hub, early, late):
            side.close()


def test_a_stranger_in_the_place_of_machine_0(tmp_path: Path) -> None:
    port = free_ports()
    guest = Guest(Identity(1, 2, 1, "there", "v", "r"), Place("127.0.0.1", port, 5, tmp_path), lambda _: None)
    nonsense = (
        b'{"type": "welcome"}\n{"type": "welcome", "host": 1, "token": "../x"}\n{"type": "there", "count": [1]}\n'
        b'{"type": "go", "processes": null}\n{"type": "stop", "signal": 9}\n'
    )
    with socket.create_server(("127.0.0.1", port + 1)) as server, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(guest.gather)
        stranger, _ = server.accept()
        with stranger:
            stranger.sendall(nonsense)
            time.sleep(0.5)
        with pytest.raises(PrefoptError, match="ended before all machines were there"):
            waiting.result(10)
    assert guest.stop is None
    guest.close()
