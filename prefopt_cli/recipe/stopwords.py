"""What the text of ``method.stopwords`` names, a file or a language, and what is wrong with it."""

import difflib
import os
import pathlib
import re
import stat
from collections.abc import Iterator

from prefopt_cli.recipe.problems import join_names, shown

LANGUAGE_NAMES = {
    "afrikaans": "af",
    "arabic": "ar",
    "armenian": "hy",
    "basque": "eu",
    "bengali": "bn",
    "breton": "br",
    "bulgarian": "bg",
    "catalan": "ca",
    "chinese": "zh",
    "croatian": "hr",
    "czech": "cs",
    "danish": "da",
    "dutch": "nl",
    "english": "en",
    "esperanto": "eo",
    "estonian": "et",
    "farsi": "fa",
    "filipino": "tl",
    "finnish": "fi",
    "french": "fr",
    "galician": "gl",
    "german": "de",
    "greek": "el",
    "gujarati": "gu",
    "hausa": "ha",
    "hebrew": "he",
    "hindi": "hi",
    "hungarian": "hu",
    "indonesian": "id",
    "irish": "ga",
    "italian": "it",
    "japanese": "ja",
    "korean": "ko",
    "kurdish": "ku",
    "latin": "la",
    "latvian": "lv",
    "lithuanian": "lt",
    "malay": "ms",
    "marathi": "mr",
    "norwegian": "no",
    "persian": "fa",
    "polish": "pl",
    "portuguese": "pt",
    "romanian": "ro",
    "russian": "ru",
    "slovak": "sk",
    "slovenian": "sl",
    "somali": "so",
    "sotho": "st",
    "southern sotho": "st",
    "spanish": "es",
    "swahili": "sw",
    "swedish": "sv",
    "tagalog": "tl",
    "thai": "th",
    "turkish": "tr",
    "ukrainian": "uk",
    "urdu": "ur",
    "vietnamese": "vi",
    "yoruba": "yo",
    "zulu": "zu",
}
"""Other tools name stop lists by the language's name."""


def languages() -> list[str]:
    """The codes of the languages that have a list of stop words (ISO 639-1), sorted."""
    from stopwordsiso import langs  # reads its half megabyte of words when imported

    return sorted(langs())


def stopwords_file(setting: str) -> pathlib.Path | None:
    """The file that ``method.stopwords`` names, from the working directory; None where it names a language.

    What has a slash or a suffix is a path, and so is anything there that is not the code of a language: what
    ``en`` means does not depend on where it is read (``./en`` is a file).
    """
    written = os.path.expanduser(setting)  # unlike Path.expanduser, it leaves ~nobody as it is
    path = pathlib.Path(written)
    if {"/", "\\"} & set(setting) or path.suffix:
        return path
    return path if setting.lower() not in languages() and os.path.exists(written) else None


def stopwords_problem(setting: str) -> str | None:
    """What is wrong with this text of ``method.stopwords``, as far as shows without reading a file, or None."""
    file = stopwords_file(setting)
    return _of_file(file) if file else _of_language(setting)


def _of_file(path: pathlib.Path) -> str | None:
    name = shown(str(path), limit=200)
    try:
        folder = stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        return f"there is no file {name}; name a text file with one word per line"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return f"{name} cannot be read: {getattr(error, 'strerror', error)}"
    return f"{name} is a folder; name a text file with one word per line" if folder else None


def _of_language(code: str) -> str | None:
    known = languages()
    if code.lower() in known:
        return None
    meant = list(dict.fromkeys(map(repr, _meant(code.lower(), known))))
    guess = f"; did you mean {join_names(meant)}?" if meant else ""
    return (
        f"expected one of {len(known)} language codes (en, de, fr, ...), a file or a list of words, "
        f"found {shown(code)}{guess}"
    )


def _meant(written: str, known: list[str]) -> Iterator[str]:
    """The codes of the languages that may be meant by en_US, a language's name, or its beginning (eng)."""
    tag = re.split("[-_]", written[:80])[0]
    if tag in known:
        yield tag
        return
    names = [name for name in LANGUAGE_NAMES if len(tag) > 2 and name.startswith(tag)]
    # Languages of similar names are many: japanese is 0.87 like javanese, which has no list.
    names = names or difflib.get_close_matches(tag, LANGUAGE_NAMES, n=1, cutoff=0.88)
    yield from (LANGUAGE_NAMES[name] for name in names)
