"""Signals where nothing obeys them gently: they interrupt, so that what was begun is tidied up."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType

LOOKS_EVERY = 0.02
"""Seconds between two looks whether an import is over."""

IMPORTS = "<frozen importlib._bootstrap>"
"""The file that Python names for its import system."""


class Terminated(KeyboardInterrupt):
    """What SIGTERM raises."""


def interrupted_by(error: KeyboardInterrupt) -> signal.Signals:
    """Which signal it was."""
    return signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT


class Interrupting:
    """A handler that interrupts the main thread, but waits while that imports a module.

    Libraries turn what is raised while they are imported into errors of their own, or stay half imported for those who
    tidy up. A second signal waits no longer.
    """

    def __init__(self) -> None:
        self.raised: KeyboardInterrupt | None = None
        """What this handler raised last."""
        self._waiting: list[int] = []
        """The signal that waits, at most one; whoever takes it out, deals with it."""

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Interrupt.

        Raises:
            KeyboardInterrupt: the number is SIGINT's.
            Terminated: it is SIGTERM's.
        """
        if self.forget() is None and _imports(frame):
            self._waiting.append(number)
            threading.Thread(target=self._again_after_the_import, daemon=True).start()
            return
        self.raised = Terminated() if number == signal.SIGTERM else KeyboardInterrupt()
        raise self.raised

    def forget(self) -> int | None:
        """Let go of the signal that waits, if there is one, and return its number."""
        try:
            return self._waiting.pop()
        except IndexError:
            return None

    def _again_after_the_import(self) -> None:
        main = threading.main_thread().ident or 0
        while self._waiting and _imports(sys._current_frames().get(main)):
            time.sleep(LOOKS_EVERY)
        number = self.forget()
        if number is not None:
            signal.pthread_kill(main, number)  # a real signal, which ends what sleeps


INTERRUPTING = Interrupting()
"""Of this process."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, which is the main thread's or changes nothing, SIGTERM interrupts as Ctrl-C does.

    A signal that is ignored already stays so. One of several processes is left to end at once by SIGTERM: it may be
    waiting for the others, where Python hears nothing.

    Raises:
        KeyboardInterrupt: Ctrl-C.
        Terminated: SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    INTERRUPTING.raised = None
    numbers = (signal.SIGINT, signal.SIGTERM) if alone else (signal.SIGINT,)
    heard = [
        number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN
    ]  # as `nohup` and `&` have it
    before = {number: signal.signal(number, INTERRUPTING) for number in heard}
    if alone:
        children_hear_sigterm()
    try:
        yield
    finally:
        INTERRUPTING.forget()  # too late: all is done
        for number, handler in before.items():
            signal.signal(number, handler)


def end_by_exit_code() -> None:
    """Let the process end with its exit code after an interruption.

    Python ends itself by SIGINT once a KeyboardInterrupt has come through code compiled from a string, as the methods
    of data classes are, whoever caught it later; until the next such code has run.
    """
    exec("")


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported in this frame or above it."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORTS:
            return True
        frame = frame.f_back
    return False


@cache
def children_hear_sigterm() -> None:
    """Let SIGTERM end processes forked from this one, such as data loaders, whatever it does here.

    It is held back while they are made: Python would lose one that came between a handler and its removal.
    """
    before = threading.local()

    def hold() -> None:
        before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before.mask)

    def hear_again() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        release()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=hold, after_in_parent=release, after_in_child=hear_again)
