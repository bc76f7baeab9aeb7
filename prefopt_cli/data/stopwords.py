"""Stop words, between which key phrases stand: by language, from a file, or as listed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from prefopt_cli.data.keyphrases import WORD, normal_form
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.stopwords import stopwords_file, stopwords_problem

_KEY = "method.stopwords"


def find_stopwords(setting: str | Sequence[str]) -> frozenset[str]:
    """The stop words that ``method.stopwords`` names, in their ``normal_form``.

    ``setting`` is a list of words, the code of a language (``en``; lists of the package stopwordsiso), or
    the path to a UTF-8 text file with one word per line; blank lines and lines beginning with # say nothing.
    A stop word that is not one word of a text (``per que``, ``i.e.``) is never met: it ends no phrase.

    Raises:
        UserError: the language is unknown, the file cannot be read, or no entry is a single word.
    """
    if not isinstance(setting, str):
        return _some(setting, "the list", "entry")
    problem = stopwords_problem(setting)
    if problem:
        raise UserError(f"{_KEY}: {problem}.")
    path = stopwords_file(setting)
    return _some(_read(path), str(path), "line") if path else _of_language(setting.lower())


def _of_language(code: str) -> frozenset[str]:
    from stopwordsiso import stopwords

    return _normal(stopwords(code))


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{_KEY}: {path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except OSError as error:
        raise UserError(f"{_KEY}: {path} cannot be read: {error.strerror}.") from error
    return [line for line in lines if not line.lstrip().startswith("#")]


def _some(entries: Sequence[str], where: str, entry: str) -> frozenset[str]:
    """The entries in their normal form; refused if none is a word, as of ``the, of, and`` on one line."""
    if not any(WORD.fullmatch(each.strip()) for each in entries):
        raise UserError(f"{_KEY}: {where} has no {entry} that is a single word; write one word per {entry}.")
    return _normal(entries)


def _normal(entries: Iterable[str]) -> frozenset[str]:
    return frozenset(normal_form(each.strip()) for each in entries) - {""}
