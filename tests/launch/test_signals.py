"""Signals to a command that obeys none gently, above all while libraries are imported."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefopt_cli.launch.signals import INTERRUPTING, interruptible
from tests.cli.conftest import environment

LIBRARY = """\
import time

print("importing", flush=True)
until = time.monotonic() + {seconds}
try:
    while time.monotonic() < until:
        time.sleep(0.01)
except BaseException:
    raise RuntimeError("initialization failed")
print("imported", flush=True)
"""
"""A library that makes an error of its own of whatever is raised while it is imported."""

COMMAND = """\
import signal, sys, time
import prefopt_cli.recipe

def load_recipe(*_):
    {body}
    print("imported all", flush=True)
    time.sleep(60)

prefopt_cli.recipe.load_recipe = load_recipe
sys.argv[1:] = ["check", "x.yaml"]
from prefopt_cli.cli.main import main
main()
"""

NUMBERS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


def command(folder: Path, body: str, *start: str) -> subprocess.Popen[str]:
    """A command that does this in place of reading its recipe; run as a module, as many start Python programs."""
    (folder / "entry.py").write_text(COMMAND.format(body=body))
    return subprocess.Popen(
        [sys.executable, *(start or ("-m", "entry"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=environment(),
    )


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@NUMBERS
def test_an_import_is_ended_first(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "library.py").write_text(LIBRARY.format(seconds=1))
    process = command(tmp_path, "import library")
    wait_for(process, "importing")
    process.send_signal(number)
    code, out, err = end(process)
    assert (code, err) == (128 + number, "prefopt: Interrupted.\n")
    assert out.startswith("imported\n")


def test_imports_that_follow_at_once_are_each_ended(tmp_path: Path) -> None:
    """The signal is heard between them or after them all, but never within one."""
    for each in range(40):
        (tmp_path / f"library{each}.py").write_text(LIBRARY.format(seconds=0.02))
    process = command(tmp_path, "[__import__(f'library{each}') for each in range(40)]")
    wait_for(process, "importing")
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    assert (code, err) == (130, "prefopt: Interrupted.\n")


@NUMBERS
def test_a_second_signal_does_not_wait_for_an_import(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "library.py").write_text(LIBRARY.format(seconds=60))
    process = command(tmp_path, "import library")
    wait_for(process, "importing")
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.send_signal(number)
    code, out, err = end(process)
    assert (code, out, err) == (128 + number, "", "prefopt: Interrupted.\n"), (
        "not what the library has made of it"
    )


def test_tidying_up_after_a_second_signal_is_not_interrupted_by_the_first(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text(LIBRARY.format(seconds=60))
    tidies = "\n    ".join(["try: import library", "finally: time.sleep(0.5); print('tidied', flush=True)"])
    process = command(tmp_path, tidies)
    wait_for(process, "importing")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "tidied\n", "prefopt: Interrupted.\n")


def test_a_signal_in_a_last_import_comes_in_time_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text(LIBRARY.format(seconds=0.5))
    process = command(tmp_path, "import library; sys.exit()")
    wait_for(process, "importing")
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    assert (code, err) in {(0, ""), (130, "prefopt: Interrupted.\n")}


def test_the_exit_code_after_an_interruption_of_code_from_a_string(tmp_path: Path) -> None:
    """Upon which Python would end itself by the signal."""
    code, _, err = end(command(tmp_path, "exec('raise KeyboardInterrupt')"))
    assert (code, err) == (130, "prefopt: Interrupted.\n")


def test_what_is_ignored_stays_so(tmp_path: Path) -> None:
    """As SIGINT is in what a script starts in the background."""
    program = (
        f"import signal, runpy; signal.signal({signal.SIGINT:d}, signal.SIG_IGN); runpy.run_path('entry.py')"
    )
    process = command(tmp_path, "pass", "-c", program)
    wait_for(process, "imported all")
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert end(process)[0] == 143


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with interruptible():
        assert signal.getsignal(signal.SIGTERM) is INTERRUPTING
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
