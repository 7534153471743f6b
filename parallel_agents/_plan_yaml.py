"""YAML for plans: PyYAML's safe loader in pure Python, without aliases, repeated keys and deep nesting.

The C loader is not used: a small file of nested lists crashes the interpreter in it.
This module needs PyYAML; it is imported only when a plan is written in YAML.
"""

from typing import Any, NoReturn

import yaml
from yaml.constructor import ConstructorError

from ._checks import shown

_TEXT = "tag:yaml.org,2002:str"


class _PlanLoader(yaml.SafeLoader):
    """A safe loader that refuses what a plan has no use for, while it reads and not afterwards."""

    def __init__(self, text: str, depth_limit: int) -> None:
        super().__init__(text)
        self._levels_left = depth_limit + 1  # the innermost values are a level of nodes, too
        self._depth_limit = depth_limit

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            self._refuse("aliases (*name) are not allowed in a plan")
        if not self._levels_left:
            self._refuse(f"nested deeper than {self._depth_limit} levels")
        self._levels_left -= 1
        node = super().compose_node(parent, index)
        self._levels_left += 1
        return node

    def _refuse(self, problem: str) -> NoReturn:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        raise ConstructorError(problem=problem, problem_mark=mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != _TEXT:
                raise ConstructorError(problem="a key must be text; write it in quotes", problem_mark=key.start_mark)
            if key.value in seen:
                raise ConstructorError(problem=f"key {shown(key.value)} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(text: str, depth_limit: int) -> Any:
    """Return what a YAML document says.

    Raises:
        ValueError: In one line, with the place, if it is none, or holds what a plan must not hold.
    """
    try:
        return _PlanLoader(text, depth_limit).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(place + _one_line(", ".join(filter(None, (error.context, error.problem))))) from error
    except yaml.YAMLError as error:
        raise ValueError(_one_line(str(error))) from error


def _one_line(text: str) -> str:
    return " ".join(text.split())
