"""Requests to a server that speaks OpenAI's chat completions: patient with servers, quick with mistakes.

Use one `ChatServer` from several threads.
"""

import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx2

from prefopt_cli.errors import PrefoptError, UserError

T = TypeVar("T")

MAX_TOKENS = 512
"""Of an answer: a sentence or two and the verdict."""

LONGEST_ASKED = 300.0
"""Seconds that a server may ask to be left alone; beyond that, to come back later is better."""

SHOWN = 300
"""Characters of a server's own words in a message."""

RETRIED = {408, 409, 425, 429, *range(500, 600)}
"""HTTP statuses that may go away."""

REMEDIES = {
    400: "It does not take the request; the model may not know temperature 0 or max_tokens.",
    401: "Put a valid key into the environment variable OPENAI_API_KEY.",
    403: "The key in OPENAI_API_KEY may not use this model.",
    404: "Check the model's name, and --judge-url, which usually ends in /v1.",
}


class ServerGone(PrefoptError):
    """No answer after all retries."""


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
    """For a connection, and for every part of an answer."""
    per_minute: float | None = None
    """The most requests, retries included."""
    concurrency: int = 4
    """Requests at the same time."""

    def wait(self, attempt: int) -> float:
        """Before a retry, of which `attempt` counts from 0."""
        return min(self.longest, self.backoff * 2**attempt) * random.uniform(0.5, 1)


@dataclass
class Counts:
    """What was asked of the server."""

    requests: int = 0
    retried: int = 0
    """Of the requests: those after the first one for the same question."""


@dataclass(frozen=True)
class _Trouble:
    """An attempt that may go better later."""

    reason: str
    wait: float | None = None
    """Seconds that the server asks for."""
    overloaded: bool = False
    """Whether all requests had better wait, not this one alone."""


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


class ChatServer:
    """Asks one model, and asks again where that may help."""

    def __init__(self, url: str, model: str, key: str | None, patience: Patience) -> None:
        self.endpoint = url if url.endswith("/chat/completions") else f"{url.rstrip('/')}/chat/completions"
        self.counts = Counts()
        self.stop = threading.Event()
        """Set, it makes every thread give up."""
        self._model, self._key, self._patience = model, key, patience
        self._pace = Pace(patience.per_minute, self.stop)
        self._lock = threading.Lock()
        self._client = httpx2.Client(
            timeout=patience.timeout, headers={"Authorization": f"Bearer {key}"} if key else {}
        )

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def ask(self, prompt: str, accept: Callable[[str], T | None]) -> T | None:
        """What `accept` makes of the answer; None where no answer was acceptable.

        Raises:
            UserError: the server refuses such requests.
            ServerGone: it has not answered, however often it was asked.
            Abandoned: the judging is being stopped.
        """
        found: str | _Trouble = ""
        for attempt in range(self._patience.retries + 1):
            self._pace.wait()
            with self._lock:
                self.counts.requests += 1
                self.counts.retried += attempt > 0
            found = self._once(prompt)
            if isinstance(found, str):
                accepted = accept(found)
                if accepted is not None:
                    return accepted
            elif attempt < self._patience.retries:
                self._wait(found, attempt)
        if isinstance(found, _Trouble):
            raise ServerGone(f"gave no answer in {self._patience.retries + 1} tries ({found.reason})")
        return None

    def _wait(self, trouble: _Trouble, attempt: int) -> None:
        seconds = self._patience.wait(attempt) if trouble.wait is None else trouble.wait
        if seconds > LONGEST_ASKED:
            raise ServerGone(f"asks to come back in {seconds:.0f} s ({trouble.reason})")
        if trouble.overloaded:
            self._pace.hold(seconds)
        self._pace.sleep(seconds)

    def _once(self, prompt: str) -> str | _Trouble:
        """The model's answer, or why there is none yet."""
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        try:
            response = self._client.post(self.endpoint, json=body)
        except httpx2.TimeoutException:
            return _Trouble(f"no answer within {self._patience.timeout:g} s")
        except httpx2.RequestError as error:
            return _Trouble(" ".join(str(error).split()) or type(error).__name__)
        except httpx2.InvalidURL as error:
            raise UserError(f"--judge-url: {error}.") from error
        if response.status_code in RETRIED:
            wait = retry_after(response.headers.get("retry-after"))
            return _Trouble(f"HTTP status {response.status_code}", wait, response.status_code == 429)
        if not response.is_success:
            raise self._refused(response)
        return _content(response)

    def _refused(self, response: httpx2.Response) -> UserError:
        said = " ".join(response.text.split())[:SHOWN]
        if self._key:
            said = said.replace(self._key, "***")
        remedy = REMEDIES.get(response.status_code, "Check --judge-url.")
        if response.is_redirect:
            said = f"it lies at {response.headers.get('location')}"
        return UserError(
            f"The judge's server refuses to answer (HTTP status {response.status_code} from {self.endpoint}). {remedy}"
            + (f" It says: {said}" if said else "")
        )


def _content(response: httpx2.Response) -> str | _Trouble:
    """The answer's text, empty where there is none."""
    try:
        found: Any = response.json()
        choices = found["choices"]
        content = choices[0]["message"].get("content") if choices else ""
    except (ValueError, LookupError, TypeError, AttributeError):
        return _Trouble("its answers are no chat completions in JSON")
    return content if isinstance(content, str) else ""


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
