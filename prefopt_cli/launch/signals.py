"""SIGTERM where nothing obeys it gently: it interrupts, as Ctrl-C does, so that what was begun is tidied up."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import NoReturn


class Terminated(KeyboardInterrupt):
    """What SIGTERM raises."""


def interrupted_by(error: KeyboardInterrupt) -> signal.Signals:
    """Which signal it was."""
    return signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Within the block, which is the main thread's or changes nothing, SIGTERM interrupts.

    One of several processes is left to end at once: it may be waiting for the others, where Python hears nothing.

    Raises:
        Terminated: it came.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        yield
        return
    try:
        before = signal.signal(signal.SIGTERM, _raise)
        children_hear_sigterm()
    except ValueError:  # Python delivers signals to the main thread only
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


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
