"""torchrun's agent, as prefopt's launcher starts it: `python -m prefopt_cli.launch.agent`, with torchrun's arguments.

It is torchrun, but ends with the launcher, leaves signals to it, keeps its log out of the way, and writes down how
its processes ended.
"""

import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from prefopt_cli.launch.variables import AGENT, FOLDER, LAUNCHER
from prefopt_cli.launch.worker import LOOKS_EVERY, lives_under

RESULT_FILE = "agent.json"
LOG_FILE = "torchrun.log"

FAILING_FILE = "failing"
"""There from when torchrun sees that a process has failed; it may take half a minute to end the others."""


def main(arguments: list[str]) -> None:
    """Run torchrun; the exit code is 0 if all its processes end with 0."""
    folder, launcher = Path(os.environ[FOLDER]), os.environ[LAUNCHER]
    # Ignored in the workers too, until they are ready to hear.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ[AGENT] = str(os.getpid())
    logging.getLogger("torch.distributed.elastic").addHandler(_Failing(folder / FAILING_FILE))
    result: dict[str, Any] = {}
    # Torch's loggers and warnings write to what this is when they are made; workers inherit the real one.
    with (folder / LOG_FILE).open("w", encoding="utf-8", buffering=1) as log:
        if "--debug" not in arguments:
            sys.stderr = log
        # Where it is not the main thread, torchrun takes no signals.
        torchrun = threading.Thread(target=_torchrun, args=(arguments, result), daemon=True)
        torchrun.start()
        while torchrun.is_alive():
            torchrun.join(LOOKS_EVERY)
            if not lives_under(launcher):
                _end_children()
                shutil.rmtree(folder, ignore_errors=True)
                os._exit(1)
        sys.stderr = sys.__stderr__
    beside = folder / f".{RESULT_FILE}"
    beside.write_text(json.dumps(result), encoding="utf-8")
    beside.replace(folder / RESULT_FILE)
    os._exit(0 if not result else 1)  # torch's threads have nothing left to do


class _Failing(logging.Handler):
    """Leaves a file when torchrun says that it ends processes, for which it gives no other sign."""

    def __init__(self, file: Path) -> None:
        super().__init__(logging.WARNING)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or "closing signal" in record.getMessage():
            self._file.touch()


def _torchrun(arguments: list[str], result: dict[str, Any]) -> None:
    try:
        from torch.distributed import run
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        return
    try:
        run.main(arguments)
    except ChildFailedError as error:
        result["failures"] = [
            {"rank": rank, "exit_code": failure.exitcode, "time": failure.timestamp}
            for rank, failure in error.failures.items()
        ]
    except BaseException as error:  # SystemExit too: torchrun's parser
        result["error"] = f"{type(error).__name__}: {error}"
        print(time.strftime("%X"), result["error"], file=sys.stderr)


def _end_children() -> None:
    import psutil

    for child in psutil.Process().children(recursive=True):
        child.kill()


if __name__ == "__main__":
    main(sys.argv[1:])
