"""The end of a process that has torch: quick, in order, and with the right code."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prefopt_cli.launch.variables import FOLDER
from tests.cli.conftest import environment

LOADED = "import sys; sys.modules['torch'] = None"

LEAVES = """\
import atexit, os, sys, threading, time
from prefopt_cli.launch.leaving import leave

class Late:
    def __del__(self, write=os.write):
        write(1, b"taken apart\\n")

late = Late()
atexit.register(print, "at exit", flush=True)
threading.Thread(target=lambda: (time.sleep(0.3), print("a thread", flush=True))).start()
leave({code!r})
"""

PRINTS = "from prefopt_cli.launch.leaving import leave; print('done'); leave({code!r})"


def left(program: str, **options: object) -> subprocess.CompletedProcess[str]:
    """What came of it, and of what it printed, which Python wants to write at its end."""
    buffered = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run([sys.executable, "-c", program], text=True, env=buffered, timeout=60, **pipes)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(("code", "status"), [(None, 0), (0, 0), (3, 3)])
def test_the_interpreter_is_not_taken_apart(code: object, status: int) -> None:
    done = left(f"{LOADED}\n{LEAVES.format(code=code)}")
    assert (done.returncode, done.stdout, done.stderr) == (status, "a thread\nat exit\n", "")


def test_without_torch_it_is() -> None:
    done = left(LEAVES.format(code=3))
    assert (done.returncode, done.stdout, done.stderr) == (3, "a thread\nat exit\ntaken apart\n", "")


def test_words_in_place_of_a_code_are_told() -> None:
    done = left(f"{LOADED}\n{PRINTS.format(code='words')}")
    assert (done.returncode, done.stdout, done.stderr) == (1, "done\n", "words\n")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_is_not_there(name: str) -> None:
    done = left(f"{LOADED}\nsys.{name} = None\n{PRINTS.format(code=3)}")
    assert (done.returncode, done.stderr) == (3, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_work_does_not_lose_what_was_printed(number: signal.Signals) -> None:
    waits = f"import atexit, os, signal; atexit.register(os.kill, os.getpid(), {number:d})"
    done = left(f"{LOADED}\n{waits}\n{PRINTS.format(code=0)}")
    assert (done.returncode, done.stdout, done.stderr) == (-number, "done\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_the_work_ends_none_of_several_processes(
    number: signal.Signals, tmp_path: Path
) -> None:
    """torchrun sends SIGTERM to those that are still at it when another has failed."""
    waits = f"import atexit, os; atexit.register(os.kill, os.getpid(), {number:d})"
    program = f"{LOADED}\n{waits}\nos.environ['{FOLDER}'] = {str(tmp_path)!r}\n{PRINTS.format(code=3)}"
    assert left(program).returncode == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full device")
@pytest.mark.parametrize(("code", "status"), [(0, 1), (130, 130)])
def test_what_cannot_be_written_is_told(code: int, status: int) -> None:
    with Path("/dev/full").open("w") as full:
        done = left(f"{LOADED}\n{PRINTS.format(code=code)}", stdout=full)
    assert done.returncode == status
    assert done.stderr == "prefopt: standard output cannot be written: No space left on device.\n"
    with Path("/dev/full").open("w") as full:
        assert left(f"{LOADED}\n{PRINTS.format(code=code)}", stdout=full, stderr=full).returncode == status


def test_a_reader_that_has_gone_is_worth_no_words() -> None:
    with subprocess.Popen(["true"], stdin=subprocess.PIPE) as reader:
        reader.wait()
        done = left(f"{LOADED}\n{PRINTS.format(code=0)}", stdout=reader.stdin)
    assert (done.returncode, done.stderr) == (1, "")


def test_temporary_folders_of_libraries_go() -> None:
    makes = "import tempfile; sys.made = tempfile.TemporaryDirectory(); print(sys.made.name)"
    done = left(f"{LOADED}\n{makes}\n{PRINTS.format(code=0)}")
    folder, printed = done.stdout.splitlines()
    assert printed == "done"
    assert not Path(folder).exists()
