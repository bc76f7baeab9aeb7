"""SIGTERM where nothing obeys it gently: it interrupts, as Ctrl-C does, so that what was begun is tidied up."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
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

    Raises:
        Terminated: it came.
    """
    try:
        before = signal.signal(signal.SIGTERM, _raise)
    except ValueError:  # Python delivers signals to the main thread only
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated
