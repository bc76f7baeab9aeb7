"""What is written beside a run reads back as the same recipe."""

import pytest

from prefopt_cli.recipe import diff_recipes, dump_recipe, shipped_recipes
from prefopt_cli.recipe.loader import load_recipe

AWKWARD = [
    "no",
    "1e-5",
    "1.0",
    "0x10",
    "null",
    "~",
    "true",
    "yes",
    "010",
    "1_000",
    "a: b",
    "# c",
    "",
    " x ",
    "ü\n\ty",
    "<<",
]
AWKWARD += ["2024-01-01", "1:30", "- x", "*a", "'", '"', "{}", "=", "x" * 300, "a b " * 60]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_strings_survive(load, sound, text):
    recipe = load(sound)
    source = recipe.dataset.train[0].model_copy(
        update={"where": {"key": text, text: [1, 1.5, None, True, text]}}
    )
    dataset = recipe.dataset.model_copy(update={"train": [source]})
    changed = recipe.model_copy(update={"dataset": dataset})
    assert load(dump_recipe(changed)) == changed


def test_a_run_with_everything_set_survives(load, sound):
    recipe = load(
        sound,
        "adapter={type: lora, target_modules: [q, v], rank_pattern: {a.b: 4}, init_lora_weights: gaussian}",
        "dataset.holdout=0.25",
        "training.save_strategy=no",
        "training.learning_rate=1e-7",
        "training.lr_scheduler_kwargs={a: [1, 2]}",
        "method.loss=pkg.mod:f",
    )
    assert load(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_survive(load, name):
    recipe = load_recipe(shipped_recipes()[name])
    text = dump_recipe(recipe)
    assert load(text) == recipe
    assert "length_normalize:" in text
    assert "on_overflow: drop" in text  # defaults are written out


def test_differences_are_named_by_path(load, sound):
    one = load(sound)
    other = load(
        sound,
        "method.beta=0.5",
        "training.seed=1",
        "dataset.train.0.limit=3",
        "adapter={type: lora}",
        "dataset.seed=2",
    )
    expected = ["adapter", "dataset.seed", "dataset.train.0.limit", "method.beta", "training.seed"]
    assert diff_recipes(one, other) == expected
    assert diff_recipes(other, one) == expected
    assert diff_recipes(one, load(sound)) == []
    assert diff_recipes(one, load(sound, "dataset.train=[a, b]")) == ["dataset.train"]
