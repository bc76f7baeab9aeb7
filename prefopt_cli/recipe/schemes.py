"""Names of the form ``scheme:rest``, for models and data that are neither files nor on the hub.

A scheme is one module and one line in ``SCHEMES``. The module is imported when a name of its scheme is met, and
must be light itself: its two checks judge a recipe's names before anything heavy is imported.
"""

import importlib
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.suggestions import nearest

SCHEMES = {"sandbox": "prefopt_cli.sandbox.scheme"}
"""Scheme -> the module that serves it."""

NAME = re.compile(r"([A-Za-z][A-Za-z0-9_+-]+):(.*)", re.DOTALL)
"""Two characters at least: ``C:`` is a drive."""

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much is done, how much there is)."""


class Scheme(Protocol):
    """What the module of a scheme offers. ``name`` is always the part after ``scheme:``."""

    def check_model(self, name: str) -> None:
        """Raise UserError, which says what there is, if no model has this name. Light."""

    def check_dataset(self, name: str, config: str | None) -> None:
        """Raise UserError, which says what there is, if no dataset has this name and configuration. Light."""

    def model_folder(self, name: str, progress: Progress | None) -> Path:
        """The folder of the full model with its tokenizer; made now if need be."""

    def dataset(self, name: str, config: str | None, progress: Progress | None) -> Mapping[str, Any]:
        """Every split's ``datasets.Dataset`` by its name; made now if need be."""


class Named(NamedTuple):
    """A name taken apart."""

    scheme: Scheme
    name: str
    """The part after the colon."""


def has_scheme(name: str) -> bool:
    """Whether the name begins with one of the known schemes."""
    return name.partition(":")[0] in SCHEMES and ":" in name


def find_scheme(name: str, kind: str) -> Named | None:
    """Who serves this name; None where it has no scheme and so is a path or a hub id.

    A known scheme wins over a file of the same name; any other name with a colon may be an existing path.

    Args:
        name: as the recipe has it.
        kind: what the name stands for there, for the message: model or source.

    Raises:
        UserError: it has a scheme that is not known.
    """
    match = NAME.fullmatch(name)
    if match is None or (match[1] not in SCHEMES and os.path.exists(name)):
        return None
    if match[1] in SCHEMES:
        return Named(cast(Scheme, importlib.import_module(SCHEMES[match[1]])), match[2])
    close = nearest(match[1], SCHEMES)
    hint = f"; did you mean {close}:{match[2]}?" if close else ""
    raise UserError(f"{name}: {match[1]!r} is not a known kind of {kind}{hint}")
