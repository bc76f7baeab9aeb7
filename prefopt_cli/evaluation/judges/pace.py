"""How fast and how often a server is asked."""

import math
import random
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


class Abandoned(Exception):
    """The judging is being stopped."""


@dataclass(frozen=True)
class Patience:
    """How long and how often to try. Times in seconds."""

    retries: int = 5
    """Requests after the first one."""
    backoff: float = 1.0
    """Before the first retry; doubled from one to the next, and shortened at random by up to a half."""
    longest: float = 60.0
    """The longest such wait."""
    timeout: float = 60.0
    """For a connection, for every part of an answer, and for all of it."""
    grace: float = 5.0
    """What requests under way have left to bring their answers in, once the judging ends early."""
    per_minute: float | None = None
    """The most requests, retries included."""
    concurrency: int = 4
    """Requests at the same time."""

    def wait(self, attempt: int) -> float:
        """Before a retry, of which `attempt` counts from 0."""
        return min(self.longest, self.backoff * 2**attempt) * random.uniform(0.5, 1)


class Pace:
    """Lets requests go one after the other, at most so many a minute."""

    def __init__(self, per_minute: float | None, stop: threading.Event) -> None:
        self._between = 60 / per_minute if per_minute else 0.0
        self._stop = stop
        self._lock = threading.Lock()
        self._next = time.monotonic()

    def wait(self) -> None:
        """Until it is this thread's turn.

        Raises:
            Abandoned: the judging is being stopped.
        """
        while True:
            with self._lock:
                now = time.monotonic()
                left = self._next - now
                if left <= 0:
                    self._next = now + self._between
                    break
            self.sleep(left)
        self.sleep(0)

    def hold(self, seconds: float) -> None:
        """Let no request go for so long."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)

    def sleep(self, seconds: float) -> None:
        """Of one thread alone. Raises Abandoned where the judging is being stopped."""
        if self._stop.wait(seconds) if seconds > 0 else self._stop.is_set():
            raise Abandoned


def retry_after(value: str | None) -> float | None:
    """Seconds to wait, of a Retry-After header: a number of them, or a date. None where it says nothing."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            moment = parsedate_to_datetime(value)
        except ValueError:
            return None
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        seconds = (moment - datetime.now(UTC)).total_seconds()
    return max(seconds, 0.0) if math.isfinite(seconds) else None
