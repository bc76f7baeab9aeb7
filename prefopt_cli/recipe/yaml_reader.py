"""YAML text -> plain data, with the line of every key.

Scalars follow YAML 1.2: ``no`` is a string, ``1e-5`` a number, ``010`` is ten. What PyYAML would let
pass silently (duplicate keys, keys that are no strings) is a mistake here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from prefopt_cli.errors import UserError
from prefopt_cli.recipe.problems import Path, Problem, shown
from prefopt_cli.recipe.yaml_loader import TAG, RecipeYamlLoader, refuse_explosion

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass
class Document:
    """What a recipe file says: data, the line of each key path, and mistakes of the YAML itself."""

    data: Any
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unreadable: set[Path] = field(default_factory=set)
    """Paths whose value is None only because it could not be read, which is told already."""


def parse_yaml(text: str, name: str) -> Document:
    """Parse one YAML document.

    Raises UserError, prefixed with ``name``, where the text cannot be read at all. Mistakes that leave
    the rest readable (duplicate keys ...) are returned as problems, to be told with all others.
    """
    bad = _UNPRINTABLE.search(text)
    if bad:
        place = _position(text, bad.start())
        raise UserError(
            f"{name}:{place}  character U+{ord(bad.group()):04X} is not allowed in a recipe; remove it"
        )
    loader = RecipeYamlLoader(text)
    try:
        root = _single_node(loader, name)
    except yaml.MarkedYAMLError as error:
        raise UserError(_syntax_message(error, name)) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: "\UFFFFFFFF"
        raise UserError(f"{name}  YAML syntax: {error}") from None
    finally:
        loader.dispose()
    if root is None:
        return Document(None)
    refuse_explosion(root, name)
    builder = _Builder()
    builder.lines[()] = root.start_mark.line + 1
    return Document(builder.build(root, ()), builder.lines, builder.problems, builder.unreadable)


def _single_node(loader: RecipeYamlLoader, name: str) -> Node | None:
    if not loader.check_node():
        return None
    root: Node | None = loader.get_node()
    if loader.check_node():
        line = loader.peek_event().start_mark.line + 1
        raise UserError(
            f"{name}:{line}  a second YAML document starts here; a recipe is one document: remove '---'"
        )
    return root


def _position(text: str, offset: int) -> str:
    line = text.count("\n", 0, offset) + 1
    column = offset - (text.rfind("\n", 0, offset) + 1) + 1
    return f"{line}:{column}"


def _syntax_message(error: yaml.MarkedYAMLError, name: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
    message = error.problem or error.context or str(error)
    if error.problem and error.context and error.context_mark:
        message = f"{message} ({error.context} of line {error.context_mark.line + 1})"
    if "'\\t'" in message:
        message += "; indent with spaces, YAML allows no tabs"
    elif message.startswith("mapping values are not allowed"):
        message += (
            "; is the line before it complete, and the indentation right? Quote a text that contains ': '"
        )
    return f"{place}  YAML syntax: {message}"


class _Builder:
    """Turns nodes into plain data and notes the line of each key path."""

    def __init__(self) -> None:
        self.lines: dict[Path, int] = {}
        self.problems: list[Problem] = []
        self.unreadable: set[Path] = set()

    def build(self, node: Node, path: Path) -> Any:
        if isinstance(node, MappingNode) and node.tag == f"{TAG}map":
            return self._mapping(node, path)
        if isinstance(node, SequenceNode) and node.tag == f"{TAG}seq":
            items = []
            for index, item in enumerate(node.value):
                self.lines[(*path, index)] = item.start_mark.line + 1
                items.append(self.build(item, (*path, index)))
            return items
        if isinstance(node, ScalarNode):
            return self._scalar(node, path)
        return self._unreadable(node, path, _tag_message(node))

    def _unreadable(self, node: Node, path: Path, message: str) -> Any:
        self.unreadable.add(path)
        self._problem(node, path, message)
        return None

    def _problem(self, node: Node, path: Path, message: str) -> None:
        self.problems.append(Problem(path, message, line=node.start_mark.line + 1))

    def _mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        built: dict[str, Any] = {}
        own: dict[str, int] = {}
        merged: list[tuple[Node, Node]] = []
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == f"{TAG}merge":
                merged += self._merge_pairs(value, path)
            elif wrong := _wrong_key(key):
                self._problem(key, path, f"a key must be a string; {wrong}")
            elif key.value in own:
                message = f"duplicate key; first on line {own[key.value]}, again on line {line}"
                self._problem(key, (*path, key.value), message)
            else:
                own[key.value] = line
                self.lines[(*path, key.value)] = line
                built[key.value] = self.build(value, (*path, key.value))
        for key, value in merged:  # keys of the mapping itself win, then the first merged mapping that has it
            if key.value not in built:
                self.lines[(*path, key.value)] = key.start_mark.line + 1
                built[key.value] = self.build(value, (*path, key.value))
        return built

    def _merge_pairs(self, node: Node, path: Path) -> list[tuple[Node, Node]]:
        sources = node.value if isinstance(node, SequenceNode) else [node]
        pairs: list[tuple[Node, Node]] = []
        for source in sources:
            if not isinstance(source, MappingNode):
                self._problem(source, path, f"'<<' merges mappings only; found {_kind(source)}")
                continue
            for key, value in source.value:
                if key.tag == f"{TAG}merge":
                    pairs += self._merge_pairs(value, path)
                elif not _wrong_key(key):
                    pairs.append((key, value))
        return pairs

    def _scalar(self, node: ScalarNode, path: Path) -> Any:
        text: str = node.value
        try:
            return _SCALARS[node.tag](text)
        except KeyError:
            return self._unreadable(node, path, _tag_message(node))
        except ValueError:
            return self._unreadable(
                node, path, f"{shown(text)} cannot be read as {node.tag.removeprefix(TAG)}"
            )


def _tag_message(node: Node) -> str:
    return f"the tag {shown(node.tag.replace(TAG, '!!'))} is not allowed in a recipe; write plain values"


def _wrong_key(node: Node) -> str | None:
    if not isinstance(node, ScalarNode):
        return f"found {_kind(node)}"
    if node.tag != f"{TAG}str":
        return f"put {node.value or 'null'} in quotes"
    try:
        _string(node.value)
    except ValueError:
        return f"found {shown(node.value)}"
    return None


def _kind(node: Node) -> str:
    return (
        "a list"
        if isinstance(node, SequenceNode)
        else "a mapping"
        if isinstance(node, MappingNode)
        else "a value"
    )


def _string(text: str) -> str:
    text.encode()  # an escape can make half a character, which nothing can print; raises a ValueError
    return text


def _integer(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError(text)
    return text.lower() == "true"


def _float(text: str) -> float:
    return float(re.sub(r"\.(inf|nan)$", r"\1", text, flags=re.IGNORECASE))


_SCALARS: dict[str, Callable[[str], Any]] = {
    f"{TAG}str": _string,
    f"{TAG}int": _integer,
    f"{TAG}float": _float,
    f"{TAG}bool": _boolean,
    f"{TAG}null": lambda text: None,
}
