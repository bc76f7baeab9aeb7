"""What the documentation says of sequential stages in the sandbox, on two dimensions that pull against each other."""

import json
from pathlib import Path

import pytest

from prefopt_cli.evaluation.retention import retention
from prefopt_cli.recipe import load_recipe
from prefopt_cli.recipe.shipped import shipped_recipes
from prefopt_cli.runs.folder import RunFolder
from prefopt_cli.training.reporting import Silent
from prefopt_cli.training.run import train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("sandbox")]

SETS = {name: {"source": f"sandbox:{name}", "split": "test"} for name in ("polite", "concise")}


def stage(recipe: str, dimension: str, run: Path, *overrides: str) -> RunFolder:
    """One epoch on a dimension's pairs."""
    path = shipped_recipes()[recipe]
    options = [
        f"dataset.train=sandbox:{dimension}",
        f"dataset.eval={json.dumps(SETS)}",
        f"dimension={dimension}",
        f"output_dir={run}",
        "training.eval_strategy=no",
        "training.save_strategy=no",
    ]
    recipe_ = load_recipe(path, [*options, *overrides])
    return train(recipe_, recipe_folder=path.parent, reporter=Silent()).run


def test_lambda_keeps_more_of_the_first_dimension_and_takes_less_of_the_second(tmp_path: Path) -> None:
    first = stage("gpo-sandbox", "polite", tmp_path / "polite")
    kept, learnt = {}, {}
    for weight in (0.0, 0.5):
        last = stage(
            "sequential-sandbox",
            "concise",
            tmp_path / f"concise-{weight}",
            f"model.name_or_path={first.path}",
            f"method.previous=[{first.path}]",
            f"method.lambdas={{polite: {weight}}}",
        )
        table = retention(last, Silent())
        kept[weight] = table.changes["polite"].accuracy
        learnt[weight] = table.cells["concise", "concise"].accuracy
    assert kept[0.0].high < 0  # without it, held-out accuracy on the first dimension is lost
    assert kept[0.5].value > kept[0.0].value + 0.01
    assert learnt[0.5].value < learnt[0.0].value
    assert learnt[0.5].low > 0.5
