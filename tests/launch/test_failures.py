"""Which failure is told, and in what words."""

import errno
import json
import signal
from pathlib import Path

import pytest

from prefopt_cli.errors import PrefoptError
from prefopt_cli.launch.connection import CONNECTION_LOST, is_connection_loss
from prefopt_cli.launch.ending import Ending, vanished
from prefopt_cli.launch.failures import (
    Failure,
    ended_without_words,
    first_failure,
    read_failures,
    write_failure,
)

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:8342"


def test_a_cause_is_told_before_its_consequences() -> None:
    lost = Failure(CONNECTION_LOST, kind="consequence", rank=0, time=1.0)
    killed = ended_without_words(1, -signal.SIGKILL)
    assert first_failure([lost, killed]) is killed
    said = Failure("the disk is full", rank=2, time=9.0)
    later = Failure("another", rank=3, time=10.0)
    assert first_failure([lost, killed, later, said]) is said
    assert first_failure([lost]) is lost
    assert first_failure([]) is None


def test_signals_have_names() -> None:
    told = ended_without_words(1, -9).told(processes=2, machines=1)
    assert told == "rank 1 of 2: it was killed by signal 9 (SIGKILL); the system may have run out of memory."
    assert "(SIGSEGV)." in ended_without_words(0, -11).message
    # NCCL aborts those whose peers are gone; so something else explains more.
    assert ended_without_words(0, -6).kind == "silent"


def test_the_machine_is_named_where_there_are_several() -> None:
    failure = Failure("no.", rank=3, machine=1, host="gpu02")
    assert failure.told(processes=8, machines=2) == "rank 3 of 8 (machine 1, gpu02): no."


def test_failures_are_passed_on_in_files(tmp_path: Path) -> None:
    failure = Failure("the disk is full", 1, rank=1, host="here", time=3.5)
    write_failure(tmp_path, failure)
    assert read_failures(tmp_path) == [failure]


def wrapped(error: Exception) -> Exception:
    try:
        try:
            raise error
        except Exception as cause:
            raise PrefoptError("something failed") from cause
    except PrefoptError as outer:
        return outer


@pytest.mark.parametrize("wrap", [lambda error: error, wrapped])
def test_lost_connections_are_known(wrap) -> None:
    import torch

    assert is_connection_loss(wrap(RuntimeError(GLOO)))
    assert is_connection_loss(wrap(torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp")))
    assert not is_connection_loss(wrap(RuntimeError("shapes do not match")))
    assert not is_connection_loss(wrap(OSError(errno.ENOSPC, "No space left on device")))


def test_endings_travel_between_machines() -> None:
    own = Ending(1, "gpu02", 1, None, Failure("out of\x1b[31m memory", rank=3))
    found = Ending.from_message(own.to_message())
    assert found.failure is not None
    assert "\x1b" not in found.failure.message, "a terminal would obey it"
    assert (found.machine, found.host, found.failed, found.failure.rank) == (1, "gpu02", True, 3)
    failure = own.to_message()["failure"]
    for nonsense in (
        {},
        {"type": "end", "machine": "x"},
        {**own.to_message(), "failure": {"message": 3}},
        {**own.to_message(), "machine": 10**400},
        {**own.to_message(), "exit_code": [1]},
        {**own.to_message(), "failure": {**failure, "exit_code": 10**400}},
        {**own.to_message(), "failure": {**failure, "exit_code": "1"}},
        {**own.to_message(), "failure": {**failure, "exit_code": 1.5}},
    ):
        with pytest.raises(ValueError, match="not a"):
            Ending.from_message(nonsense)


def test_a_machine_that_vanished() -> None:
    assert "ended without a word" in vanished(1, "gpu02").failure.message
    assert "silent for 300 s" in vanished(1, "gpu02", 300).failure.message


def test_halves_of_characters_can_be_printed() -> None:
    """JSON can name them, and no terminal takes them."""
    own = Ending(1, "gpu\ud800", 1, None, Failure("out of \udfff memory"))
    found = Ending.from_message(json.loads(json.dumps(own.to_message())))
    assert found.failure is not None
    assert (found.host + found.failure.message).encode()
