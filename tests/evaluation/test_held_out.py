"""Which held-out preferences are meant."""

import json
from pathlib import Path
from typing import Any

import pytest

from prefopt_cli.errors import UserError
from prefopt_cli.evaluation.held_out import chosen_sets, held_out_sets, set_name
from prefopt_cli.evaluation.targets import find_target
from prefopt_cli.recipe.schema import DatasetSettings
from prefopt_cli.runs.finding import RunFinder
from prefopt_cli.training.reporting import Silent
from tests.tiny import pairs


def settings(**values: Any) -> DatasetSettings:
    return DatasetSettings.model_validate({"train": "train.jsonl", **values})


def chosen(
    base: DatasetSettings, *listed: str, split: str | None = None, dimensions: tuple[str, ...] = ()
) -> Any:
    return chosen_sets(base, listed, split=split, dimensions=dimensions)


RECIPE = settings(eval={"kind": "kind.jsonl", "calm": "calm.jsonl"}, holdout=0.1)


def test_the_recipes_own_sets() -> None:
    assert chosen(RECIPE) == RECIPE
    one = chosen(RECIPE, dimensions=("calm",))
    assert (list(one.eval), one.holdout) == (["calm"], None)
    both = chosen(RECIPE, dimensions=("holdout", "kind"))
    assert (list(both.eval), both.holdout) == (["kind"], 0.1)
    assert list(chosen(RECIPE, dimensions=("holdout",)).eval) == []


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        (settings(), {}, r"neither dataset\.eval nor dataset\.holdout\. Name some with --data FILE"),
        (RECIPE, {"dimensions": ("brief",)}, r"--dimension brief: .* it has kind, calm, holdout\."),
        (RECIPE, {"split": "test"}, r"--split is of the preferences that --data names"),
    ],
)
def test_sets_that_are_not_there(recipe: DatasetSettings, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        chosen(recipe, **arguments)


@pytest.mark.parametrize(
    ("given", "name", "source", "split"),
    [
        ("data/some pairs.jsonl.gz", "some-pairs", "data/some pairs.jsonl.gz", None),
        ("kind=data/x.jsonl", "kind", "data/x.jsonl", None),
        ("sandbox:helpful", "helpful", "sandbox:helpful", "test"),
        ("h=sandbox:helpful", "h", "sandbox:helpful", "test"),
        ("someone/some-pairs", "some-pairs", "someone/some-pairs", "test"),
        ("./train.jsonl", "train-data", "./train.jsonl", None),
    ],
)
def test_names_and_splits(given: str, name: str, source: str, split: str | None) -> None:
    found = chosen(RECIPE, given)
    assert list(found.eval) == [name] == [set_name(given)]
    (one,) = found.eval[name]
    assert one.source == source
    assert one.split == (split or type(one)(source=source).split)
    assert found.holdout is None
    (named,) = chosen(RECIPE, given, split="validation").eval[name]
    assert named.split == "validation"


def test_a_path_with_an_equals_sign(tmp_path: Path) -> None:
    folder = tmp_path / "a=b"
    folder.mkdir()
    (folder / "x.jsonl").touch()
    assert list(chosen(RECIPE, f"{folder}/x.jsonl").eval) == ["x"]


def test_a_name_without_a_source() -> None:
    with pytest.raises(UserError, match="--data 'kind=': name a file"):
        chosen(RECIPE, "kind=")


def test_a_name_that_means_something_else(tiny_world: Path) -> None:
    target = find_target(str(tiny_world / "model"), Silent(), RunFinder())
    with pytest.raises(UserError, match="an eval set cannot be named train"):
        held_out_sets(target, chosen(RECIPE, f"train={tiny_world}/heldout.jsonl"), Silent())
    asked = chosen(RECIPE, f"holdout={tiny_world}/heldout.jsonl", f"prompts={tiny_world}/heldout.jsonl")
    found = held_out_sets(target, asked, Silent())
    assert {name: len(each.ids) for name, each in found.items()} == {"holdout": 24, "prompts": 24}


@pytest.fixture
def dimensions(tmp_path: Path) -> Path:
    """Rows of a column `dimension`: four of tone, two of fact checks, one of the number 3."""
    names = ["tone", "fact checks", "tone", "tone", "fact checks", "tone"]
    rows = [{**row, "dimension": name} for row, name in zip(pairs(6, seed=9), names, strict=True)]
    path = tmp_path / "dims.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_dimensions_of_a_file(dimensions: Path) -> None:
    every = chosen(RECIPE, str(dimensions), dimensions=("all",))
    assert {name: listed[0].where for name, listed in every.eval.items()} == {
        "tone": {"dimension": "tone"},
        "fact-checks": {"dimension": "fact checks"},
    }
    one = chosen(RECIPE, str(dimensions), dimensions=("tone",))
    assert list(one.eval) == ["tone"]
    with pytest.raises(
        UserError, match=r"--dimension calm: .*dims\.jsonl has none of it; it has tone, fact checks\."
    ):
        chosen(RECIPE, str(dimensions), dimensions=("calm",))


def test_dimensions_that_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "dims.jsonl"
    rows = [{**row, "dimension": number} for number, row in enumerate(pairs(3, seed=9))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (one,) = chosen(RECIPE, str(path), dimensions=("2",)).eval["2"]
    assert one.where == {"dimension": 2}


def test_a_file_without_dimensions(tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(
        UserError, match=r"plain\.jsonl has no column 'dimension'; it has prompt, chosen, rejected\."
    ):
        chosen(RECIPE, str(path), dimensions=("all",))


def test_the_sets_as_they_are_read(tiny_world: Path, dimensions: Path) -> None:
    """In tokens, with what was dropped, and prompts that know one another whatever their number."""
    target = find_target(str(tiny_world / "model"), Silent(), RunFinder())
    asked = chosen(target.recipe.dataset, str(dimensions), dimensions=("all",))
    found = held_out_sets(target, asked, Silent())
    assert {name: len(each.ids) for name, each in found.items()} == {"tone": 4, "fact-checks": 2}
    assert {name: each.dropped for name, each in found.items()} == {
        "tone": {"filtered by where": 2},
        "fact-checks": {"filtered by where": 4},
    }
    keys = [key for each in found.values() for key in each.prompt_keys()]
    assert len(set(keys)) == 6
    every = held_out_sets(target, chosen(target.recipe.dataset, str(dimensions)), Silent())["dims"]
    assert set(every.prompt_keys()) == set(keys)
    assert every.fingerprint not in {each.fingerprint for each in found.values()}


def test_a_model_without_a_recipe_takes_what_its_context_holds(tiny_world: Path, tmp_path: Path) -> None:
    """The tiny model holds 256 tokens; a longer row is dropped, and counted."""
    path = tmp_path / "long.jsonl"
    rows = [*pairs(3, seed=4), {"prompt": "Human: a\nAssistant:", "chosen": " no" * 400, "rejected": " b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = find_target(str(tiny_world / "model"), Silent(), RunFinder())
    found = held_out_sets(target, chosen(target.recipe.dataset, str(path)), Silent())["long"]
    assert len(found.ids) == 3
    assert found.dropped == {"response too long": 1}
    asked = find_target(
        str(tiny_world / "model"), Silent(), RunFinder(), overrides=["dataset.max_length=2000"]
    )
    with pytest.raises(UserError, match=r"the model's context holds 256"):
        held_out_sets(asked, chosen(asked.recipe.dataset, str(path)), Silent())


def test_sets_of_one_name_are_not_thrown_together(dimensions: Path, tmp_path: Path) -> None:
    """Unless the user gives them the name; of several files, dimensions are named after both."""
    other = tmp_path / "elsewhere" / dimensions.name
    other.parent.mkdir()
    other.write_text(dimensions.read_text())
    with pytest.raises(UserError, match=r"another set is called .*, too. Name them: --data NAME=SOURCE"):
        chosen(settings(), str(dimensions), str(other))
    together = chosen(settings(), f"both={dimensions}", f"both={other}")
    assert {name: len(listed) for name, listed in together.eval.items()} == {"both": 2}
    named = chosen(settings(), f"a={dimensions}", f"b={other}", dimensions=("all",))
    assert len(named.eval) == 2 * len(chosen(settings(), str(dimensions), dimensions=("all",)).eval)
    assert all(name.startswith(("a-", "b-")) for name in named.eval)
