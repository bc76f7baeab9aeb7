"""Small runs on the tiny world."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.training.reporting import Silent
from prefopt_cli.training.run import Outcome, train

RECIPE = """\
model:
  name_or_path: {world}/model
dataset:
  train: {world}/pairs.jsonl
  eval: {{heldout: {world}/heldout.jsonl}}
  max_length: 256
method: {{name: gpo, loss: logistic, beta: 0.1}}
training:
  per_device_train_batch_size: 4
  max_steps: 6
  learning_rate: 1.0e-2
  logging_steps: 1
  save_steps: 3
  gradient_checkpointing: false
  use_cpu: true
output_dir: {out}
"""

LORA = "adapter={type: lora, r: 4, lora_alpha: 8, lora_dropout: 0.1}"

MakeRecipe = Callable[..., Recipe]
Run = Callable[..., Outcome]


@pytest.fixture
def make_recipe(tiny_world: Path, tmp_path: Path) -> MakeRecipe:
    """A recipe of the tiny world: `make_recipe("run-name", "method.beta=1", ...)`."""

    def make(name: str = "run", *overrides: str) -> Recipe:
        path = tmp_path / f"{name}.yaml"
        path.write_text(RECIPE.format(world=tiny_world, out=tmp_path / name))
        return load_recipe(path, overrides)

    return make


@pytest.fixture
def run(make_recipe: MakeRecipe, tmp_path: Path) -> Run:
    """Train a recipe of the tiny world and return the outcome."""

    def start(name: str = "run", *overrides: str, reporter: Any = None, **options: Any) -> Outcome:
        return train(
            make_recipe(name, *overrides), recipe_folder=tmp_path, reporter=reporter or Silent(), **options
        )

    return start


@pytest.fixture(scope="module")
def shared_run(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """As `run`, for runs that several tests of a module look at: each name is trained once."""
    folder = tmp_path_factory.mktemp("shared")

    @cache
    def start(name: str, *overrides: str) -> Outcome:
        path = folder / f"{name}.yaml"
        path.write_text(RECIPE.format(world=tiny_world, out=folder / name))
        return train(load_recipe(path, overrides), recipe_folder=folder, reporter=Silent())

    return start
