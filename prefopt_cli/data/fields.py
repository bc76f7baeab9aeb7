"""The cells of a row: texts, messages and numbers, or the reason why they are none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prefopt_cli.data.examples import Message
from prefopt_cli.data.receipt import MALFORMED

Row = Mapping[str, Any]


class Unfit(Exception):
    """This row cannot be read in this format, or not be used; the message is the receipt's reason."""


def text(value: Any, name: str) -> str:
    """``value`` if it is text. ``name`` says in the reason what it is. Raises Unfit."""
    if not isinstance(value, str):
        raise Unfit(f"{MALFORMED}: {name} is {kind(value)}, not text")
    return value


def messages(value: Any, name: str) -> list[Message]:
    """``value`` if it is a list of messages, without their empty keys. Raises Unfit."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise Unfit(f"{MALFORMED}: {name} is {kind(value)}, not messages")
    # datasets gives every message every key that any message has; templates ask whether a key is there.
    found = [{key: part for key, part in message.items() if part is not None} for message in value]
    if not all(isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in found):
        raise Unfit(f"{MALFORMED}: a message in {name} lacks a text role or content")
    return found


def response(found: Sequence[Message], name: str) -> list[Message]:
    """A response is the assistant's to start and to end, so that its tokens are what a policy generates.

    Raises Unfit.
    """
    if not found or found[0]["role"] != "assistant" or found[-1]["role"] != "assistant":
        raise Unfit(f"{MALFORMED}: {name} does not start and end with an assistant message")
    return list(found)


def numbers(value: Any, name: str, count: int) -> list[float]:
    """``value`` if it is a list of ``count`` finite numbers, one per response. Raises Unfit."""
    if not isinstance(value, list):
        raise Unfit(f"{MALFORMED}: {name} is {kind(value)}, not a list of numbers")
    for entry in value:
        if isinstance(entry, bool) or not isinstance(entry, int | float):
            raise Unfit(f"{MALFORMED}: an entry of {name} is {kind(entry)}, not a number")
        if not abs(entry) < math.inf:
            raise Unfit(f"{MALFORMED}: an entry of {name} is not a finite number")
    if len(value) != count:
        raise Unfit(f"{MALFORMED}: {name} has {len(value)} entries, but there are {count} responses")
    return value


def position(value: Any, name: str, count: int) -> int:
    """``value`` if it is a whole number that counts one of ``count`` responses from 0. Raises Unfit."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole:
        found = "a fraction" if isinstance(value, float) else kind(value)
        raise Unfit(f"{MALFORMED}: {name} is {found}, not a whole number")
    if not 0 <= value < count:
        raise Unfit(f"{MALFORMED}: {name} is {int(value)}, but there are {count} responses")
    return int(value)


def kind(value: Any) -> str:
    """A value's type in words: text, number, messages, list of text, ..."""
    if isinstance(value, list):
        if value and isinstance(value[0], dict):
            return "messages" if "role" in value[0] else "list of objects"
        return f"list of {kind(value[0])}" if value else "an empty list"
    names = {
        str: "text",
        bool: "true/false",
        int: "number",
        float: "number",
        dict: "object",
        type(None): "nothing",
    }
    return names.get(type(value), type(value).__name__)
