"""A judge behind an OpenAI-compatible server: says which of two replies is better, by a rubric."""

import hashlib
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.evaluation.judges.cache import VerdictCache, verdict_key
from prefopt_cli.evaluation.judges.judging import JudgingStopped, NoVerdict, Question, Verdict
from prefopt_cli.evaluation.judges.pace import Abandoned, Patience
from prefopt_cli.evaluation.judges.requests import MAX_TOKENS, ChatServer, ServerGone
from prefopt_cli.evaluation.judges.rubric import RUBRIC, filled, parsed
from prefopt_cli.training.reporting import Reporter

POLL = 0.2
"""Seconds between looks for a signal."""

PROBE = Question("What is two and two?", "Four.", "Five.")
"""Finds out whether the server answers at all."""

Found = tuple[str, Verdict | NoVerdict | BaseException]
"""What became of the question with this key."""


def require_url(url: str) -> str:
    """Refuse what is no address of a server, or has a secret in it.

    Raises:
        UserError: see above.
    """
    try:
        parts = urlsplit(url)
        has_host = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        has_host = False
    if not has_host:
        raise UserError(
            f"--judge-url: {url!r} is no address of a server. Write one such as http://localhost:8000/v1."
        )
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            "--judge-url: write the address alone, as http://localhost:8000/v1. A key goes into the environment "
            "variable OPENAI_API_KEY."
        )
    return url.rstrip("/")


class OpenAIJudge:
    """Asks a model behind a server; what is in the cache is not asked again."""

    def __init__(
        self,
        model: str,
        url: str,
        *,
        key: str | None = None,
        rubric: str = RUBRIC,
        patience: Patience | None = None,
        cache: VerdictCache | None = None,
    ) -> None:
        """Nothing is asked yet.

        Args:
            model: its name at the server.
            url: of the server, such as http://localhost:8000/v1.
            key: API key, if one is needed; it goes nowhere but to the server.
            rubric: what the judge is asked, with {prompt}, {a} and {b}.
            patience: how often to try, and how fast.
            cache: of verdicts; without one, the user's own.

        Raises:
            UserError: the URL or the key cannot be used.
        """
        key = (key or "").strip()
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError("OPENAI_API_KEY holds characters that no API key has. Set it anew, or unset it.")
        self._model, self._url, self._rubric = model, require_url(url), rubric
        self._key = key or None
        self._patience = patience or Patience()
        self._cache = cache
        self._answered = False
        self._found = {"requests": 0, "retried": 0, "cached": 0, "failed": 0}

    def check(self) -> None:
        """Ask one small question, to find a wrong address, key or model before there is anything to judge.

        Raises:
            UserError: the server refuses to answer.
            PrefoptError: it does not answer.
        """
        server = self._server()
        try:
            server.try_out()
        except ServerGone as error:
            raise PrefoptError(f"The judge at {self._url} {error}.") from error
        finally:
            self._close(server)

    def verdicts(
        self, questions: Sequence[Question], reporter: Reporter, stopping: Callable[[], bool] = lambda: False
    ) -> list[Verdict | NoVerdict]:
        """See `Judge`; a verdict is in the cache as soon as it is there.

        Raises:
            UserError: the server refuses to answer.
            PrefoptError: it does not answer any more.
            JudgingStopped: a signal came.
        """
        cache = self._cache or VerdictCache(reporter.message)
        keys = [self._cache_key(question) for question in questions]
        todo = {
            key: question for key, question in zip(keys, questions, strict=True) if cache.get(key) is None
        }
        known = len(set(keys)) - len(todo)
        self._found["cached"] += known
        missing: dict[str, NoVerdict] = {}
        if todo:
            more = f"; {known} more are in the cache." if known else "."
            reporter.message(f"Asking {self._model} at {self._url}: {len(todo)} questions{more}")
            missing = self._ask_all(todo, known, cache, reporter, stopping)
        self._found["failed"] += len(missing)
        return [cache.get(key) or missing[key] for key in keys]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "judge": f"openai:{self._model}",
            "url": self._url,
            "rubric_sha256": hashlib.sha256(self._rubric.encode()).hexdigest(),
            **self._found,
        }

    def _cache_key(self, question: Question) -> str:
        return verdict_key(
            url=self._url,
            model=self._model,
            rubric=self._rubric,
            prompt=question.prompt,
            a=question.first,
            b=question.second,
            temperature=0,
            max_tokens=MAX_TOKENS,
        )

    def _server(self) -> ChatServer:
        probe = filled(self._rubric, PROBE)
        return ChatServer(
            self._url, self._model, self._key, self._patience, probe=probe, answered=self._answered
        )

    def _close(self, server: ChatServer) -> None:
        server.stop.set()
        server.close()
        self._answered = server.answered
        self._found["requests"] += server.counts.requests
        self._found["retried"] += server.counts.retried

    def _ask_all(
        self,
        todo: Mapping[str, Question],
        known: int,
        cache: VerdictCache,
        reporter: Reporter,
        stopping: Callable[[], bool],
    ) -> dict[str, NoVerdict]:
        """Put what is found into the cache, and return why the rest has no verdict."""
        server = self._server()
        questions: SimpleQueue[tuple[str, Question]] = SimpleQueue()
        for each in todo.items():
            questions.put(each)
        answers: SimpleQueue[Found] = SimpleQueue()
        for _ in range(min(self._patience.concurrency, len(todo))):
            # Daemons, which a server that keeps them waiting cannot make the command wait for at its end.
            threading.Thread(target=self._work, args=(server, questions, answers), daemon=True).start()
        try:
            return self._collect(server, answers, len(todo), cache, reporter, stopping)
        except ServerGone as error:
            there = known + sum(cache.get(key) is not None for key in todo)
            raise PrefoptError(
                f"The judge at {self._url} {error}. {there} of {known + len(todo)} verdicts are in the cache; the "
                "same command goes on from there."
            ) from error
        finally:
            self._close(server)

    def _work(
        self,
        server: ChatServer,
        questions: "SimpleQueue[tuple[str, Question]]",
        answers: "SimpleQueue[Found]",
    ) -> None:
        """One thread: question after question."""
        while True:
            try:
                key, question = questions.get_nowait()
            except Empty:
                return
            try:
                answers.put((key, server.ask(filled(self._rubric, question), parsed)))
            except BaseException as error:
                answers.put((key, error))

    def _collect(
        self,
        server: ChatServer,
        answers: "SimpleQueue[Found]",
        count: int,
        cache: VerdictCache,
        reporter: Reporter,
        stopping: Callable[[], bool],
    ) -> dict[str, NoVerdict]:
        """Keep the verdicts as they come. Where the judging ends early, those on their way have a little while."""
        missing: dict[str, NoVerdict] = {}
        left, end = count, math.inf
        failure: BaseException | None = None
        while left and time.monotonic() < end:
            key, found = _next(answers)
            left -= found is not None
            if isinstance(found, Verdict):
                cache.put(key, found)
            elif isinstance(found, NoVerdict):
                missing[key] = found
            elif isinstance(found, BaseException) and not isinstance(found, Abandoned):
                failure = failure or found
            if failure is None and left and stopping():
                failure = JudgingStopped()
            if failure is not None and not math.isfinite(end):
                server.stop.set()
                end = time.monotonic() + self._patience.grace
            reporter.progress("judging", count - left, count)
        if failure is not None:
            raise failure
        return missing


def _next(answers: "SimpleQueue[Found]") -> Found | tuple[str, None]:
    """What there is next; nothing after a while, so that a signal is seen."""
    try:
        return answers.get(timeout=POLL)
    except Empty:
        return "", None
