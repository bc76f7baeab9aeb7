"""What ``sandbox:...`` names mean; light, so that a recipe's names are judged before anything is imported.

::

    sandbox:base                        the base policy
    sandbox:polite                      preferences by politeness
    sandbox:polite/temperature=0.5      less noisy labels
    sandbox:base/seed=1                 another world: other prompts, another base policy
"""

import difflib
from dataclasses import dataclass

from prefopt_cli.errors import UserError

SCHEME = "sandbox"
BASE = "base"

DIMENSIONS = {
    "helpful": "the remedy that the problem asks for, the item by its name, and when",
    "polite": "greeting, sympathy and thanks; rude sentences count against it",
    "concise": "few words; kind sentences, and helpful details, cost some",
}
"""What can be preferred, and what makes a reply good in it."""

KINDS = ("pairs", "best_of_n", "ranked")
"""Shapes of preference rows, chosen by ``config:``; the first is the default."""

SPLITS = ("train", "test")

LARGEST_SEED = 2**32 - 1
"""What is drawn with seeds derived from a world's must stay within torch's 64 bits."""


@dataclass(frozen=True)
class BaseName:
    """The base policy of one world."""

    seed: int = 0


@dataclass(frozen=True)
class PreferencesName:
    """Preferences of one world by one dimension."""

    dimension: str
    temperature: float = 1.0
    """Of the Bradley-Terry or Plackett-Luce labels; 0: no noise."""
    seed: int = 0


def parse_model(name: str) -> BaseName:
    """The policy that the part after ``sandbox:`` names.

    Raises:
        UserError: there is no such policy; the message says which there is.
    """
    what, _, settings = name.partition("/")
    if what != BASE:
        hint = f" {SCHEME}:{what} is a dataset." if what in DIMENSIONS else ""
        raise UserError(f"{SCHEME}:{name}: the sandbox's only model is {SCHEME}:{BASE}.{hint}")
    return BaseName(**_settings(name, settings, {"seed": _seed}))


def parse_dataset(name: str, config: str | None = None) -> PreferencesName:
    """The preferences that the part after ``sandbox:`` names.

    Raises:
        UserError: there is no such dimension, setting or kind of rows; the message says which there are.
    """
    what, _, settings = name.partition("/")
    if what not in DIMENSIONS:
        hint = f" {SCHEME}:{BASE} is the model." if what == BASE else _near(what, DIMENSIONS)
        raise UserError(
            f"{SCHEME}:{name}: the sandbox has no dimension {what!r}; it has {', '.join(DIMENSIONS)}.{hint}"
        )
    if config is not None and config not in KINDS:
        raise UserError(
            f"{SCHEME}:{name}: config: {config} is no kind of its rows; they come as {', '.join(KINDS)}."
            f"{_near(config, KINDS)}"
        )
    found = _settings(name, settings, {"seed": _seed, "temperature": _temperature})
    return PreferencesName(what, **found)


def _settings(name: str, text: str, known: dict) -> dict:
    found = {}
    for part in text.split("/") if text else ():
        key, equals, value = part.partition("=")
        if key not in known or not equals:
            raise UserError(
                f"{SCHEME}:{name}: {part!r} is no setting; write {' or '.join(f'{key}=...' for key in known)} "
                f"after a slash.{_near(key, known)}"
            )
        if key in found:
            raise UserError(f"{SCHEME}:{name}: {key} is given twice.")
        try:
            found[key] = known[key](value)
        except ValueError as error:
            raise UserError(f"{SCHEME}:{name}: {key} must be {error}, not {value!r}.") from error
    return found


def _seed(text: str) -> int:
    # Longer ones are not even read: Python refuses thousands of digits in words of its own.
    digits = text.isascii() and text.isdigit() and len(text) <= len(str(LARGEST_SEED))
    if not digits or int(text) > LARGEST_SEED:
        raise ValueError(f"a whole number from 0 to {LARGEST_SEED}")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise ValueError("a number of at least 0")
    return value


def _near(word: str, known: object) -> str:
    near = difflib.get_close_matches(word, list(known), 1)  # type: ignore[call-overload]
    return f" Did you mean {near[0]}?" if near else ""
