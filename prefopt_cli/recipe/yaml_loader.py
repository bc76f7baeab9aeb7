"""YAML text -> nodes: YAML 1.2 scalars, and limits on size, depth and aliases."""

import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, SequenceNode

from prefopt_cli.errors import UserError

MAX_BYTES = 500_000
MAX_NODES = 20_000
MAX_EXPANDED_NODES = 100_000
MAX_DEPTH = 50

TAG = "tag:yaml.org,2002:"


class RecipeYamlLoader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars and with limits on size and depth. Only composes nodes."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's API)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0
        self._depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self._nodes += 1
        self._depth += 1
        mark = self.peek_event().start_mark
        if self._nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(
                problem=f"more than {MAX_NODES:,} values: not a recipe", problem_mark=mark
            )
        if self._depth > MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested deeper than {MAX_DEPTH} levels", problem_mark=mark)
        node: Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


for _name, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("merge", r"<<", "<"),
):
    RecipeYamlLoader.add_implicit_resolver(f"{TAG}{_name}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


def _children(node: Node) -> Iterator[Node]:
    if isinstance(node, SequenceNode):
        yield from node.value
    elif isinstance(node, MappingNode):
        for key, value in node.value:
            yield key
            yield value


def refuse_explosion(root: Node, name: str) -> None:
    """Aliases share nodes; building the data would copy them. Measure first, each node once."""
    measured: dict[int, tuple[int, int] | None] = {}

    def measure(node: Node) -> tuple[int, int]:
        """Number of values and of levels below and including this node."""
        line = node.start_mark.line + 1
        if id(node) in measured:
            known = measured[id(node)]
            if known is None:
                raise UserError(f"{name}:{line}  this anchor contains itself")
            return known
        measured[id(node)] = None
        size, levels = 1, 0
        for child in _children(node):
            child_size, child_levels = measure(child)
            size, levels = size + child_size, max(levels, child_levels)
        if size > MAX_EXPANDED_NODES:
            raise UserError(
                f"{name}:{line}  the aliases in it expand to more than {MAX_EXPANDED_NODES:,} values"
            )
        if levels >= MAX_DEPTH:
            raise UserError(f"{name}:{line}  the aliases in it are nested deeper than {MAX_DEPTH} levels")
        measured[id(node)] = (size, levels + 1)
        return size, levels + 1

    measure(root)
