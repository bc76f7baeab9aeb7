"""A user's own f for `gpo`: found, imported and probed before anything is trained."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from prefopt_cli.errors import UserError
from prefopt_cli.losses.gpo import CONVEX_FUNCTIONS, ConvexFunction, Probe, probe


def find_function(loss: str, folder: Path, key: str) -> ConvexFunction:
    """f by its name in the paper's table, or by `package.module:function`.

    Modules are looked for beside the recipe (`folder`) first, then wherever Python looks. `key` is where the recipe
    names f, for messages.

    Raises:
        UserError: no such module or function, or it cannot be imported.
    """
    if loss in CONVEX_FUNCTIONS:
        return CONVEX_FUNCTIONS[loss]
    module_name, _, attribute = loss.partition(":")
    try:
        with _importing_from(folder):
            found = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{key}: there is no module {error.name!r} beside the recipe ({folder}) or installed."
        ) from error
    except AttributeError as error:
        raise UserError(f"{key}: the module {module_name} has no function {attribute!r}.") from error
    except Exception as error:  # a user's module may raise anything
        raise UserError(f"{key}: importing {module_name} raises {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"{key}: {loss} is not a function.")
    function: ConvexFunction = found
    return function


def require_usable(loss: str, function: ConvexFunction, key: str) -> Probe:
    """Probe f and refuse it if it cannot train; `key` as for `find_function`.

    Raises:
        UserError: f'(0) is not negative, or f is not finite or not elementwise on the grid.
    """
    found = probe(function)
    if found.problems:
        raise UserError(f"{key}: {loss} cannot serve as f: {'; '.join(found.problems)}.")
    return found


def describe_probe(loss: str, found: Probe) -> str:
    """The probe's figures in one line, with the warning that a non-convex f deserves."""
    text = f"{loss}: f'(0) = {found.slope_at_zero:.4g}, |f''(0)/f'(0)| = {found.curvature_ratio:.4g}"
    if found.convex:
        return f"{text}, convex on [-20, 20]"
    return f"{text}. Warning: it is not convex, so the paper's analysis does not cover it"


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))
