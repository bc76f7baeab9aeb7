"""YAML -> validated, frozen objects; overrides; errors with line numbers; JSON Schema."""

from prefopt_cli.recipe.dump import diff_recipes, dump_recipe
from prefopt_cli.recipe.json_schema import recipe_json_schema
from prefopt_cli.recipe.loader import load_recipe
from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.recipe.shipped import shipped_recipes

__all__ = ["Recipe", "diff_recipes", "dump_recipe", "load_recipe", "recipe_json_schema", "shipped_recipes"]
