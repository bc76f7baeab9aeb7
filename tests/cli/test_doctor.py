"""`prefopt doctor`."""

import json
from pathlib import Path

import pytest

from prefopt_cli.launch.doctor import examination
from tests.cli.conftest import Prefopt, on_a_terminal

STATES = ("ok", "note", "problem")


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what takes no time: what needs torch is tested in tests/launch."""
    every = examination.sections

    def few(*arguments: object, **options: object) -> list[examination.Section]:
        return [each for each in every(*arguments, **options) if each.name in ("machine", "recipe")]  # type: ignore[arg-type]

    monkeypatch.setattr(examination, "sections", few)


def test_the_whole_examination(prefopt: Prefopt) -> None:
    result = prefopt("doctor", "--quick", "--json")
    found = json.loads(result.out)
    findings = [finding for section in found["sections"] for finding in section["findings"]]
    assert [section["title"] for section in found["sections"]] == [
        *("Versions", "Machine", "Disks", "Hub", "Devices", "Quantisation", "Processes"),
    ]
    assert all(section["findings"] for section in found["sections"])
    assert all(finding["state"] in STATES for finding in findings)
    assert all(finding["remedy"] for finding in findings if finding["state"] != "ok")
    assert result.code == (1 if found["problems"] else 0)
    assert not [finding for finding in findings if "did not come to its end" in finding["text"]]


def test_a_sound_recipe(prefopt: Prefopt, recipe: Path, light: None) -> None:
    result = prefopt("doctor", str(recipe))
    assert result.code == 0, result.out
    assert "  ok       output_dir" in result.out or "  ok       a checkpoint takes" in result.out
    assert f"{recipe} can be trained here." in result.out


def test_a_recipe_that_cannot_be_trained_here(prefopt: Prefopt, recipe: Path, light: None) -> None:
    result = prefopt("doctor", str(recipe), "dataset.train=gone.jsonl")
    assert result.code == 1
    assert "  problem  data gone.jsonl is not there\n           -> put it there: " in result.out
    assert result.out.rstrip().endswith("cannot be trained here until it is put right.")
    found = json.loads(prefopt("doctor", str(recipe), "dataset.train=gone.jsonl", "--json").out)
    assert (found["recipe"], found["problems"]) == (str(recipe), 1)


def test_a_recipe_that_is_wrong(prefopt: Prefopt, recipe: Path) -> None:
    result = prefopt("doctor", str(recipe), "method.betta=1")
    assert result.code == 2
    assert "betta" in result.err


def test_colours_on_a_terminal() -> None:
    shown = on_a_terminal("doctor", "--quick")
    assert "\x1b[32mok" in shown
    assert all(len(line) < 400 for line in shown.splitlines())
