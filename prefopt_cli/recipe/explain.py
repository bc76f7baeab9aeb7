"""pydantic's errors -> one problem per mistake, in words that say what to write instead."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from prefopt_cli.recipe.problems import Path, Problem, join_names, join_types, shown, through_align
from prefopt_cli.recipe.suggestions import LOSS_ALIASES, Named, nearest, unknown_key

_EXPECTED = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "string_too_short": "a text that is not empty",
    "finite_number": "a finite number",
    "int_parsing_size": "a smaller integer",
}
_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_REMEDIES: dict[Path, str] = {
    ("model",): "write {name_or_path: ...}",
    ("method",): "write {name: gpo, ...}",
    ("adapter",): "write none, or {type: lora, r: 16, lora_alpha: 32}",
    ("quantization",): "write none, or {bits: 4}",
    ("launch",): "write {processes: auto}",
    ("launch", "processes"): "write auto for one process per GPU, or how many",
    ("adapter", "type"): "write {type: lora, ...}",
    ("method", "align"): "write the alignment loss: {name: gpo, ...}",
    ("method", "stopwords"): "write en, a file with one word per line, or the words",
    ("method", "mu"): "write none, or {gamma: 0.1}",
    ("method", "previous"): "name the run folders of the earlier stages in order: [runs/helpful]",
    (
        "method",
        "lambdas",
    ): "write one number of at least 0, or one for every earlier dimension: {helpful: 0.5}",
    ("method", "regularizer"): "write {sample_every: 8, ...}; kl_coef: 0 does without samples",
    ("adapter", "bias"): "trained biases stay when the adapter is switched off, so the reference would move",
    ("adapter", "init_lora_weights"): "with others the policy without its adapter is not the reference",
}
_REASONS: dict[tuple[Path, str], str] = {
    (("method", "levels"), "greater_than_equal"): "with a single level there is nothing to tell apart",
    (("method", "levels"), "less_than_equal"): "few responses have so many key phrases",
}
"""Why a limit is where it is."""
_MANY = 12


@dataclass(frozen=True)
class _Mistake:
    """One of pydantic's errors, placed in the data. ``union`` is the path at which a union was tried."""

    path: Path
    union: Path | None
    error: Any

    @property
    def expected(self) -> str | None:
        """What a union member wanted, as far as it can be said in a few words."""
        if self.error["type"] == "literal_error":
            return _one_of(_literals(self.error)) or str(self.error["ctx"]["expected"])
        return _EXPECTED.get(self.error["type"])


def explain(error: ValidationError, data: Any) -> list[Problem]:
    """The mistakes in ``data`` that pydantic found."""
    mistakes = [_place(item, data) for item in error.errors(include_url=False)]
    grouped: dict[Path, list[_Mistake]] = {}
    for mistake in _without_other_branches(mistakes):
        grouped.setdefault(mistake.path, []).append(mistake)
    named = _named_methods(data)
    return [Problem(path, _message(path, group, named)) for path, group in grouped.items()]


def _named_methods(data: Any) -> Named:
    method = data.get("method") if isinstance(data, dict) else None
    align = method.get("align") if isinstance(method, dict) else None
    names = [each.get("name") if isinstance(each, dict) else None for each in (method, align)]
    return Named(*(name if isinstance(name, str) else None for name in names))


def _place(error: Any, data: Any) -> _Mistake:
    """Follow the error's location through the data; what is not in the data names a union member."""
    path: list[str | int] = []
    union: Path | None = None
    for part in error["loc"]:
        inside = (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        )
        if inside:
            data = data[part]
            path.append(part)
        elif union is None and not str(part).startswith(("[key]", "<")):  # "<": tells apart by itself
            union = tuple(path)
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    return _Mistake(tuple(path), union, error)


def _without_other_branches(mistakes: list[_Mistake]) -> list[_Mistake]:
    """Of a union keep the member that got furthest: for `str | list`, `[1]` is a list with a wrong item."""
    deepest: dict[Path, int] = {}
    for mistake in mistakes:
        if mistake.union is not None:
            deepest[mistake.union] = max(len(mistake.path), deepest.get(mistake.union, 0))
    return [
        mistake
        for mistake in mistakes
        if mistake.union is None
        or len(mistake.path) > len(mistake.union)
        or deepest[mistake.union] == len(mistake.path)
    ]


def _message(path: Path, group: list[_Mistake], named: Named) -> str:
    error = group[0].error
    kind, context, value = error["type"], error.get("ctx", {}), error["input"]
    if kind == "extra_forbidden":
        return unknown_key(path, named)
    if kind == "missing":
        return _missing(path, error)
    if kind in ("governed", "nested_method"):
        return str(error["msg"])
    if error["loc"] and error["loc"][-1] == "[key]":
        return _with_suggestion(
            "expected the key to be " + (group[0].expected or "a string"), path[-1], _literals(error)
        )
    if kind == "value_error":
        return str(context["error"])
    if kind == "too_short":
        return "expected at least one entry, found an empty list"
    if kind in _LIMITS:
        words, key = _LIMITS[kind]
        message = f"expected a number {words} {shown(context[key])}, found {shown(value)}"
        reason = _REASONS.get((path, kind))
        return f"{message}; {reason}" if reason else message
    names = context.get("names") or _literals(error)
    if "names" in context:
        expected = f"expected {_one_of(names)}" if len(names) > _MANY else str(error["msg"])
    else:
        wanted = dict.fromkeys(mistake.expected or mistake.error["msg"] for mistake in group)
        expected = f"expected {join_types(wanted)}"
    message = _with_suggestion(f"{expected}, found {shown(value)}", value, names)
    # What turns a text into the number that it is says more than how such a key is written.
    remedies = [_REMEDIES.get(through_align(path)), _remedy(expected, value)]
    remedy = next(filter(None, reversed(remedies) if isinstance(value, str) else remedies), None)
    return f"{message}; {remedy}" if remedy and "did you mean" not in message else message


def _missing(path: Path, error: Any) -> str:
    text = str(error["msg"]) if "names" in error.get("ctx", {}) else "missing"
    remedy = _REMEDIES.get(through_align(path))
    return f"{text}; {remedy}" if remedy else text if text != "missing" else "missing; it has no default"


def _literals(error: Any) -> list[str]:
    """The strings among the values that a Literal allows; pydantic gives them as one text."""
    return re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))


def _one_of(names: list[str]) -> str:
    if len(names) > _MANY:
        return f"one of {len(names)} names ({', '.join(names[:6])}, ...; `prefopt recipe schema` has all)"
    return join_names(names) if names else ""


def _with_suggestion(message: str, value: Any, names: Iterable[str]) -> str:
    if not isinstance(value, str) or not (names := list(names)):
        return message
    if "logistic" in names and value.lower() in LOSS_ALIASES:
        return f"{message}; did you mean {LOSS_ALIASES[value.lower()]}?"
    close = nearest(value, names)
    return f"{message}; did you mean {close!r}?" if close else message


def _remedy(expected: str, value: Any) -> str | None:
    """How to turn the text or number that was written into what is expected."""
    number = "number" in expected or "integer" in expected
    truth = re.search("true(,| or) false", expected)
    if isinstance(value, float) and value.is_integer() and "integer" in expected:
        return f"write {int(value)}"
    if not isinstance(value, str):
        quotable = expected.startswith("expected a string") and isinstance(value, int | float)
        return 'put it in quotes: "..."' if quotable else None
    if value == "None":
        return "YAML's null is written null"
    if number and re.fullmatch(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?([eE][-+]?[0-9]+)?", value):
        return f"write {value.replace('_', '')} without " + ("underscores" if "_" in value else "quotes")
    if truth and value.lower() in ("yes", "on", "y", "true"):
        return "write true"
    if truth and value.lower() in ("no", "off", "n", "false"):
        return "write false"
    return None
