"""YAML 1.2 scalars, lines of keys, and texts that must be refused quickly and clearly."""

import time

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.yaml_reader import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("1e-5", 1e-5),
        ("5.0e-7", 5e-7),
        (".5", 0.5),
        ("010", 10),
        ("0x10", 16),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("'8'", "8"),
        ("!!str 8", "8"),
        ("1.5.2", "1.5.2"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    read = parse_yaml(f"key: {text}", "f").data["key"]
    assert read == value
    assert type(read) is type(value)


def test_every_key_and_entry_has_its_line():
    document = parse_yaml("a:\n  b:\n    - x\n    - {c: 1}\n\nd: 2\n", "f")
    assert document.lines[("a", "b", 1, "c")] == 4
    assert document.lines[("a", "b", 0)] == 3
    assert document.lines[("d",)] == 6


def test_merge_keys_yield_to_keys_of_the_mapping_itself_and_to_earlier_merges():
    text = "a: &a {x: 1, y: 1}\nb: &b {y: 2, z: 2}\nc:\n  <<: [*a, *b]\n  x: 3\n"
    assert parse_yaml(text, "f").data["c"] == {"x": 3, "y": 1, "z": 2}


def test_duplicate_keys_are_told_with_both_lines():
    (problem,) = parse_yaml("a: 1\nb: 2\na: 3\n", "f").problems
    assert problem.path == ("a",)
    assert "line 1" in problem.message
    assert "line 3" in problem.message


@pytest.mark.parametrize(
    ("key", "hint"), [("5", "put 5 in quotes"), ("null", "quotes"), ("? [a]\n", "a list")]
)
def test_keys_must_be_strings(key, hint):
    (problem,) = parse_yaml(f"x: 1\n{key}: 1\n", "f").problems
    assert problem.line == 2
    assert hint in problem.message


BILLION_LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: b: c", ["f:1:5", "mapping values"]),
        ("a:\n\tb: 1", ["f:2:1", "tabs"]),
        ('x: 1\na: "abc', ["f:2", "line 2"]),
        ("a: *nowhere", ["f:1:4", "nowhere"]),
        ("a: 1\n---\nb: 2", ["f:2", "one document"]),
        ("a: 1\nb: \x00", ["f:2:4", "U+0000"]),
        ("a: \x1b[31m", ["f:1:4", "U+001B"]),
        ('a: "\\UFFFFFFFF"', ["f", "YAML"]),
        ("a: " + "[" * 100_000, ["f:1", "deeper than"]),
        ("{a: " * 5_000, ["deeper than"]),
        (BILLION_LAUGHS, ["aliases", "100,000"]),
        ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 2000)), ["nested deeper"]),
        ("a: &a [*a]", ["f:1", "contains itself"]),
        ("a: &a\n  <<: *a", ["contains itself"]),
        ("a: [" + "1," * 100_000 + "]", ["more than 20,000"]),
    ],
)
def test_texts_that_cannot_be_read_are_refused_quickly(text, parts):
    start = time.perf_counter()
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "f")
    assert time.perf_counter() - start < 10  # generous: unbounded work would take minutes or all memory
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.system ['x']", "a: !mine 3", "a: !!set {b}"])
def test_tags_other_than_plain_ones_are_refused(text):
    (problem,) = parse_yaml(text, "f").problems
    assert "tag" in problem.message


@pytest.mark.parametrize("text", ["a: " + "9" * 5000, "a: !!int abc", 'a: "\\ud800"'])
def test_scalars_that_cannot_be_read_are_told(text):
    document = parse_yaml(text, "f")
    assert "cannot be read" in document.problems[0].message
    assert document.unreadable == {("a",)}
