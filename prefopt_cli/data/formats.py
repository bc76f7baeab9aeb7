"""The shapes preference rows come in, one function each: row -> prompt and responses, the best first.

A format is one function and one line in ``FORMATS``. The function either returns an example or raises
``Unfit`` with a reason that goes into the receipt; detection simply tries the functions in the
table's order, so no format is described twice. Formats of lists are in ``formats_lists``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from prefopt_cli.data.examples import Example, Text, shared_length
from prefopt_cli.data.fields import Row, Unfit, kind, messages, response, text
from prefopt_cli.data.formats_lists import best_of_n, ranked, scored
from prefopt_cli.data.receipt import MALFORMED, NO_SHARED_PROMPT
from prefopt_cli.errors import UserError

ASSISTANT_TURN = "\n\nAssistant:"
WORD_SEARCH = 40
"""How many characters to look back for the start of a word; scripts without spaces have none."""


def standard(row: Row) -> Example:
    """``prompt``, ``chosen`` and ``rejected`` strings."""
    prompt, chosen, rejected = (text(row.get(column), column) for column in ("prompt", "chosen", "rejected"))
    return _pair(prompt, chosen, rejected)


def conversational(row: Row) -> Example:
    """``prompt``, ``chosen`` and ``rejected`` message lists; responses may repeat the prompt in front."""
    prompt, chosen, rejected = (
        messages(row.get(column), column) for column in ("prompt", "chosen", "rejected")
    )
    if chosen[: len(prompt)] == rejected[: len(prompt)] == prompt:
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return _pair(prompt, response(chosen, "chosen"), response(rejected, "rejected"))


def implicit_conversational(row: Row) -> Example:
    """``chosen`` and ``rejected`` message lists whose shared first messages are the prompt.

    A ``prompt`` string beside them is used where the lists begin with the assistant; elsewhere (as in
    UltraFeedback) it only repeats their first message.
    """
    chosen, rejected = messages(row.get("chosen"), "chosen"), messages(row.get("rejected"), "rejected")
    shared = 0
    # The last message is always response: identical dialogues are to be counted as such, not as malformed.
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    prompt = chosen[:shared]
    if chosen[0]["role"] == rejected[0]["role"] == "assistant" and isinstance(row.get("prompt"), str):
        prompt = [{"role": "user", "content": row["prompt"]}, *prompt]
    if not prompt:
        raise Unfit(NO_SHARED_PROMPT)
    return _pair(prompt, response(chosen[shared:], "chosen"), response(rejected[shared:], "rejected"))


def hh_transcript(row: Row) -> Example:
    """Anthropic's transcripts: the prompt runs to and includes the last shared ``\\n\\nAssistant:``."""
    chosen, rejected = text(row.get("chosen"), "chosen"), text(row.get("rejected"), "rejected")
    if not chosen.startswith("\n\nHuman:") or ASSISTANT_TURN not in chosen:
        raise Unfit(f"{MALFORMED}: chosen is not a Human/Assistant transcript")
    turn = chosen.rfind(ASSISTANT_TURN, 0, shared_length(chosen, rejected))
    if turn < 0:
        raise Unfit(NO_SHARED_PROMPT)
    cut = turn + len(ASSISTANT_TURN)
    return _pair(chosen[:cut], chosen[cut:], rejected[cut:])


def implicit_standard(row: Row) -> Example:
    """``chosen`` and ``rejected`` strings whose shared beginning, up to a word's start, is the prompt."""
    chosen, rejected = text(row.get("chosen"), "chosen"), text(row.get("rejected"), "rejected")
    cut = _word_start(chosen, shared_length(chosen, rejected))
    if not chosen[:cut].strip():
        raise Unfit(NO_SHARED_PROMPT)
    return _pair(chosen[:cut], chosen[cut:], rejected[cut:])


def _pair(prompt: Text, chosen: Text, rejected: Text) -> Example:
    return Example(prompt, (chosen, rejected), (0, 1))


def _word_start(words: str, cut: int) -> int:
    """The last place at or before ``cut`` where a word starts, a single space being part of the word."""
    for start in range(cut, max(cut - WORD_SEARCH, 0), -1):
        if words[start - 1].isspace():
            return start - 1 if words[start - 1] == " " else start
    return cut


def prompt_only(row: Row) -> Example:
    """A ``prompt`` string, or a ``prompt`` message list that the assistant has to answer; no responses."""
    asked = row.get("prompt")
    if not isinstance(asked, list):
        if kind(row.get("chosen")) == "messages":  # the string only repeats the first of the messages
            raise Unfit(f"{MALFORMED}: prompt is not messages, but chosen is")
        return Example(text(asked, "prompt"), (), ())
    return Example(messages(asked, "prompt"), (), ())


class Format(NamedTuple):
    """How a row is read, and what it must look like, for error messages.

    ``lists``: rows hold a list of responses, of which unusable ones can be left out. ``columns``: where a row has
    all of these, this is the format that was meant.
    """

    read: Callable[[Row], Example]
    expects: str
    lists: bool = False
    columns: tuple[str, ...] = ()


LISTED = ("prompt", "responses")
LISTS = "prompt: text or messages, responses: a list of them"

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
    "ranked": Format(ranked, f"{LISTS}, ranking: a number each, lower is better", True, (*LISTED, "ranking")),
    "scored": Format(scored, f"{LISTS}, scores: a number each, higher is better", True, (*LISTED, "scores")),
    "best_of_n": Format(best_of_n, f"{LISTS}, best: the number of the best, from 0", True, (*LISTED, "best")),
}
"""Tried in this order: every transcript would also be read as implicit_standard."""

PROMPT = "prompt"
"""Format of rows that are read for their prompt alone."""

PROMPT_FORMATS = {
    PROMPT: Format(prompt_only, "prompt: text or a list of messages"),
    **{name: FORMATS[name] for name in ("implicit_conversational", "hh_transcript", "implicit_standard")},
}
"""The formats of such rows: wherever a prompt column is, nothing else needs to be right."""


def detect(rows: Sequence[Row], where: str, formats: Mapping[str, Format] = FORMATS) -> str:
    """The first of ``formats`` that reads most of ``rows``, else the one that reads the most of them.

    Raises:
        UserError: no format reads a single row; the message names the columns found in ``where``.
    """
    fits = {name: sum(_fits(format, row) for row in rows) for name, format in formats.items()}
    most = [name for name, count in fits.items() if 2 * count > len(rows)]
    best = most[0] if most else max(fits, key=lambda name: fits[name])
    if not fits[best]:
        meant = next((name for name, each in formats.items() if _has_columns(rows, each)), "auto")
        reason = _commonest_reason(rows, formats[meant]) if meant in formats else ""
        raise UserError(unfit_message(rows, where, meant, reason, formats))
    return best


def _has_columns(rows: Sequence[Row], format: Format) -> bool:
    return bool(format.columns) and set(format.columns) <= set(rows[0])


def _commonest_reason(rows: Sequence[Row], format: Format) -> str:
    """Why the rows cannot be read in a format that reads none of them."""
    reasons: Counter[str] = Counter()
    for row in rows:
        try:
            format.read(row)
        except Unfit as reason:
            reasons[str(reason)] += 1
    return reasons.most_common(1)[0][0]


def _fits(format: Format, row: Row) -> bool:
    try:
        format.read(row)
    except Unfit:
        return False
    return True


def unfit_message(
    rows: Sequence[Row],
    where: str,
    format: str,
    reason: str = "",
    formats: Mapping[str, Format] = FORMATS,
) -> str:
    """Says which columns are there, which ``format`` (auto: any) expects, and how to bring them together."""
    found = ", ".join(f"{name} ({_kind_in(rows, name)})" for name in rows[0])
    names = list(formats) if format == "auto" else [format]
    wanted = "\n".join(f"    {name:<24} {formats[name].expects}" for name in names)
    because = f" ({reason})" if reason else ""
    problem = "no format fits its rows" if format == "auto" else f"no row can be read as {format}{because}"
    hint = "  rename columns with `columns: {prompt: <your column>, ...}` or choose another `format:`"
    if format in formats and _has_columns(rows, formats[format]):
        hint = "  the columns are there; mend their values, or choose another `format:`"
    return f"{where}: {problem}\n  columns found: {found}\n  expected:\n{wanted}\n{hint}"


def _kind_in(rows: Sequence[Row], column: str) -> str:
    return next((kind(row[column]) for row in rows if row.get(column) is not None), "nothing")
