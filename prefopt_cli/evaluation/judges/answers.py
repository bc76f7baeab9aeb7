"""What comes back from a judge's server: read with a limit to its time and size, and told with the key masked."""

import json
import time
from dataclasses import dataclass
from typing import Any

import httpx2

from prefopt_cli.evaluation.judges.printable import printable

LONGEST = 1_000_000
"""Bytes of an answer."""

SHOWN = 300
"""Characters of a server's own words in a message."""


class Unreadable(Exception):
    """An answer that is too long, or takes too long."""


@dataclass(frozen=True)
class Completion:
    """What the model wrote."""

    text: str
    cut_off: bool
    """Whether it had to end at max_tokens."""


def read(response: httpx2.Response, seconds: float) -> bytes:
    """The body of an answer that is being streamed.

    The client's own timeout begins anew with every part of an answer, so that one in small parts would never end.

    Raises:
        Unreadable: it is longer than 1 MB, or has not ended after so many seconds.
    """
    deadline = time.monotonic() + seconds
    body = bytearray()
    for part in response.iter_bytes():
        body += part
        if len(body) > LONGEST:
            raise Unreadable(f"its answer is longer than {LONGEST // 1_000_000} MB")
        if time.monotonic() > deadline:
            raise Unreadable("its answer does not come to an end in time")
    return bytes(body)


def completion(body: bytes) -> Completion | None:
    """The model's words, empty where there are none; None where this is no chat completion in JSON."""
    try:
        choices = json.loads(body)["choices"]
        if not choices:
            return Completion("", False)
        content = choices[0]["message"].get("content")
        return Completion(_text(content), choices[0].get("finish_reason") == "length")
    # A nested answer may be too deep for the parser.
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None


def _text(content: Any) -> str:
    """Of a content that is one text, or a list of parts."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def quoted(words: str, key: str | None) -> str:
    """A server's own words for a message: in one line, fit for a terminal, cut off only after the key is masked."""
    line = " ".join(words.split())
    if key:
        line = line.replace(key, "***")
    return printable(line)[:SHOWN]
