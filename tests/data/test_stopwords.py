"""Stop words by language, from files, as lists; and what is said where there are none."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from prefopt_cli.data.keyphrases import rake
from prefopt_cli.data.stopwords import find_stopwords, languages
from prefopt_cli.errors import UserError


def test_languages() -> None:
    known = languages()
    assert {"en", "de", "hi", "zh"} <= set(known)
    assert known == sorted(known)
    for code in known:
        words = find_stopwords(code)
        assert all(word == word.lower().strip() != "" for word in words)


def test_a_language_in_capitals() -> None:
    assert find_stopwords("EN") == find_stopwords("en") > {"the", "don't"}
    assert {"der", "und"} < find_stopwords("de")


def test_a_list() -> None:
    assert find_stopwords(["The", "DON’T", " of "]) == {"the", "don't", "of"}


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


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("eng", ["'eng'", "en", f"{len(languages())} languages", "file", "list"]),
        ("xq", ["'xq'", "languages"]),
        ("", ["''", "languages"]),
        ("none.txt", ["no file none.txt"]),
        ("lists/none", ["no file"]),
        ("folder/", ["folder", "text file"]),
        ("latin1.txt", ["latin1.txt is not UTF-8"]),
        ("comments.txt", ["comments.txt has no word"]),
        ("bad\0.txt", ["cannot be read"]),
        ([], ["no word"]),
        ([" ", ""], ["no word"]),
    ],
)
def test_what_cannot_be_used(
    setting: str | Sequence[str], says: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin1.txt").write_bytes("für".encode("latin-1"))
    (tmp_path / "comments.txt").write_text("# the\n\n")
    with pytest.raises(UserError) as raised:
        find_stopwords(setting)
    for part in ["method.stopwords: ", *says]:
        assert part in str(raised.value)
