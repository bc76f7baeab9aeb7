"""The fields of ``DPOConfig`` as the installed trl and transformers define them, without importing either.

Importing them takes many seconds; a recipe is to be judged in milliseconds. So their source is read:
names, annotations, literal defaults and help texts of three dataclasses, and the values of the enums.
"""

import ast
import importlib.util
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from prefopt_cli.errors import PrefoptError

DATACLASSES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/dpo_config.py", "DPOConfig"),
)
"""From the base upwards: a later class overrides fields of an earlier one."""

ENUMS = (
    ("transformers", "training_args.py", "OptimizerNames"),
    ("transformers", "trainer_utils.py", "SchedulerType"),
    ("transformers", "trainer_utils.py", "IntervalStrategy"),
    ("transformers", "trainer_utils.py", "SaveStrategy"),
    ("transformers", "trainer_utils.py", "HubStrategy"),
    ("transformers", "debug_utils.py", "DebugOption"),
)

MISSING: Any = object()

_NAMES: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "dict": dict[str, Any],
    "list": list[Any],
    "Any": Any,
}


@dataclass(frozen=True)
class TrainingField:
    """One field: its type as pydantic takes it, its default where that is a literal, its help text."""

    name: str
    type: Any
    default: Any
    help: str


OWN_FIELDS = (
    TrainingField(
        "attention_layout",
        Literal["auto", "packed", "padded"],
        "auto",
        "How batches are laid out: packed puts every prompt through the model once and has no padding, padded "
        "is a row for each response; auto packs where the model allows it, and says which it is.",
    ),
    TrainingField(
        "precompute_ref_log_probs",
        bool,
        True,
        "Score all data with the reference policy once, before training, and keep the scores in the cache (see "
        "prefopt cache); false runs the reference policy in every step instead.",
    ),
    TrainingField(
        "precompute_ref_batch_size",
        int | None,
        None,
        "Prompts in a batch when the data is scored with the reference policy, at most; null fills batches with as "
        "many tokens as suit the device.",
    ),
)
"""Fields of prefopt's own beside those of ``DPOConfig``, or in place of them."""


@lru_cache(maxsize=1)
def training_fields() -> Mapping[str, TrainingField]:
    """Every field of ``DPOConfig`` by name, bases first, then prefopt's own.

    Raises PrefoptError where trl or transformers is missing or laid out in a way not known here.
    """
    enums = {name: _enum_values(_class(package, file, name)) for package, file, name in ENUMS}
    fields: dict[str, TrainingField] = {}
    for package, file, name in DATACLASSES:
        for node in _class(package, file, name).body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                fields[node.target.id] = _field(node.target.id, node, enums)
    return MappingProxyType({**fields, **{field.name: field for field in OWN_FIELDS}})


@lru_cache(maxsize=8)
def _module(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)  # of a top-level name: finds it without running it
    if spec is None or not spec.submodule_search_locations:
        raise PrefoptError(f"{package} is not installed; run: pip install {package}")
    path = Path(spec.submodule_search_locations[0], file)
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError) as error:
        raise PrefoptError(f"{path} cannot be read ({error}); this {package} is not supported") from error


def _class(package: str, file: str, name: str) -> ast.ClassDef:
    for node in _module(package, file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise PrefoptError(f"{package}/{file} has no class {name}; this {package} is not supported")


def _enum_values(node: ast.ClassDef) -> tuple[str, ...]:
    values = [
        item.value.value
        for item in node.body
        if isinstance(item, ast.Assign)
        and isinstance(item.value, ast.Constant)
        and isinstance(item.value.value, str)
    ]
    return tuple(values)


def _field(name: str, node: ast.AnnAssign, enums: Mapping[str, tuple[str, ...]]) -> TrainingField:
    metadata = _keyword(node, "metadata")
    texts = dict(_literal_items(metadata)) if isinstance(metadata, ast.Dict) else {}
    choices = texts.get("choices")
    members = list(_members(node.annotation, enums))
    if isinstance(choices, list):
        members = [Literal[tuple(choices)] if member is str else member for member in members]
    elif any(_is_choice(member) for member in members):
        members = [
            member for member in members if member is not str
        ]  # `SchedulerType | str` takes its values only
    default = _literal(_keyword(node, "default"))
    help_text = str(texts.get("help", "")).replace("%%", "%").replace("`", "")
    return TrainingField(name, typing.Union[tuple(members)], default, help_text)  # noqa: UP007 (built at run time)


def _is_choice(member: Any) -> bool:
    return typing.get_origin(member) is Literal and isinstance(typing.get_args(member)[0], str)


def _keyword(node: ast.AnnAssign, name: str) -> ast.expr | None:
    if isinstance(node.value, ast.Call):
        return next((keyword.value for keyword in node.value.keywords if keyword.arg == name), None)
    return node.value if name == "default" else None


def _literal_items(node: ast.Dict) -> Iterator[tuple[Any, Any]]:
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant):
            yield key.value, _literal(value)


def _literal(node: ast.expr | None) -> Any:
    try:
        return MISSING if node is None else ast.literal_eval(node)
    except ValueError:
        return MISSING


def _members(node: ast.expr, enums: Mapping[str, tuple[str, ...]]) -> Iterator[Any]:
    """The members of a union; anything not known here accepts any value, and trl judges it later."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        yield from _members(node.left, enums)
        yield from _members(node.right, enums)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield from _members(ast.parse(node.value, mode="eval").body, enums)
    elif isinstance(node, ast.Constant) and node.value is None:
        yield type(None)
    elif isinstance(node, ast.Name) and node.id in enums:
        yield Literal[enums[node.id]]
    elif isinstance(node, ast.Name):
        yield _NAMES.get(node.id, Any)
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        yield from _generic(node.value.id, node.slice, enums)
    else:
        yield Any


def _generic(name: str, inside: ast.expr, enums: Mapping[str, tuple[str, ...]]) -> Iterator[Any]:
    arguments = inside.elts if isinstance(inside, ast.Tuple) else [inside]
    if name == "Literal":
        yield Literal[tuple(_literal(argument) for argument in arguments)]
    elif name in ("Optional", "Union"):
        for argument in arguments:
            yield from _members(argument, enums)
        if name == "Optional":
            yield type(None)
    elif name.lower() == "list":
        yield list[typing.Union[tuple(_members(inside, enums))]]  # type: ignore[misc]  # noqa: UP007
    elif name.lower() == "dict" and len(arguments) == 2:
        yield dict[str, typing.Union[tuple(_members(arguments[1], enums))]]  # type: ignore[misc]  # noqa: UP007
    else:
        yield Any
