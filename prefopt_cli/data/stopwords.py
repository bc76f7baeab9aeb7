"""Stop words, between which key phrases stand: by language, from a file, or as listed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from prefopt_cli.errors import UserError

_KEY = "method.stopwords"


def find_stopwords(setting: str | Sequence[str]) -> frozenset[str]:
    """The stop words that ``method.stopwords`` names, lower-cased, with their apostrophes as '.

    ``setting`` is a list of words, the code of a language (``en``; lists of the package stopwordsiso), or
    the path to a UTF-8 text file with one word per line; blank lines and lines beginning with # say nothing.
    What has a slash or a suffix, or is a file, is a path. A stop word of several words is never met.

    Raises:
        UserError: the language is unknown, the file cannot be read, or there is no word.
    """
    if not isinstance(setting, str):
        return _clean(setting, f"{_KEY}: the list has no word; name at least one.")
    path = Path(setting).expanduser()
    if "/" in setting or "\\" in setting or path.suffix or path.is_file():
        return _clean(_read(path), f"{_KEY}: {path} has no word; it needs one per line.")
    return _of_language(setting)


def languages() -> list[str]:
    """The codes of the languages that have a list of stop words (ISO 639-1), sorted."""
    from stopwordsiso import langs  # reads a megabyte of JSON

    return sorted(langs())


def _of_language(code: str) -> frozenset[str]:
    from stopwordsiso import stopwords

    known = languages()
    if code.lower() in known:
        return _clean(stopwords(code.lower()), f"{_KEY}: {code!r} has no stop words.")
    near = difflib.get_close_matches(code.lower(), known, n=3, cutoff=0.3)
    meant = f"; near it are {', '.join(near)}" if near else ""
    raise UserError(
        f"{_KEY}: {code!r} is none of the {len(known)} languages with a list of stop words{meant}. Write a code "
        "such as en, a list of words, or the path to a text file with one word per line."
    )


def _read(path: Path) -> list[str]:
    if path.is_dir():
        raise UserError(f"{_KEY}: {path} is a folder; name a text file with one word per line.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise UserError(
            f"{_KEY}: there is no file {path}; name a text file with one word per line."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{_KEY}: {path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{_KEY}: {path} cannot be read: {error}.") from error
    return [line for line in lines if not line.lstrip().startswith("#")]


def _clean(words: Iterable[str], if_none: str) -> frozenset[str]:
    cleaned = frozenset(word.strip().lower().replace("’", "'") for word in words) - {""}
    if not cleaned:
        raise UserError(if_none)
    return cleaned
