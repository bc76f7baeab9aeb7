"""The recipe as JSON Schema, for completion and checks in editors (yaml-language-server)."""

from typing import Any

from pydantic import TypeAdapter

from prefopt_cli.recipe.schema import Recipe
from prefopt_cli.recipe.training_fields import MISSING
from prefopt_cli.recipe.training_settings import allowed_fields, field_type

_OWN_DEFAULTS = ("eval_strategy", "bf16", "dataloader_pin_memory")
"""Fields whose default depends on the recipe or the machine (`prefopt_cli.training.arguments`)."""


def recipe_json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe; ``training`` lists the fields of the installed trl and transformers."""
    schema = Recipe.model_json_schema()
    schema["properties"]["training"] |= {
        "additionalProperties": False,
        "properties": {name: _training_field(name) for name in allowed_fields()},
    }
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "prefopt recipe"}
    without_titles: dict[str, Any] = _without_titles(schema)
    return head | without_titles


def _training_field(name: str) -> dict[str, Any]:
    field = allowed_fields()[name]
    schema: dict[str, Any] = TypeAdapter(field_type(name)).json_schema()
    if field.help:
        schema["description"] = field.help
    if field.default is not MISSING and name not in _OWN_DEFAULTS:
        schema["default"] = field.default
    return schema


def _without_titles(schema: Any) -> Any:
    """pydantic titles every key; in an editor they only hide the descriptions."""
    if isinstance(schema, dict):
        return {
            key: _without_titles(value)
            for key, value in schema.items()
            if not (key == "title" and isinstance(value, str))
        }
    return [_without_titles(item) for item in schema] if isinstance(schema, list) else schema
