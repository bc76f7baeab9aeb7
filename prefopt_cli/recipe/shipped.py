"""The recipes that come with prefopt."""

from dataclasses import asdict, dataclass
from pathlib import Path

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.recipe.yaml_reader import parse_yaml

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ShippedRecipe:
    """A line of ``prefopt recipe list``."""

    name: str
    purpose: str
    method: str

    def to_dict(self) -> dict[str, str]:
        """For ``--json``."""
        return asdict(self)


def recipes_folder() -> Path:
    """``prefopt_cli/_recipes`` of an installed wheel, ``recipes`` of a checkout."""
    for folder in (_PACKAGE / "_recipes", _PACKAGE.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise PrefoptError("the shipped recipes are not installed; reinstall prefopt")


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of every shipped recipe, sorted by name."""
    return {path.stem: path for path in sorted(recipes_folder().glob("*.yaml"))}


def shipped_file(name: str) -> Path:
    """The shipped file of this name: a recipe with or without ``.yaml``, or a module beside one.

    Raises UserError with the nearest name and the list of all.
    """
    from prefopt_cli.recipe.suggestions import nearest

    recipes = shipped_recipes()
    modules = {path.name: path for path in sorted(recipes_folder().glob("*.py"))}
    found = recipes.get(name) or recipes.get(name.removesuffix(".yaml")) or modules.get(name)
    if found:
        return found
    close = nearest(name.removesuffix(".yaml"), [*recipes, *modules])
    guess = f" (did you mean {close!r}?)" if close else ""
    raise UserError(f"there is no shipped recipe {name!r}{guess}; there are: {', '.join(recipes)}")


def describe_recipes() -> list[ShippedRecipe]:
    """Name, purpose (the first comment after the two head lines) and method of each shipped recipe."""
    described = []
    for name, path in shipped_recipes().items():
        text = path.read_text(encoding="utf-8")
        comments = (line.lstrip("# ") for line in text.splitlines()[2:] if line.startswith("#"))
        purpose = next((comment for comment in comments if comment), "")
        described.append(ShippedRecipe(name, purpose, parse_yaml(text, path.name).data["method"]["name"]))
    return described
