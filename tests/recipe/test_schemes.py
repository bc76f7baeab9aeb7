"""Names of a scheme: found through one table, and judged with the rest of the recipe."""

import inspect
from pathlib import Path

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.recipe import dump_recipe
from prefopt_cli.recipe.schemes import SCHEMES, Scheme, find_scheme, has_scheme


@pytest.mark.parametrize(
    "name", ["pairs.jsonl", "owner/name", "/a/b:c.jsonl", "./odd:name.jsonl", r"C:\data\x", "c:x", ":x", ""]
)
def test_paths_and_hub_ids_have_no_scheme(name: str) -> None:
    assert find_scheme(name, "source") is None
    assert not has_scheme(name)


def test_an_existing_file_is_a_file_unless_the_scheme_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("odd:name.jsonl", "sandbox:base"):
        (tmp_path / name).write_text("")
    assert find_scheme("odd:name.jsonl", "source") is None
    named = find_scheme("sandbox:base/seed=1", "model")
    assert named is not None
    assert named.name == "base/seed=1"
    assert find_scheme("sandbox:base", "model") is not None


def test_an_unknown_scheme_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'moon' is not a known kind of model$"):
        find_scheme("moon:base", "model")
    for name in ("sandbx:helpful", "Sandbox:helpful"):
        with pytest.raises(UserError, match=r"known kind of source; did you mean sandbox:helpful\?"):
            find_scheme(name, "source")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_module_of_the_table_offers_all_that_a_scheme_must(scheme: str) -> None:
    named = find_scheme(f"{scheme}:x", "model")
    assert named is not None
    for name, wanted in vars(Scheme).items():
        if not name.startswith("_"):
            offered = inspect.signature(getattr(named.scheme, name))
            assert list(offered.parameters) == list(inspect.signature(wanted).parameters)[1:]


SOURCE = "    - source: pairs.jsonl\n      limit: 10\n"

# (what to replace, by what, the line told, parts of the message)
MISTAKES = [
    ("some/model", "sandbox:bse", 1, ["model.name_or_path", "sandbox:base"]),
    ("some/model", "sandbox:helpful", 1, ["model.name_or_path", "sandbox:helpful is a dataset"]),
    ("some/model", "sandbox:base/temperature=1", 1, ["model.name_or_path", "temperature=1"]),
    ("some/model}", "sandbox:base, revision: main}", 1, ["model.revision", "not on the hub"]),
    ("some/model", "moon:base", 1, ["model.name_or_path", "'moon' is not a known kind of model"]),
    ("pairs.jsonl", "sandbox:helpfull", 5, ["dataset.train.0.source", "Did you mean helpful?"]),
    ("pairs.jsonl", "sandbox:helpful/temp=1", 5, ["dataset.train.0.source", "temperature=..."]),
    ("pairs.jsonl", "sandbox:base", 5, ["dataset.train.0.source", "sandbox:base is the model"]),
    (SOURCE, "    - sandbox:helpfull\n", 5, ["dataset.train.0: ", "helpfull"]),
    ("pairs.jsonl", "sandbox:polite\n      config: rankd", 6, ["dataset.train.0.config", "ranked"]),
    ("pairs.jsonl", "sandbox:polite\n      revision: a", 6, ["dataset.train.0.revision", "not on the hub"]),
    ("{source: held.jsonl}", "sandbox:polit", 8, ["dataset.eval.helpful: ", "polite"]),
    ("held.jsonl", "sandbox:polit", 8, ["dataset.eval.helpful.source", "polite"]),
    ("{source: held.jsonl}", "[a.jsonl, sandbox:polit]", 8, ["dataset.eval.helpful.1: ", "polite"]),
    ("held.jsonl", "moon:x", 8, ["dataset.eval.helpful.source", "'moon' is not a known kind of source"]),
]


@pytest.mark.parametrize(("old", "new", "line", "parts"), MISTAKES, ids=[mistake[1] for mistake in MISTAKES])
def test_a_wrong_name_is_told_with_line_and_key(refusal, sound, old, new, line, parts):
    assert sound.count(old) == 1
    message = refusal(sound.replace(old, new))
    heading, told = message.splitlines()
    assert heading.endswith(": 1 mistake")
    assert told.startswith(f"  my.yaml:{line}  ")
    for part in parts:
        assert part in told


def test_wrong_names_are_told_together_with_all_else(refusal, sound):
    text = sound.replace("some/model", "sandbox:bse").replace("limit: 10", "limit: '10'")
    message = refusal(text, "dataset.train.0.source=sandbox:x", "method.betta=1")
    assert message.splitlines()[0].endswith(": 4 mistakes")
    assert "override 'dataset.train.0.source=sandbox:x'  dataset.train.0.source: sandbox:x: " in message


def test_a_mistaken_key_is_not_judged_twice(refusal, sound):
    message = refusal(sound.replace("pairs.jsonl", "sandbox:polite\n      config: 3"))
    assert message.splitlines()[0].endswith(": 1 mistake")


def test_sound_names_are_read_and_written(load, sound):
    text = sound.replace("some/model", "sandbox:base/seed=1").replace("held.jsonl", "sandbox:polite")
    recipe = load(text, "dataset.train=sandbox:helpful/temperature=0.5/seed=1")
    assert recipe.model.name_or_path == "sandbox:base/seed=1"
    assert recipe.dataset.train[0].source == "sandbox:helpful/temperature=0.5/seed=1"
    assert load(dump_recipe(recipe)) == recipe
