"""The shapes preference rows come in, one function each: row -> (prompt, chosen, rejected).

A format is one function and one line in ``FORMATS``. The function either returns a pair or raises
``Unfit`` with a reason that goes into the receipt; detection simply tries the functions in the
table's order, so no format is described twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from prefopt_cli.data.examples import Message, Text, shared_length
from prefopt_cli.data.receipt import MALFORMED, NO_SHARED_PROMPT
from prefopt_cli.errors import UserError

Row = Mapping[str, Any]
Example = tuple[Text, Text, Text]
"""Prompt, chosen, rejected: all strings or all message lists."""

ASSISTANT_TURN = "\n\nAssistant:"
LISTED = "responses"
"""Column of rows that rank several responses, or name the best of them."""
WORD_SEARCH = 40
"""How many characters to look back for the start of a word; scripts without spaces have none."""


class Unfit(Exception):
    """This row cannot be read in this format; the message is the receipt's reason."""


def _text(row: Row, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise Unfit(f"{MALFORMED}: {column} is {kind(value)}, not text")
    return value


def _messages(row: Row, column: str) -> list[Message]:
    value = row.get(column)
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise Unfit(f"{MALFORMED}: {column} is {kind(value)}, not messages")
    # datasets gives every message every key that any message has; templates ask whether a key is there.
    messages = [{key: part for key, part in message.items() if part is not None} for message in value]
    if not all(isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages):
        raise Unfit(f"{MALFORMED}: a message in {column} lacks a text role or content")
    return messages


def _response(messages: Sequence[Message], column: str) -> list[Message]:
    """A response is the assistant's to start and to end, so that its tokens are what a policy generates."""
    if not messages or messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise Unfit(f"{MALFORMED}: {column} does not start and end with an assistant message")
    return list(messages)


def standard(row: Row) -> Example:
    """``prompt``, ``chosen`` and ``rejected`` strings."""
    return _text(row, "prompt"), _text(row, "chosen"), _text(row, "rejected")


def conversational(row: Row) -> Example:
    """``prompt``, ``chosen`` and ``rejected`` message lists; responses may repeat the prompt in front."""
    prompt, chosen, rejected = (_messages(row, column) for column in ("prompt", "chosen", "rejected"))
    if chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return prompt, _response(chosen, "chosen"), _response(rejected, "rejected")


def implicit_conversational(row: Row) -> Example:
    """``chosen`` and ``rejected`` message lists whose shared first messages are the prompt.

    A ``prompt`` string beside them is used where the lists begin with the assistant; elsewhere (as in
    UltraFeedback) it only repeats their first message.
    """
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    shared = 0
    # The last message is always response: identical dialogues are to be counted as such, not as malformed.
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = chosen[:shared]
    if chosen[0]["role"] == rejected[0]["role"] == "assistant" and isinstance(row.get("prompt"), str):
        prompt = [{"role": "user", "content": row["prompt"]}, *prompt]
    if not prompt:
        raise Unfit(NO_SHARED_PROMPT)
    return prompt, _response(chosen[shared:], "chosen"), _response(rejected[shared:], "rejected")


def hh_transcript(row: Row) -> Example:
    """Anthropic's transcripts: the prompt runs to and includes the last shared ``\\n\\nAssistant:``."""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if not chosen.startswith("\n\nHuman:") or ASSISTANT_TURN not in chosen:
        raise Unfit(f"{MALFORMED}: chosen is not a Human/Assistant transcript")
    turn = chosen.rfind(ASSISTANT_TURN, 0, shared_length(chosen, rejected))
    if turn < 0:
        raise Unfit(NO_SHARED_PROMPT)
    cut = turn + len(ASSISTANT_TURN)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def implicit_standard(row: Row) -> Example:
    """``chosen`` and ``rejected`` strings whose shared beginning, up to a word's start, is the prompt."""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    cut = _word_start(chosen, shared_length(chosen, rejected))
    if not chosen[:cut].strip():
        raise Unfit(NO_SHARED_PROMPT)
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _word_start(text: str, cut: int) -> int:
    """The last place at or before ``cut`` where a word starts, a single space being part of the word."""
    for start in range(cut, max(cut - WORD_SEARCH, 0), -1):
        if text[start - 1].isspace():
            return start - 1 if text[start - 1] == " " else start
    return cut


class Format(NamedTuple):
    """How a row is read, and what it must look like, for error messages."""

    read: Callable[[Row], Example]
    expects: str


FORMATS = {
    "standard": Format(standard, "prompt, chosen, rejected: text"),
    "conversational": Format(conversational, "prompt, chosen, rejected: lists of messages"),
    "implicit_conversational": Format(
        implicit_conversational, "chosen, rejected: lists of messages that start alike"
    ),
    "hh_transcript": Format(
        hh_transcript, r"chosen, rejected: '\n\nHuman: ...\n\nAssistant: ...' that start alike"
    ),
    "implicit_standard": Format(implicit_standard, "chosen, rejected: text that starts alike"),
}
"""Tried in this order: every transcript would also be read as implicit_standard."""


def detect(rows: Sequence[Row], where: str) -> str:
    """The first format that reads most of ``rows``, else the one that reads the most of them.

    Raises:
        UserError: no format reads a single row; the message names the columns found in ``where``.
    """
    fits = {name: sum(_fits(format, row) for row in rows) for name, format in FORMATS.items()}
    most = [name for name, count in fits.items() if 2 * count > len(rows)]
    best = most[0] if most else max(fits, key=lambda name: fits[name])
    if not fits[best]:
        raise UserError(unfit_message(rows, where, "auto"))
    return best


def _fits(format: Format, row: Row) -> bool:
    try:
        format.read(row)
    except Unfit:
        return False
    return True


def unfit_message(rows: Sequence[Row], where: str, format: str, reason: str = "") -> str:
    """Says which columns are there, which ``format`` (auto: any) expects, and how to bring them together."""
    found = ", ".join(f"{name} ({_kind_in(rows, name)})" for name in rows[0])
    if "chosen" not in rows[0] and LISTED in rows[0] and _kind_in(rows, LISTED) == "list of text":
        return (
            f"{where}: its rows compare whole lists of responses, and only pairs can be trained on\n"
            f"  columns found: {found}\n"
            "  choose a `config:` whose rows have chosen and rejected, or make pairs of the lists"
        )
    names = list(FORMATS) if format == "auto" else [format]
    wanted = "\n".join(f"    {name:<24} {FORMATS[name].expects}" for name in names)
    because = f" ({reason})" if reason else ""
    problem = "no format fits its rows" if format == "auto" else f"no row can be read as {format}{because}"
    return (
        f"{where}: {problem}\n"
        f"  columns found: {found}\n"
        f"  expected:\n{wanted}\n"
        "  rename columns with `columns: {prompt: <your column>, ...}` or choose another `format:`"
    )


def _kind_in(rows: Sequence[Row], column: str) -> str:
    return next((kind(row[column]) for row in rows if row.get(column) is not None), "nothing")


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
