"""Stop words by language, from files, as lists; and what is said where there are none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from prefopt_cli.data.keyphrases import candidates, normal_form, rake
from prefopt_cli.data.stopwords import find_stopwords
from prefopt_cli.errors import UserError
from prefopt_cli.recipe.stopwords import languages


def test_every_language_has_words() -> None:
    for code in languages():
        words = find_stopwords(code)
        assert words
        assert all(word == normal_form(word.strip()) != "" for word in words)


def test_a_language_in_capitals() -> None:
    assert find_stopwords("EN") == find_stopwords("en") > {"the", "don't"}
    assert {"der", "und"} < find_stopwords("de")


def test_a_list() -> None:
    assert find_stopwords(["The", "DON’T", " of "]) == {"the", "don't", "of"}
    assert find_stopwords(["U\u0308ber", "İçin", "donʼt"]) == {"über", "için", "don't"}


def test_entries_that_are_not_one_word_are_never_met() -> None:
    """Beside one that is, they stay: lists of others hold some."""
    stopwords = find_stopwords(["per que", "i.e.", "the"])
    assert stopwords == {"per que", "i.e.", "the"}
    found = [one.phrase for one in candidates("cat per que dog the i.e. pig", stopwords)]
    assert found == ["cat per que dog", "i", "e", "pig"]


def test_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "words.txt"
    file.write_bytes("\ufeffThe\r\n\r\n# of\n  # is\nDon’t \nüber\n".encode())
    expected = {"the", "don't", "über"}
    assert find_stopwords(str(file)) == expected
    monkeypatch.chdir(tmp_path)
    assert find_stopwords("words.txt") == expected
    file.rename("words")
    assert find_stopwords("words") == expected
    assert rake("The cat is über", find_stopwords("words")) == [("cat is", 4.0)]


def test_a_language_means_the_same_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    english = find_stopwords("en")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "en").write_text("word\n")
    (tmp_path / "de").mkdir()
    assert find_stopwords("en") == english
    assert "und" in find_stopwords("de")
    assert find_stopwords("./en") == {"word"}


def test_a_file_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "words").write_text("the\n")
    assert find_stopwords("~/words") == {"the"}


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (
            "eng",
            "expected one of 58 language codes (en, de, fr, ...), a file or a list of words, found 'eng'; did you",
        ),
        ("", "found ''."),
        ("none.txt", "there is no file 'none.txt'; name a text file with one word per line."),
        ("lists/none", "there is no file 'lists/none'"),
        ("~nosuchuser/x", "there is no file '~nosuchuser/x'"),
        ("folder/", "'folder' is a folder; name a text file with one word per line."),
        ("folder", "'folder' is a folder; name a text file with one word per line."),
        ("words/x", "'words/x' cannot be read: Not a directory."),
        ("x" * 300 + "/y", "x ...' cannot be read: File name too long."),
        ("x" * 300, "found 'xxx"),
        ("loop/x", "'loop/x' cannot be read: Too many levels of symbolic links."),
        ("bad\0.txt", "'bad\\x00.txt' cannot be read: embedded null byte."),
        ("latin1.txt", "latin1.txt is not UTF-8 (byte 1)"),
        ("comments.txt", "comments.txt has no line that is a single word; write one word per line."),
        ("one-line.txt", "one-line.txt has no line that is a single word; write one word per line."),
        ([], "the list has no entry that is a single word; write one word per entry."),
        ([" ", ""], "the list has no entry that is a single word"),
        (["the of and", "a,an", "i.e."], "the list has no entry that is a single word"),
    ],
)
def test_what_cannot_be_used(
    setting: str | Sequence[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "words").write_text("the\n")
    (tmp_path / "latin1.txt").write_bytes("für".encode("latin-1"))
    (tmp_path / "comments.txt").write_text("# the\n\n")
    (tmp_path / "one-line.txt").write_text("the, of, and\n")
    with pytest.raises(UserError) as raised:
        find_stopwords(setting)
    assert str(raised.value).startswith("method.stopwords: ")
    assert says in str(raised.value)


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is not the file system's."""

    def refused(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("the\n")
    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(UserError, match=r"words\.txt'? cannot be read: Permission denied"):
        find_stopwords("words.txt")
