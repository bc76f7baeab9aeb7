"""The house keeps its order: imports point down, modules are short and documented, nothing runs foreign code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "prefopt_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))

ROOMS = (
    "cli", "chain", "evaluation", "training", "launch", "scoring", "losses", "models", "data", "runs", "recipe",
)  # fmt: skip
"""From the top down: a room imports from those after it. `errors` is open to all."""

SANDBOX = "sandbox"
"""Beside the list: it uses data, models and the statistics of evaluation, and only cli uses it."""

LONGEST = 300

FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.load_all",
    "torch.load",
    "pickle.load",
    "pickle.loads",
    "os.system",
}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "requests"}
MAY_IMPORT_BY_NAME = {"training/functions.py", "recipe/training_fields.py", "recipe/schemes.py"}
"""A user's own f, which the recipe names; the installed libraries' source; the module that serves a scheme."""


def _name(module: Path) -> str:
    return module.relative_to(PACKAGE).as_posix()


def _tree(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


def _imports(module: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, inside functions and type-checking blocks too."""
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_name(module)}:{node.lineno} imports relatively"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def _allowed(room: str) -> set[str]:
    if room == SANDBOX:
        return {SANDBOX, "evaluation", *ROOMS[ROOMS.index("models") :]}
    below = set(ROOMS[ROOMS.index(room) :])
    return below | {SANDBOX} if room == "cli" else below


@pytest.mark.parametrize("module", MODULES, ids=_name)
def test_imports_point_down(module: Path) -> None:
    parts = module.relative_to(PACKAGE).parts
    for line, name in _imports(module):
        own = name.split(".")
        if own[0] != "prefopt_cli" or len(own) < 2 or own[1] in ("errors", "__version__"):
            continue
        assert parts[0] != "errors.py", f"errors.py:{line} imports {name}"
        if len(parts) > 1:  # __main__ and __init__ may start anything
            assert own[1] in _allowed(parts[0]), f"{_name(module)}:{line} imports {name}, which is above it"


def test_every_room_is_on_the_list() -> None:
    rooms = {module.relative_to(PACKAGE).parts[0] for module in MODULES if module.parent != PACKAGE}
    assert rooms <= {*ROOMS, SANDBOX}


@pytest.mark.parametrize("module", MODULES, ids=_name)
def test_nothing_runs_foreign_code(module: Path) -> None:
    for line, name in _imports(module):
        assert name.split(".")[0] not in FORBIDDEN_MODULES, f"{_name(module)}:{line} imports {name}"
        if name.split(".")[0] == "importlib" and name.split(".")[-1] not in ("metadata", "resources"):
            assert _name(module) in MAY_IMPORT_BY_NAME, f"{_name(module)}:{line} imports {name}"
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN_CALLS or ast.unparse(node) == "exec('')", (
                f"{_name(module)}:{node.lineno} calls {called}"
            )
            for keyword in node.keywords:
                literal = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                assert not (keyword.arg in ("trust_remote_code", "shell") and literal), (
                    f"{_name(module)}:{node.lineno} sets {keyword.arg}"
                )


def _undocumented(tree: ast.Module) -> Iterator[str]:
    """Public modules, classes, functions and methods without a docstring.

    A property says enough by its name; a subclass's methods are described where they are first declared.
    """
    if tree.body and not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield node.name
            for inner in node.body if isinstance(node, ast.ClassDef) and not node.bases else ():
                if (
                    isinstance(inner, ast.FunctionDef)
                    and not inner.name.startswith("_")
                    and "property" not in map(ast.unparse, inner.decorator_list)
                    and not ast.get_docstring(inner)
                ):
                    yield f"{node.name}.{inner.name}"


@pytest.mark.parametrize("module", MODULES, ids=_name)
def test_what_is_public_is_documented(module: Path) -> None:
    assert list(_undocumented(_tree(module))) == []


@pytest.mark.parametrize("module", MODULES, ids=_name)
def test_modules_are_short(module: Path) -> None:
    assert len(module.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_heavy_libraries_wait_for_the_command_that_needs_them() -> None:
    """The recipe room is light, and so are the modules of the command line at their top level."""
    heavy = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes", "pyarrow"}
    for module in MODULES:
        name = _name(module)
        if name.startswith("recipe/"):
            found = {imported.split(".")[0] for _, imported in _imports(module)}
        elif name.startswith("cli/"):
            top = [node for node in _tree(module).body if isinstance(node, ast.Import | ast.ImportFrom)]
            found = {(getattr(node, "module", None) or node.names[0].name).split(".")[0] for node in top}
        else:
            continue
        assert not found & heavy, f"{name} imports {found & heavy}"
