"""`prefopt check` of a method that reads degraded responses."""

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from prefopt_cli.cli.check_degrees import CHARACTERS_SHOWN, print_degrees
from prefopt_cli.cli.receipt import print_receipt
from prefopt_cli.training.degree_inspection import Cut, DegradedResponse, DegradedVersion
from tests.cli.conftest import Prefopt, on_a_terminal
from tests.tiny import write_pairs

SELF_SUPERVISED = "method={name: self_supervised, levels: 3, align: {name: gpo, loss: logistic, beta: 0.1}}"
SOFT = "method={name: self_supervised, align: {name: soft, kl_coef: 0}}"

TEXT = " It is warm near the sea, and the rain is rare."
"""Four key phrases, each of one word: warm, sea, rain, rare."""

Check = Callable[..., dict[str, Any]]


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Four pairs whose chosen response has key phrases and whose rejected one has none."""
    rows = [{"prompt": f"Human: Why {n}?\nAssistant:", "chosen": TEXT, "rejected": " No."} for n in range(4)]
    write_pairs(tmp_path / "four.jsonl", rows)
    return [SELF_SUPERVISED, f"dataset.train={tmp_path}/four.jsonl", "dataset.eval={}"]


@pytest.fixture
def check(prefopt: Prefopt, recipe: Path, options: list[str]) -> Check:
    """`check("--pairs", "0")` -> the object that --json prints."""

    def run(*arguments: str) -> dict[str, Any]:
        result = prefopt("check", str(recipe), *options, *arguments, "--json")
        assert result.code == 0, result.err
        return json.loads(result.out)

    return run


def test_a_response_is_there_at_all_its_levels(check: Check) -> None:
    found = check()["degrees"]
    assert (found["side"], found["text"]) == ("chosen", TEXT + "</s>")
    assert [each["level"] for each in found["levels"]] == [1, 2]
    lengths = [found["tokens"], *(each["tokens"] for each in found["levels"])]
    assert lengths == sorted(lengths, reverse=True)
    for each in found["levels"]:
        left, at = "", 0
        for start, end, instead in each["removed"]:
            left += found["text"][at:start] + instead
            at = end
        assert left + found["text"][at:] == each["text"]
        assert each["text"].endswith("</s>")


def test_nothing_is_shown_where_nothing_is_to_be(check: Check) -> None:
    assert check("--pairs", "0")["degrees"] is None


def test_without_colour_marks_stand_around_what_is_removed(
    prefopt: Prefopt, recipe: Path, options: list[str]
) -> None:
    shown = prefopt("check", str(recipe), *options).out
    (first,) = re.findall(r"A response at its levels, four.jsonl:\d+ chosen, .*", shown)
    assert first.endswith("with what is removed between [- and -]:")
    levels = re.findall(r"  level (\d), \d+ tokens: (.*)", shown)
    assert [number for number, _ in levels] == ["0", "1", "2"]
    assert levels[0][1] == TEXT + "</s>"
    for _, text in levels[1:]:
        assert "[-" in text
        assert re.sub(r"\[-|-\]", "", text) == levels[0][1]
    assert "\x1b[" not in shown


def test_in_colour_it_is_struck_through(recipe: Path, options: list[str]) -> None:
    shown = on_a_terminal("check", str(recipe), *options)
    assert "with what is removed struck through:" in shown
    assert re.search("\x1b\\[2;9m[^\x1b]*warm", shown)
    assert "[- and -]" not in shown


def shown(found: DegradedResponse, **options: Any) -> str:
    out = io.StringIO()
    print_degrees(found, Console(file=out, width=80, **options))
    return out.getvalue()


def test_a_long_response_is_cut_and_says_so() -> None:
    """400 of 500 characters; of 50 removed ones 20 are not shown."""
    text = "x" * 370 + "y" * 50 + "z" * 80
    version = DegradedVersion(1, 45, "x" * 370 + "z" * 80, [Cut(370, 420, "")])
    whole, level = shown(DegradedResponse("a:1", "chosen", 50, text, [version])).splitlines()[1:]
    assert CHARACTERS_SHOWN == 400
    assert whole == "  level 0, 50 tokens: " + text[:400] + " (100 more characters)"
    assert level.endswith("x[-" + "y" * 30 + "-] (100 more characters, 20 of them removed)")


def test_line_breaks_and_brackets_are_written_as_they_are() -> None:
    version = DegradedVersion(2, 3, "a [b] d", [Cut(6, 9, "")])
    text = shown(DegradedResponse("a:[red]", "chosen", 4, "a [b]\nc\n d", [version]))
    assert "a:[red] chosen" in text
    assert "  level 0, 4 tokens: a [b]\\nc\\n d" in text
    assert "  level 2, 3 tokens: a [b]\\n[-c\\n -]d" in text


def test_what_stands_instead_of_something_is_shown_behind_it() -> None:
    version = DegradedVersion(1, 3, "one two", [Cut(3, 4, " ")])
    assert "level 1, 3 tokens: one[-,-] two" in shown(
        DegradedResponse("a:1", "chosen", 3, "one,two", [version])
    )


def test_degraded_tokens_are_counted_apart(
    prefopt: Prefopt, recipe: Path, check: Check, options: list[str]
) -> None:
    """Every batch is the four pairs; of each chosen response one of three levels is drawn."""
    found = check("method.levels_per_step=1")
    packing, levels = found["packing"], found["degrees"]["levels"]
    expected = 4 * sum(each["tokens"] for each in levels) / 3
    assert packing["unscored_tokens"] == pytest.approx(expected)
    alone = check("method={name: gpo, loss: logistic, beta: 0.1}")["packing"]
    assert alone["unscored_tokens"] is None
    assert packing["response_tokens"] == alone["response_tokens"]
    assert packing["packed_tokens"] == pytest.approx(alone["packed_tokens"] + expected)
    assert packing["heaviest_tokens"] == alone["heaviest_tokens"] + 4 * levels[0]["tokens"]

    text = prefopt("check", str(recipe), *options).out
    assert re.search(rf"of them in degraded responses\s+{expected:,.0f}\s+{expected:,.0f}\n", text)
    assert re.search(r"a batch of 4 pairs \(mean of 1\)\s+padded rows\s+prefopt", text)
    assert "times as fast as on padded rows.\n" in text
    cost = packing["unscored_cost"]
    assert f"The degree loss adds {cost:.0%} to the arithmetic of a step (predicted): it takes " in text
    assert f"{1 + cost:.1f} times as long as with method.align alone." in text
    assert "every response beside the longest degraded versions that may be drawn." in text
    assert "TRL" not in text


def test_memory_grows_with_the_levels_of_a_step(check: Check) -> None:
    one, two = (check(f"method.levels_per_step={number}")["memory"] for number in (1, 2))
    assert two["method"] == "traced"
    assert one["parts"]["activations"] < two["parts"]["activations"]
    assert one["parts"].get("LM head") == two["parts"].get("LM head")


def test_beside_soft(prefopt: Prefopt, recipe: Path, options: list[str]) -> None:
    result = prefopt("check", str(recipe), SOFT, *options[1:])
    assert result.code == 0, result.err
    assert "The degree loss adds" in result.out
    assert "Reference policy" not in result.out


def test_the_receipt_says_how_many_take_part(check: Check) -> None:
    out = io.StringIO()
    record = check()["receipt"]
    print_receipt(record, Console(file=out, width=200))
    assert (
        "train: 4 of 8 responses have degrees: level 1 4, level 2 4; 4 take no part\n"
        "degrees: level k of 3 lacks about k/3 of a response's key phrases, and level 0 is the response itself; of "
        "levels that come out alike the lowest is kept\n"
    ) in out.getvalue()
