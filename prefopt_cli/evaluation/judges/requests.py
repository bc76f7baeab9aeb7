"""Requests to a server that speaks OpenAI's chat completions: patient with servers, quick with mistakes.

Use one `ChatServer` from several threads.
"""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import httpx2

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.evaluation.judges.answers import Completion, Unreadable, completion, quoted, read
from prefopt_cli.evaluation.judges.judging import NoVerdict
from prefopt_cli.evaluation.judges.pace import Pace, Patience, retry_after

T = TypeVar("T")

MAX_TOKENS = 512
"""Of an answer: a sentence or two and the verdict."""

LONGEST_ASKED = 300.0
"""Seconds that a server may ask to be left alone; beyond that, to come back later is better."""

ASKED_AGAIN = 2
"""How often an answer without a plain verdict is asked for again; at temperature 0 more would rarely help."""

RETRIED = {408, 409, 425, 429, *range(500, 600)}
"""HTTP statuses that may go away."""

OF_ONE_QUESTION = {400, 413, 422}
"""HTTP statuses that, from a server that answers other questions, are about this one: it is too long, or filtered."""

CUT_OFF = f"the judge's answer was cut off at max_tokens ({MAX_TOKENS})"

REMEDIES = {
    400: "It does not take the request; the model may not know temperature 0 or max_tokens.",
    401: "Put a valid key into the environment variable OPENAI_API_KEY.",
    403: "The key in OPENAI_API_KEY may not use this model.",
    404: "Check the model's name, and --judge-url, which usually ends in /v1.",
}


PROXIES: tuple[str, ...] = ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
CERTIFICATES: tuple[str, ...] = ("SSL_CERT_FILE", "SSL_CERT_DIR")
"""Environment variables that decide how servers are reached."""


class ServerGone(PrefoptError):
    """No answer after all retries."""


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


class ChatServer:
    """Asks one model, and asks again where that may help."""

    def __init__(
        self, url: str, model: str, key: str | None, patience: Patience, *, probe: str, answered: bool = False
    ) -> None:
        """Nothing is asked yet.

        Args:
            url: of the server.
            model: its name there.
            key: API key, if one is needed.
            patience: how often to try, and how fast.
            probe: a question that any server in order answers.
            answered: whether this server is known to answer.

        Raises:
            UserError: a proxy or certificates that the environment names cannot be used.
        """
        self.endpoint = url if url.endswith("/chat/completions") else f"{url.rstrip('/')}/chat/completions"
        self.counts = Counts()
        self.answered = answered
        self.stop = threading.Event()
        """Set, it makes every thread give up."""
        self._model, self._key, self._patience, self._probe = model, key, patience, probe
        self._pace = Pace(patience.per_minute, self.stop)
        self._lock = threading.Lock()
        self._client = _client(patience.timeout, key)

    def close(self) -> None:
        """Let go of the connections, of those in use too."""
        self._client.close()

    def try_out(self) -> None:
        """Ask the probe; whatever the model says to it will do.

        Raises: as `ask`.
        """
        self.ask(self._probe, lambda text: text)

    def ask(self, prompt: str, accept: Callable[[str], T | None]) -> T | NoVerdict:
        """What `accept` makes of the answer, or why there is none that is acceptable.

        Raises:
            UserError: the server refuses such requests.
            ServerGone: it has not answered, however often it was asked, and answers nothing else either.
            Abandoned: the judging is being stopped.
        """
        try:
            return self._ask(prompt, accept)
        except PrefoptError:
            self.stop.set()  # here, before another thread takes up a question that would be refused, too
            raise

    def _ask(self, prompt: str, accept: Callable[[str], T | None]) -> T | NoVerdict:
        unclear, trouble = 0, _Trouble("")
        for attempt in range(self._patience.retries + 1):
            found = self._counted(prompt, again=attempt > 0)
            if isinstance(found, NoVerdict):
                return found
            if isinstance(found, _Trouble):
                trouble = found
                if attempt < self._patience.retries:
                    self._wait(found, attempt)
                continue
            if found.cut_off:
                return NoVerdict(CUT_OFF)
            accepted = accept(found.text)
            if accepted is not None:
                return accepted
            unclear += 1
            if unclear > ASKED_AGAIN or attempt == self._patience.retries:
                return NoVerdict()
            self._pace.sleep(self._patience.wait(0))
        if self.answered and isinstance(self._counted(self._probe), Completion):
            return NoVerdict(f"the judge's server gave no answer ({trouble.reason})")
        raise ServerGone(f"gave no answer in {self._patience.retries + 1} tries ({trouble.reason})")

    def _wait(self, trouble: _Trouble, attempt: int) -> None:
        asked = trouble.wait or 0.0
        if asked > LONGEST_ASKED:
            raise ServerGone(f"asks to come back in {asked:.0f} s ({trouble.reason})")
        seconds = max(asked, self._patience.wait(attempt))
        if trouble.overloaded:
            self._pace.hold(seconds)
        self._pace.sleep(seconds)

    def _counted(self, prompt: str, *, again: bool = False) -> Completion | NoVerdict | _Trouble:
        """One request, when its turn comes."""
        self._pace.wait()
        with self._lock:
            self.counts.requests += 1
            self.counts.retried += again
        found = self._once(prompt)
        self.answered = self.answered or isinstance(found, Completion)
        return found

    def _once(self, prompt: str) -> Completion | NoVerdict | _Trouble:
        """The model's answer, or why there is none yet, or never will be one."""
        asked = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        body = b""
        try:
            with self._client.stream("POST", self.endpoint, json=asked) as response:
                try:
                    body = read(response, self._patience.timeout)
                except Unreadable as error:
                    if response.is_success:
                        return _Trouble(str(error))
        except httpx2.TimeoutException:
            return _Trouble(f"no answer within {self._patience.timeout:g} s")
        except httpx2.RequestError as error:
            return _Trouble(quoted(str(error), self._key) or type(error).__name__)
        except httpx2.InvalidURL as error:
            raise UserError(f"--judge-url: {quoted(str(error), self._key)}.") from error
        except RuntimeError:
            self._pace.sleep(0)  # the client was closed, as the judging is being stopped
            raise
        if response.status_code in RETRIED:
            wait = retry_after(response.headers.get("retry-after"))
            return _Trouble(f"HTTP status {response.status_code}", wait, response.status_code == 429)
        if not response.is_success:
            return self._refused(response, body)
        return completion(body) or _Trouble("its answers are no chat completions in JSON")

    def _refused(self, response: httpx2.Response, body: bytes) -> NoVerdict:
        """Of one question alone.

        Raises:
            UserError: the server would refuse the others, too.
        """
        status = response.status_code
        words = body.decode("utf-8", errors="replace")
        if response.is_redirect:
            words = f"it lies at {response.headers.get('location')}"
        said = quoted(words, self._key)
        if status in OF_ONE_QUESTION and self.answered:
            return NoVerdict(
                f"the judge's server refuses it (HTTP status {status}){f': {said}' if said else ''}"
            )
        raise UserError(
            f"The judge's server refuses to answer (HTTP status {status} from {self.endpoint}). "
            + REMEDIES.get(status, "Check --judge-url.")
            + (f" It says: {said}" if said else "")
        )


def _client(timeout: float, key: str | None) -> httpx2.Client:
    """Connections, through a proxy where the environment names one.

    Raises:
        UserError: what the environment names cannot be used.
    """
    headers = {"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        return httpx2.Client(timeout=timeout, headers=headers)
    except (ValueError, ImportError, OSError, httpx2.InvalidURL) as error:
        if isinstance(error, OSError):
            why = error.strerror or "no certificates"
        elif isinstance(error, ImportError):
            why = "a SOCKS proxy needs the package socksio"
        else:
            why = "no address of a proxy"
        among = CERTIFICATES if isinstance(error, OSError) else PROXIES
        names = [name for each in among for name in (each, each.lower()) if os.environ.get(name)]
        raise UserError(
            f"The environment variable {' or '.join(names)} cannot be used for requests to the judge ({why}). Set it "
            "anew, or unset it."
        ) from error
