"""The end of a process that has worked with torch."""

import atexit
import errno
import os
import signal
import sys
import threading
from typing import NoReturn


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
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    status = code if isinstance(code, int) else int(code is not None)
    # What Python itself does first, and in this order. tests/launch/test_leaving.py guards both names.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        if error.errno != errno.EPIPE:  # the reader has gone, as that of `| head`
            print(f"prefopt: standard output cannot be written: {error.strerror}.", file=sys.stderr)
        status = status or 1
    sys.stderr.flush()
    os._exit(status)
