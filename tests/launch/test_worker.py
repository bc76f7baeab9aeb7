"""What a process under the launcher does with those above it, and with signals that come late."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefopt_cli.launch import worker
from prefopt_cli.launch.variables import AGENT, FOLDER
from tests.cli.conftest import (
    Prefopt,
    environment,
    prefopt,  # noqa: F401  (the fixture)
)

CHILD = """\
import sys, time
from pathlib import Path
from prefopt_cli.launch.worker import lives_under
parent, answers = sys.argv[1], Path(sys.argv[2])
answers.joinpath("first").write_text(str(lives_under(parent)))
end = time.monotonic() + 10
while lives_under(parent) and time.monotonic() < end:
    time.sleep(0.05)
answers.joinpath("second").write_text(str(lives_under(parent)))
"""

PARENT = """\
import os, pathlib, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1], str(os.getpid()), sys.argv[2]])
while not pathlib.Path(sys.argv[2], "first").exists():
    time.sleep(0.05)
os._exit(0)
"""


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put back as they were."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_parent_that_ends_is_noticed(tmp_path: Path) -> None:
    assert worker.lives_under(str(os.getppid()))
    # The child has the pipe, too: it is closed once both have ended.
    subprocess.run(
        [sys.executable, "-c", PARENT, CHILD, str(tmp_path)],
        env=environment(),
        stdout=subprocess.PIPE,
        timeout=30,
        check=True,
    )
    assert [(tmp_path / name).read_text() for name in ("first", "second")] == ["True", "False"]


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_all_have_agreed_to_stop_ends_nothing(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from prefopt_cli.training.callbacks import stopping_gently

    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv(AGENT, "1")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with stopping_gently() as stop:
        stop.hear(signal.SIGTERM)
    signal.raise_signal(number)
    # Python gives handlers up when it ends, and goes on ignoring what is ignored.
    assert signal.getsignal(number) is signal.SIG_IGN


@pytest.mark.usefixtures("handlers")
def test_without_a_stop_a_signal_still_interrupts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from prefopt_cli.training.callbacks import stopping_gently

    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv(AGENT, "1")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with stopping_gently():
        pass
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_folder_without_a_launcher(
    prefopt: Prefopt,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.delenv(AGENT, raising=False)
    result = prefopt("recipe", "list")
    assert result.code == 2
    assert "unset PREFOPT_LAUNCH" in result.err
    assert not [*tmp_path.iterdir()], "there is nobody to read it"
