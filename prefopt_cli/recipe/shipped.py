"""The recipes that come with prefopt."""

from dataclasses import asdict, dataclass
from pathlib import Path

from prefopt_cli.errors import PrefoptError, UserError
from prefopt_cli.recipe.yaml_reader import parse_yaml

CHAIN_PREFIX = "chain-"
"""How the names of chains begin."""

_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ShippedRecipe:
    """A line of ``prefopt recipe list``."""

    name: str
    purpose: str
    method: str
    """``chain`` for several stages in one file, which are for ``prefopt chain``."""

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
    return {path.stem: path for path in _yaml_files() if not path.stem.startswith(CHAIN_PREFIX)}


def shipped_chains() -> dict[str, Path]:
    """Name -> file of every shipped chain of stages, sorted by name."""
    return {path.stem: path for path in _yaml_files() if path.stem.startswith(CHAIN_PREFIX)}


def _yaml_files() -> list[Path]:
    return sorted(recipes_folder().glob("*.yaml"))


def shipped_file(name: str) -> Path:
    """The shipped file of this name: a recipe or chain with or without ``.yaml``, or a module or script beside one.

    Raises UserError with the nearest name and the list of all.
    """
    from prefopt_cli.recipe.suggestions import nearest

    recipes = {**shipped_recipes(), **shipped_chains()}
    others = {path.name: path for kind in ("*.py", "*.sh") for path in sorted(recipes_folder().glob(kind))}
    found = recipes.get(name) or recipes.get(name.removesuffix(".yaml")) or others.get(name)
    if found:
        return found
    close = nearest(name.removesuffix(".yaml"), [*recipes, *others])
    guess = f" (did you mean {close!r}?)" if close else ""
    raise UserError(f"there is no shipped recipe {name!r}{guess}; there are: {', '.join(recipes)}")


def describe_recipes() -> list[ShippedRecipe]:
    """Name, purpose (the first comment after the head lines) and method of each shipped recipe and chain."""
    described = []
    for name, path in {**shipped_chains(), **shipped_recipes()}.items():
        text = path.read_text(encoding="utf-8")
        comments = (line.lstrip("# ") for line in text.splitlines()[1:] if line.startswith("# "))
        purpose = next(comment for comment in comments if not comment.startswith("yaml-language-server"))
        method = "chain" if name in shipped_chains() else parse_yaml(text, path.name).data["method"]["name"]
        described.append(ShippedRecipe(name, purpose, method))
    return described
