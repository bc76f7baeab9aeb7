"""The end of a process that has worked with torch."""

import atexit
import errno
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import NoReturn

from prefopt_cli.launch import worker
from prefopt_cli.launch.signals import INTERRUPTING


def leave(code: object) -> NoReturn:
    """End the process as `sys.exit` does, without taking the interpreter apart where torch is loaded.

    Threads of torch's and arrow's may be about to let go of something of Python's; an interpreter that is being taken
    apart ends such a thread where C++ cannot bear it, and the process aborts when all its work is done. Everything that
    is registered for the end of the process is done all the same.

    Args:
        code: what SystemExit carries.

    Raises:
        SystemExit: torch is not loaded.
    """
    if "torch" not in sys.modules:
        raise SystemExit(code)
    status = code if isinstance(code, int) else int(code is not None)
    try:
        if status != code and code is not None:
            _tell(str(code))
        status = _flushed(status)
        _hear_no_more()
        # What Python itself does first, and in this order. tests/launch/test_leaving.py guards both names.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        status = _flushed(status)
    finally:
        os._exit(status)


def _hear_no_more() -> None:
    """The work is done: one of several processes ends in peace, another by the signal itself."""
    INTERRUPTING.forget()
    if worker.launched():
        worker.stay_stopped()
    elif signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _flushed(status: int) -> int:
    """The exit code once what was printed is written; 1 instead of 0 where it cannot be."""
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.EPIPE:  # the reader has gone, as that of `| head`
            _tell(f"prefopt: standard output cannot be written: {error.strerror}.")
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # once is enough
        return status or 1
    return status


def _tell(message: str) -> None:
    with suppress(OSError, ValueError):
        print(message, file=sys.stderr, flush=True)
