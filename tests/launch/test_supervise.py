"""What a launch makes of how its processes ended, with processes that only leave what real ones would."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from prefopt_cli.launch import supervise as supervising
from prefopt_cli.launch.agent import RESULT_FILE
from prefopt_cli.launch.ending import Ending
from prefopt_cli.launch.failures import Failure, write_failure
from prefopt_cli.launch.meeting import Identity, Place
from prefopt_cli.launch.meeting_guest import Guest
from prefopt_cli.launch.plan import LaunchPlan, plan_launch
from prefopt_cli.launch.processes import Processes
from prefopt_cli.launch.supervise import Ended, supervise
from prefopt_cli.recipe.launch_settings import LaunchSettings
from tests.cli.conftest import environment
from tests.ports import free_ports


def planned(**settings: Any) -> LaunchPlan:
    found = plan_launch(
        LaunchSettings(processes=2, **settings), ["train", "r.yaml"], use_cpu=True, environ={}
    )
    assert found is not None
    return found


def ended(
    monkeypatch: pytest.MonkeyPatch,
    codes: dict[int, int],
    *said: Failure,
    received: tuple[int, ...] = (),
) -> Ended:
    """How a launch ends whose processes leave these exit codes by rank, and these words, after these signals."""

    class Left:
        killed_at = None

        def __init__(self, plan: LaunchPlan, folder: Path, *, debug: bool) -> None:
            failures = [
                {"rank": rank, "exit_code": code, "time": time.time()} for rank, code in codes.items()
            ]
            (folder / RESULT_FILE).write_text(json.dumps({"failures": failures}))
            for failure in said:
                write_failure(folder, failure)
            for number in received:
                signal.raise_signal(number)

        def exit_code(self) -> int:
            return 1

        def kill(self) -> None:
            pass

    monkeypatch.setattr(supervising, "Processes", Left)
    return supervise(planned(), told=lambda _: None)


@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("code", [-2, -15, 130, 143])
def test_who_dies_of_the_signal_was_interrupted(
    received: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ended(monkeypatch, {0: code, 1: code}, received=(received,))
    assert (found.ending.exit_code, found.message) == (128 + received, "Interrupted.")
    assert found.output is None


def test_the_loss_of_one_that_was_interrupted_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Failure("Interrupted.", 130, rank=0), Failure("lost.", kind="consequence", rank=1)
    found = ended(monkeypatch, {0: 130, 1: 1}, *words, received=(15,))
    assert (found.ending.exit_code, found.message) == (143, "Interrupted.")


def test_an_error_after_a_signal_is_still_told(monkeypatch: pytest.MonkeyPatch) -> None:
    words = Failure("Interrupted.", 130, rank=0), Failure("the disk is full", rank=1)
    found = ended(monkeypatch, {0: 130, 1: 1}, *words, received=(2,))
    assert (found.ending.exit_code, found.message) == (1, "rank 1 of 2: the disk is full")


def test_a_signal_that_another_machine_passes_on_first_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm sends it to every machine, and the first one to hear tells the others; then it comes here, too."""
    asked = []

    class Working:
        killed_at = None

        def __init__(self, plan: LaunchPlan, folder: Path, *, debug: bool) -> None:
            self.looks = 0

        def interrupt(self) -> bool:
            asked.append("stop")
            return True

        def exit_code(self) -> int | None:
            self.looks += 1
            if self.looks == 5:
                signal.raise_signal(signal.SIGTERM)
            return 0 if self.looks > 10 else None

        def kill(self) -> None:
            pass

    class Heard(Guest):
        def gather(self) -> None:
            self.stop = signal.SIGTERM

        def beat(self) -> list[Ending]:
            return []

    monkeypatch.setattr(supervising, "Processes", Working)
    meeting = Heard(Identity(1, 2, 2, "here", "", ""), Place("127.0.0.1", 1, 1, tmp_path), lambda _: None)
    found = supervise(planned(), told=lambda _: None, meeting=meeting)
    assert asked == ["stop"]
    assert (found.ending.exit_code, found.ending.signal, found.message) == (0, signal.SIGTERM, None)


@pytest.mark.parametrize(
    ("code", "words"), [(-2, "killed by signal 2 (SIGINT)"), (130, "ended with exit code 130")]
)
def test_without_a_signal_to_the_launcher_it_is_a_failure(
    code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ended(monkeypatch, {1: code})
    assert found.ending.exit_code == 1
    assert words in str(found.message)


def test_other_machines_do_not_take_the_wait_for_an_agent_for_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubborn = tmp_path / "agent"
    stubborn.write_text("#!/bin/sh\nexec sleep 30\n")
    stubborn.chmod(0o755)
    plan = planned(machines=2, rendezvous="127.0.0.1:29500", timeout=3)
    monkeypatch.setattr(sys, "executable", str(stubborn))
    processes = Processes(plan, tmp_path, debug=False)
    begun = time.monotonic()
    processes.kill()
    assert time.monotonic() - begun < 3
    assert processes.exit_code() is not None


GATHERS = """\
import sys
from pathlib import Path
from prefopt_cli.cli import main
from prefopt_cli.launch.meeting import Identity, Place
from prefopt_cli.launch.meeting_hub import Hub
from prefopt_cli.launch.plan import LaunchPlan
from prefopt_cli.launch.supervise import supervise

def gather(*_, **__):
    plan = LaunchPlan(("train", "x.yaml"), {}, processes=2, machines=2)
    place = Place("127.0.0.1", int(port), 60, Path(folder))
    hub = Hub(Identity(0, 2, 2, "here", "", ""), place, print)
    supervise(plan, told=print, meeting=hub)

import prefopt_cli.recipe
prefopt_cli.recipe.load_recipe = gather
port, folder = sys.argv[1:]
sys.argv[1:] = ["train", "x.yaml"]
main.main()
"""
"""Machine 0 of two, whose recipe is not the point."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_machines_are_waited_for_leaves_nothing_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", GATHERS, str(free_ports()), str(tmp_path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    end = time.monotonic() + 30
    while not [*tmp_path.iterdir()]:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (128 + number, "prefopt: Interrupted.\n")
    assert not [*tmp_path.iterdir()], "the file by which machines see the same disk"
