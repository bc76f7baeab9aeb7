"""Annotated recipes to start from, one for each method."""

import re
from pathlib import Path

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.suggestions import nearest

_FOLDER = Path(__file__).with_name("starters")


def starter_methods() -> list[str]:
    """The methods that have a starter."""
    return sorted(path.stem for path in _FOLDER.glob("*.yaml"))


def starter_recipe(method: str, path: str = "my.yaml") -> str:
    """The text of a starter that names itself ``path``.

    Raises UserError for an unknown method.
    """
    methods = starter_methods()
    if method not in methods:
        close = nearest(method, methods)
        guess = f" (did you mean {close!r}?)" if close else ""
        raise UserError(f"there is no method {method!r}{guess}; there are: {', '.join(methods)}")
    text = (_FOLDER / f"{method}.yaml").read_text(encoding="utf-8")
    # The path goes into comments, the stem into a plain scalar: nothing odd may get there.
    shown = path if re.fullmatch(r"[\w./~+-]+", path) else "my.yaml"
    stem = Path(shown).stem
    run = stem if re.fullmatch(r"[A-Za-z][\w.-]*", stem) else "my"
    return text.replace("@RECIPE@", shown).replace("@OUTPUT_DIR@", f"runs/{run}")


def write_starter(method: str, output: Path) -> None:
    """Write a starter to a new file; raises UserError rather than overwrite one."""
    text = starter_recipe(method, str(output))
    try:
        with output.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"{output} exists and is not overwritten; choose another name") from None
    except FileNotFoundError:
        raise UserError(f"{output} cannot be written: there is no folder {output.parent}") from None
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from None
