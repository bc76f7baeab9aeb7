"""Judging a recipe imports nothing heavy."""

import subprocess
import sys

from tests.conftest import REPOSITORY

PROGRAM = """
import sys
from prefopt_cli.errors import UserError
from prefopt_cli.recipe import load_recipe, recipe_json_schema
load_recipe(sys.argv[1])
assert not any(name.startswith("prefopt_cli.sandbox") for name in sys.modules)
try:
    load_recipe(sys.argv[1], ["training.optim=x", "training.bf16=3", "nonsense=1", "model.name_or_path=sandbox:x"])
except UserError as error:
    assert "4 mistakes" in str(error), error
load_recipe(sys.argv[1], ["model.name_or_path=sandbox:base", "dataset.train=sandbox:helpful"])
recipe_json_schema()
heavy = {"torch", "transformers", "trl", "datasets", "peft", "accelerate", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


def test_loading_a_recipe_imports_nothing_heavy():
    recipe = REPOSITORY / "recipes" / "gpo-hh.yaml"
    command = [sys.executable, "-c", PROGRAM, str(recipe)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
