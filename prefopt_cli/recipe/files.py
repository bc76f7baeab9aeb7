"""The text of a recipe file, or a clear reason why there is none."""

from pathlib import Path

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.shipped import shipped_chains, shipped_recipes
from prefopt_cli.recipe.suggestions import nearest
from prefopt_cli.recipe.yaml_loader import MAX_BYTES


def read_recipe_text(path: Path) -> str:
    """Read a UTF-8 file of at most ``MAX_BYTES``; raises UserError with what to do instead."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(_missing(path)) from None
    except IsADirectoryError:
        raise UserError(_folder(path)) from None
    except PermissionError:
        raise UserError(f"{path} cannot be read: permission denied") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{str(path)[:200]!r} cannot be read: {reason}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES // 1000} kB; that is not a recipe")
    return _decode(content, path)


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise UserError(
            f"{path}:{line}  not UTF-8: byte 0x{byte:02x} at offset {error.start}; save the file as UTF-8"
        ) from None


def _folder(path: Path) -> str:
    if (path / "recipe.yaml").is_file():
        return f"{path} is a folder; did you mean {path / 'recipe.yaml'}?"
    return f"{path} is a folder; a recipe is a YAML file"


def _missing(path: Path) -> str:
    if str(path) == "-":
        return "a recipe is a file, which --resume reads again: save it, or name /dev/stdin for once"
    message = f"{path} does not exist"
    shipped = {**shipped_recipes(), **shipped_chains()}
    if path.stem in shipped:
        return f"{message}; to get the shipped recipe: prefopt recipe show {path.stem} > {path.stem}.yaml"
    folder = path.parent
    if not folder.is_dir():
        return f"{message}: there is no folder {folder}"
    beside = {entry.stem: entry for entry in folder.glob("*.y*ml")}
    close = nearest(path.stem, beside)
    if close:
        return f"{message}; did you mean {beside[close]}?"
    close = nearest(path.stem, shipped)
    if close:
        return f"{message}; there is a shipped recipe {close!r}: prefopt recipe show {close} > {close}.yaml"
    return (
        f"{message}; `prefopt recipe list` names the shipped ones, `prefopt recipe new gpo` starts a new one"
    )
