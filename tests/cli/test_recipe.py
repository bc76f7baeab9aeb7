"""`prefopt recipe`."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from prefopt_cli.cli.recipe import app
from prefopt_cli.errors import UserError
from prefopt_cli.recipe import load_recipe, recipe_json_schema, shipped_recipes
from prefopt_cli.recipe.shipped import shipped_chains
from tests.conftest import REPOSITORY

runner = CliRunner()


def run(*arguments: str) -> str:
    result = runner.invoke(app, list(arguments))
    assert result.exception is None, result.exception
    return result.stdout


def test_list_names_each_recipe_with_method_and_purpose():
    lines = run("list").splitlines()
    assert [line.split()[0] for line in lines] == [*shipped_chains(), *shipped_recipes()]
    for line in lines:
        name, method, *purpose = line.split()
        assert name.startswith(method.replace("_", "-") + "-")
        assert len(purpose) > 3


def test_list_as_json():
    rows = json.loads(run("list", "--json"))
    assert [row["name"] for row in rows] == [*shipped_chains(), *shipped_recipes()]
    assert all(set(row) == {"name", "purpose", "method"} for row in rows)


@pytest.mark.parametrize("name", shipped_recipes())
def test_show_prints_the_file_as_it_is(name):
    assert run("show", name) == shipped_recipes()[name].read_text(encoding="utf-8")


def test_show_of_an_unknown_name():
    error = runner.invoke(app, ["show", "gpo-hhh"]).exception
    assert isinstance(error, UserError)
    assert "'gpo-hh'" in str(error)


@pytest.mark.parametrize("method", ["gpo", "soft", "self_supervised", "sequential"])
def test_new_prints_a_recipe_that_loads(tmp_path, method):
    path = tmp_path / "my.yaml"
    path.write_text(run("new", method), encoding="utf-8")
    assert load_recipe(path).output_dir == "runs/my"


def test_new_writes_a_file_but_never_overwrites_one(tmp_path):
    path = tmp_path / "mine.yaml"
    assert run("new", "gpo", "--output", str(path)) == ""
    text = path.read_text(encoding="utf-8")
    assert load_recipe(path).output_dir == "runs/mine"
    error = runner.invoke(app, ["new", "gpo", "--output", str(path)]).exception
    assert isinstance(error, UserError)
    assert "not overwritten" in str(error)
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["new", "dpo"], "gpo"),
        (["new", "self-supervised"], "did you mean 'self_supervised'?"),
        (["new", "gpo", "--output", "/nowhere/x.yaml"], "no folder"),
    ],
)
def test_new_refuses(arguments, part):
    error = runner.invoke(app, arguments).exception
    assert isinstance(error, UserError)
    assert part in str(error)


def test_schema_prints_the_schema():
    assert json.loads(run("schema")) == json.loads(json.dumps(recipe_json_schema()))


@pytest.mark.parametrize("command", ["list", "show", "new", "schema"])
def test_every_help_text_ends_in_an_example(command):
    lines = run(command, "--help").strip().splitlines()
    assert lines[-1].strip().startswith(f"Example: prefopt recipe {command}")


def test_the_module_imports_nothing_but_typer():
    program = (
        "import sys, prefopt_cli.cli.recipe; assert not {'pydantic', 'yaml', 'torch'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
