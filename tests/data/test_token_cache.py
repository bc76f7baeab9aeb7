"""What the cache of tokenised data gives is what tokenising gives, whatever happens to its files."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, normalizers, pre_tokenizers

from prefopt_cli import data
from prefopt_cli.data import receipt, special_tokens, token_cache, token_file, token_key
from prefopt_cli.data.degrading import Degrading
from prefopt_cli.data.encoding import Dropped, EncodedSet, Encoding, Fitting, encode_set
from prefopt_cli.data.examples import Comparison
from prefopt_cli.data.tables import TokenRow
from prefopt_cli.data.token_cache import TokenCache
from prefopt_cli.recipe.schema import Source
from tests.data.build import CHATML, LLAMA3, chat_row, jsonl, row, rows, settings, tokenizer

SPAWN = multiprocessing.get_context("spawn")
DEGRADING = Degrading(frozenset({"is", "the", "a"}), 4)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sets lie, not made yet; small ones are kept too."""
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "FEWEST", 1)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def full_disk(folder: Path) -> Iterator[Path]:
    """The folder on a file system of 64 KiB."""
    folder.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


# The same with the cache and without

LISTED = [
    {
        "prompt": f"Q {n}?",
        "responses": ["The cat is red", " No", "a dog is the big toy " * n],
        "ranking": [0, 1, 1],
    }
    for n in range(1, 9)
]
OTHER_TURNS = [
    {"role": "assistant", "content": "No"},
    {"role": "user", "content": "é 猫"},
    {"role": "assistant", "content": ""},
]
CHATS = [{**chat_row(f"Tell {n}", "Yes, the cat is red"), "rejected": OTHER_TURNS} for n in range(4)]
TEXTS = [
    *rows(5),
    row(5, prompt="Tell", chosen=" me</s>", rejected="ing</s> the\n\nHuman: cat is"),
    row(6, chosen=" the red cat is a big dog" * 6, rejected=" a 猫 is"),
    row(7, prompt="Long " * 60),
]

CASES: dict[str, tuple[list[Any], dict[str, Any], dict[str, Any]]] = {
    "pairs": (TEXTS, {"max_length": 40}, {}),
    "truncated": (TEXTS, {"max_length": 40, "on_overflow": "truncate_response"}, {}),
    "shuffled": (TEXTS, {"shuffle": True}, {}),
    "degrees": (TEXTS, {"max_length": 40, "on_overflow": "truncate_response"}, {"degrading": DEGRADING}),
    "degrees of the chosen": (TEXTS, {}, {"degrading": replace(DEGRADING, apply_to="chosen")}),
    "lists": (LISTED, {"max_length": 60}, {}),
    "pairs of lists": (LISTED, {"max_length": 60}, {"lists": "all_pairs", "degrading": DEGRADING}),
    "chats": (CHATS, {}, {"degrading": DEGRADING}),
}


def written(tokens: data.TokenizedData) -> dict[str, Any]:
    """All of it, the types of the columns included."""
    tables = {"train": tokens.train, **tokens.eval, "prompts": tokens.prompts}
    return {
        "tables": {name: (str(table.features), table.to_dict()) for name, table in tables.items() if table is not None},
        "receipt": json.dumps(tokens.receipt.to_dict()),
        "fingerprints": tokens.fingerprints,
        "stop_ids": tokens.stop_ids,
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_with_the_cache_and_without(
    case: tuple[list[Any], dict[str, Any], dict[str, Any]],
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listed, others, options = case
    path = jsonl(tmp_path / "p.jsonl", listed)
    wanted = settings({"source": path, "weight": 2.5}, eval={"held": path}, **others)
    asked = [Source(source=path)] if listed is TEXTS else None
    steps: list[str] = []

    def tokenized() -> dict[str, Any]:
        steps.clear()
        tok = tokenizer(template=CHATML)
        loaded = data.load(wanted, prompts=asked)
        return written(data.tokenize(loaded, tok, wanted, lambda task, *_: steps.append(task), **options))

    monkeypatch.setattr(token_cache, "FEWEST", 10_000)
    without = tokenized()
    assert not folder.exists()
    monkeypatch.setattr(token_cache, "FEWEST", 1)
    assert tokenized() == without
    assert steps[0] == "tokenising train"
    assert tokenized() == without
    assert steps == []


def test_one_file_serves_both_sides_and_either(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The receipt's notes too: of these lists only " No" has no degrees, which is never the best."""
    wanted = settings(jsonl(tmp_path / "p.jsonl", LISTED))

    def tokenized(apply_to: Any) -> data.TokenizedData:
        degrading = replace(DEGRADING, stopwords=DEGRADING.stopwords | {"no"}, apply_to=apply_to)
        return data.tokenize(data.load(wanted), tokenizer(), wanted, lists="all_pairs", degrading=degrading)

    monkeypatch.setattr(token_cache, "FEWEST", 10_000)
    sides = ("both", "chosen", "rejected")
    without = {side: written(tokenized(side)) for side in sides}
    assert not folder.exists()
    monkeypatch.setattr(token_cache, "FEWEST", 1)
    for side in sides:
        tokens = tokenized(side)
        assert written(tokens) == without[side]
        changes = tokens.receipt.sets["train"].sources[0].changed
        assert changes == ({} if side == "chosen" else {receipt.NO_DEGREES: 8})
    the_file(folder)


def test_a_set_comes_back_bit_by_bit(tmp_path: Path) -> None:
    ids = np.array([5, 70_000, 2**31 - 1], dtype=np.int32)
    none = np.array([], dtype=np.int32)
    kept = {
        "a:1": Fitting(TokenRow("a:1", ids, (ids[:1], none), (0, 1), (((1, ids[:2]), (3, none)), ())), ("x", "é")),
        "ü#": Fitting(TokenRow("ü#", ids[1:], (ids,), (0,), (((2, ids[2:]),),)), ()),
        "prompt": Fitting(TokenRow("prompt", ids, (), ()), ()),
    }  # fmt: skip
    dropped = [Dropped("b", "too \n long", 900), Dropped("c", "refused", 0)]
    token_file.write(tmp_path / "set", "key", EncodedSet(kept, dropped))
    found = token_file.read(tmp_path / "set", "key")
    assert repr(found) == repr(EncodedSet(kept, dropped))
    prompt, responses = found.fitting["a:1"].tokens.prompt, found.fitting["a:1"].tokens.responses
    assert {one.dtype for one in (prompt, *responses)} == {np.dtype(np.int32)}
    assert prompt.base is not None  # no copy for each row
    with pytest.raises(token_file.DamagedTokens):
        token_file.read(tmp_path / "set", "another key")


# What decides the key


def comparison(number: int, **others: Any) -> Comparison:
    return replace(Comparison(f"r{number}", "p.jsonl", f"Q {number}", (" a", " b"), (0, 1)), **others)


ROWS = [comparison(0), comparison(1)]


def key(listed: list[Comparison] | None = None, tok: Any = None, **others: Any) -> str:
    """Of these rows; `others` are changes of the encoding, and of its settings."""
    tok = tok or tokenizer(template=CHATML)
    wanted = settings("p.jsonl", max_length=30)
    wanted = wanted.model_copy(update={k: v for k, v in others.items() if k in type(wanted).model_fields})
    encoding = Encoding(
        tok, others.get("special") or special_tokens.probe(tok, ROWS), wanted, others.get("degrading")
    )
    return token_key.set_key(listed or ROWS, encoding, token_key.tokenizer_identity(tok))


def changed(**attributes: Any) -> Any:
    tok = tokenizer(template=CHATML)
    for name, value in attributes.items():
        setattr(tok, name, value)
    return tok


def changed_backend(**attributes: Any) -> Any:
    tok = tokenizer(template=CHATML)
    for name, value in attributes.items():
        setattr(tok.backend_tokenizer, name, value)
    return tok


def with_token(**others: Any) -> Any:
    tok = tokenizer(template=CHATML)
    tok.add_tokens(["<new>"], **others)
    return tok


SPECIAL = special_tokens.probe(tokenizer(), ROWS)
CHANGES: dict[str, Callable[[], str]] = {
    "nothing": key,
    "order": lambda: key(ROWS[::-1]),
    "fewer rows": lambda: key(ROWS[:1]),
    "repeated row": lambda: key([*ROWS, ROWS[1]]),
    "row id": lambda: key([ROWS[0], comparison(1, row_id="r2")]),
    "prompt": lambda: key([ROWS[0], comparison(1, prompt="Q 1 ")]),
    "response": lambda: key([ROWS[0], comparison(1, responses=(" a", " c"))]),
    "responses exchanged": lambda: key([ROWS[0], comparison(1, responses=(" b", " a"))]),
    "responses cut elsewhere": lambda: key([ROWS[0], comparison(1, responses=(" a b", ""))]),
    "one response": lambda: key([ROWS[0], comparison(1, responses=(" a",))]),
    "ranks": lambda: key([ROWS[0], comparison(1, ranks=(0, 0))]),
    "notes": lambda: key([ROWS[0], comparison(1, notes=("lost a blank",))]),
    "messages": lambda: key([ROWS[0], comparison(1, prompt=[{"role": "user", "content": "Q 1"}])]),
    "role": lambda: key([ROWS[0], comparison(1, prompt=[{"role": "system", "content": "Q 1"}])]),
    "more in a message": lambda: key([ROWS[0], comparison(1, prompt=[{"role": "user", "content": "Q 1", "x": 1}])]),
    "max_length": lambda: key(max_length=31),
    "no max_length": lambda: key(max_length=None),
    "on_overflow": lambda: key(on_overflow="error"),
    "degrading": lambda: key(degrading=DEGRADING),
    "levels": lambda: key(degrading=replace(DEGRADING, levels=5)),
    "stop words": lambda: key(degrading=replace(DEGRADING, stopwords=frozenset({"is", "the"}))),
    "prefix": lambda: key(special=replace(SPECIAL, prefix=(1, 1))),
    "eos": lambda: key(special=replace(SPECIAL, eos_id=9)),
    "end of turn": lambda: key(
        special=replace(SPECIAL, chat=special_tokens.ChatEnd("<|im_end|>", 3, "\n", True, False))
    ),
    "noise": lambda: key(special=replace(SPECIAL, chat=special_tokens.ChatEnd("<|im_end|>", 3, "", True, False))),
    "template": lambda: key(tok=changed(chat_template=LLAMA3)),
    "templates": lambda: key(tok=changed(chat_template={"default": CHATML})),
    "BOS": lambda: key(tok=tokenizer(template=CHATML, adds_bos=False), special=SPECIAL),
    "EOS": lambda: key(tok=tokenizer(template=CHATML, adds_eos=True), special=SPECIAL),
    "name of a special token": lambda: key(tok=changed(pad_token="<|end|>")),
    "special tokens as text": lambda: key(tok=changed(split_special_tokens=True)),
    "added token": lambda: key(tok=with_token()),
    "added special token": lambda: key(tok=with_token(special_tokens=True)),
    "normalizer": lambda: key(tok=changed_backend(normalizer=normalizers.Lowercase())),
    "pre-tokenizer": lambda: key(
        tok=changed_backend(pre_tokenizer=pre_tokenizers.Split(Regex(" "), "isolated"))
    ),
}  # fmt: skip


def test_whatever_decides_the_tokens_decides_the_key() -> None:
    keys = {name: make() for name, make in CHANGES.items()}
    same = {(one, other) for one in keys for other in keys if one < other and keys[one] == keys[other]}
    assert same == set()


@pytest.mark.parametrize("package", token_key.PACKAGES)
def test_versions_decide_the_key(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, real = key(), token_key.importlib.metadata.version
    monkeypatch.setattr(
        token_key.importlib.metadata, "version", lambda name: "9.9" if name == package else real(name)
    )
    assert key() != before


def test_code_decides_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key()
    monkeypatch.setattr(token_key, "CODE", "0" * 32)
    assert key() != before


def test_what_makes_no_difference() -> None:
    """Where rows come from, how often they are to be repeated, the order of a set of words, and who takes part."""
    assert key([ROWS[0], comparison(1, source="q.jsonl")]) == key()
    assert key(tok=changed(model_max_length=7, padding_side="left", name_or_path="elsewhere")) == key()
    words = [f"word{number}" for number in range(50)]
    first, second = (Degrading(frozenset(each), 4) for each in (words, words[::-1]))
    assert key(degrading=first) == key(degrading=second)
    assert key(degrading=replace(DEGRADING, apply_to="chosen")) == key(degrading=DEGRADING)


def print_key() -> None:
    """What another process says."""
    print(key(degrading=DEGRADING))


def test_other_processes_make_the_same_key() -> None:
    program = "from tests.data.test_token_cache import print_key; print_key()"
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == key(degrading=DEGRADING), done.stderr


def test_templates_that_write_the_date_have_another_key_each_day(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tomorrow(token_key.date):
        @classmethod
        def today(cls) -> "Tomorrow":
            return cls(2100, 1, 1)

    dated = changed(chat_template=CHATML + "{{ strftime_now('%d %b %Y') }}")
    before, plain = key(tok=dated), key()
    monkeypatch.setattr(token_key, "date", Tomorrow)
    assert key(tok=dated) != before
    assert key() == plain


def test_a_tokenizer_that_is_not_told_by_its_parts_is_not_kept(folder: Path) -> None:
    class Python:
        def pre_tokenize(self, text: Any) -> None:
            text.split(lambda n, piece: piece.split(Regex(" "), "isolated"))

    tok = changed_backend(pre_tokenizer=pre_tokenizers.PreTokenizer.custom(Python()))
    assert token_key.tokenizer_identity(tok) is None
    assert token_key.tokenizer_identity(object()) is None
    encoding = Encoding(tok, special_tokens.probe(tok, ROWS), settings("p.jsonl"))
    assert TokenCache(tok).encoded("train", ROWS, encoding, None).fitting
    assert not folder.exists()


# Files that are damaged, missing, or in the way


def encoded(report: Callable[[str], None], listed: list[Comparison] | None = None) -> str:
    """What the cache makes of some rows; a new object each time, as in each run."""
    tok = tokenizer()
    listed = listed or [comparison(number) for number in range(50)]
    encoding = Encoding(tok, SPECIAL, settings("p.jsonl", max_length=30), DEGRADING)
    found = TokenCache(tok, report).encoded("train", listed, encoding, None)
    assert repr(found) == repr(encode_set("train", listed, encoding, None))
    return repr(found)


def the_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def test_any_flipped_byte_is_noticed(folder: Path, messages: list[str], tmp_path: Path) -> None:
    encoded(messages.append)
    file = the_file(folder)
    content = file.read_bytes()
    for place in [*range(0, len(content), 97), len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(token_file.DamagedTokens):
            token_file.read(file, file.stem)


@pytest.mark.parametrize("left", [0, 7, 16, 1000], ids=lambda left: f"{left} bytes")
def test_damaged_file_is_replaced(folder: Path, messages: list[str], left: int) -> None:
    encoded(messages.append)
    file = the_file(folder)
    content = file.read_bytes()
    file.write_bytes(content[:left])
    encoded(messages.append)
    (message,) = messages
    assert str(file) in message
    assert "damaged" in message
    assert "\n" not in message
    assert the_file(folder).read_bytes() == content
    encoded(messages.append)
    assert len(messages) == 1


def test_rows_that_do_not_fit_are_kept_too(messages: list[str]) -> None:
    listed = [*ROWS, comparison(2, prompt="Q " * 100)]
    assert "prompt too long" in encoded(messages.append, listed)
    assert "prompt too long" in encoded(messages.append, listed)
    assert messages == []


def assert_out_of_use(messages: list[str], folder: Path) -> None:
    tok = tokenizer()
    encoding = Encoding(tok, SPECIAL, settings("p.jsonl"))
    cache = TokenCache(tok, messages.append)
    for first in (0, 0, 500):
        listed = [comparison(first + number) for number in range(2000)]
        assert len(cache.encoded("train", listed, encoding, None).fitting) == 2000
    (message,) = messages
    assert str(folder) in message
    assert "PREFOPT_CACHE" in message
    assert "\n" not in message


def test_file_in_the_way(folder: Path, messages: list[str]) -> None:
    folder.parent.mkdir()
    folder.write_text("")
    assert_out_of_use(messages, folder)


def test_folder_that_cannot_be_made(folder: Path, messages: list[str]) -> None:
    folder.parent.symlink_to("/proc/self")
    assert_out_of_use(messages, folder)


def test_full_disk(full_disk: Path, messages: list[str]) -> None:
    assert_out_of_use(messages, full_disk)
    assert "space" in messages[0]
    assert list(full_disk.iterdir()) == []


def test_read_only_disk_is_good_for_reading(full_disk: Path, messages: list[str]) -> None:
    encoded(messages.append)
    subprocess.run(["mount", "-o", "remount,ro", str(full_disk)], check=True)
    encoded(messages.append)
    assert messages == []
    assert_out_of_use(messages, full_disk)


def test_small_sets_are_not_kept(folder: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "FEWEST", 51)
    encoded(messages.append)
    assert not folder.exists()
    monkeypatch.setattr(token_cache, "FEWEST", 50)
    encoded(messages.append)
    assert the_file(folder)


def test_reading_marks_the_day(folder: Path, messages: list[str]) -> None:
    encoded(messages.append)
    file = the_file(folder)
    os.utime(file, (0, 0))
    encoded(messages.append)
    assert file.stat().st_mtime > 1e9


# Several processes


def write_often(folder: Path, told: Path) -> None:
    """One process of several that keep the same sets, and remove them again."""
    os.environ["PREFOPT_CACHE"] = str(folder)
    token_cache.FEWEST = 1
    messages: list[str] = []
    for number in range(20):
        encoded(messages.append)
        if number % 5 == 4:
            for file in (folder / "tokens").glob("*.arrow"):
                file.unlink(missing_ok=True)
    told.write_text("\n".join(messages))


def test_processes_write_and_read_at_once(folder: Path, tmp_path: Path) -> None:
    told = [tmp_path / f"told{number}" for number in range(2)]
    processes = [SPAWN.Process(target=write_often, args=(folder.parent, path)) for path in told]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [path.read_text() for path in told] == ["", ""]
    assert not list(folder.glob(".*"))
