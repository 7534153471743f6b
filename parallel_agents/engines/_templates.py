"""Command lines and prompts: templates whose placeholders are looked up in a table, never evaluated."""

import json
import os
import re
import string
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

from attrs import frozen

from .._checks import wrong_type
from .._models import AgentAssignment

_PLACEHOLDERS: Mapping[str, Callable[[AgentAssignment], Any]] = {
    "agent_id": lambda assignment: assignment.agent_id,
    "task_id": lambda assignment: assignment.task_id,
    "agent.id": lambda assignment: assignment.identity.id,
    "agent.name": lambda assignment: assignment.identity.name,
    "agent.role": lambda assignment: assignment.identity.role,
    "agent.instructions": lambda assignment: assignment.identity.instructions,
    "agent.model": lambda assignment: assignment.identity.model,
    "task.id": lambda assignment: assignment.task.id,
    "task.title": lambda assignment: assignment.task.title,
    "task.description": lambda assignment: assignment.task.description,
    "task.inputs": lambda assignment: assignment.task.inputs,
}
_FIELD = re.compile(r"(?P<name>[a-z_.]+)(?P<keys>(?:\[[^\[\]]+\])*)")
_KEY = re.compile(r"\[([^\[\]]+)\]")


@frozen
class Placeholder:
    text: str
    name: str
    keys: tuple[str, ...]

    @classmethod
    def parse(cls, text: str, place: str) -> "Placeholder":
        match = _FIELD.fullmatch(text)
        if match is None or match["name"] not in _PLACEHOLDERS or (match["keys"] and match["name"] != "task.inputs"):
            raise ValueError(
                f"{place}: unknown placeholder {{{text}}}. "
                f"There are {', '.join(f'{{{name}}}' for name in _PLACEHOLDERS)} and {{task.inputs[key]}}; "
                "{{ and }} are literal braces"
            )
        return cls(text, match["name"], tuple(_KEY.findall(match["keys"])))

    def look_up(self, assignment: AgentAssignment, place: str) -> str:
        value = _PLACEHOLDERS[self.name](assignment)
        if self.name == "agent.model" and value is None:
            raise ValueError(f"{place}: {{{self.text}}} has no value: agent {assignment.agent_id!r} has no model")
        for key in self.keys:
            step: Any = int(key) if isinstance(value, list) and key.isdecimal() else key
            try:
                value = value[step]
            except (LookupError, TypeError):
                raise ValueError(
                    f"{place}: {{{self.text}}} has no value: "
                    f"in the inputs of task {assignment.task_id!r} there is no [{key}] at that place"
                ) from None
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@frozen
class Template:
    """A text with placeholders."""

    place: str
    parts: tuple[str | Placeholder, ...]

    @classmethod
    def parse(cls, text: object, place: str) -> Self:
        if not isinstance(text, str):
            raise wrong_type(place, "a string", text)
        return cls(place, tuple(_parts(text, place)))

    def fill(self, assignment: AgentAssignment) -> str:
        """Return the text for *assignment*: one item, whatever the values hold.

        Raises:
            ValueError: A value is missing; names the item and the placeholder.
        """
        return "".join(p if isinstance(p, str) else p.look_up(assignment, self.place) for p in self.parts)


@frozen
class ProgramText(Template):
    """A text that a program can be given."""

    def __attrs_post_init__(self) -> None:
        self._refuse_nul("".join(part for part in self.parts if isinstance(part, str)))

    def fill(self, assignment: AgentAssignment, encode: Callable[[str], bytes] = os.fsencode) -> str:
        """Return the text for *assignment*: one item, whatever the values hold.

        Raises:
            ValueError: A value is missing or cannot be handed to a program; names the item and its placeholders.
        """
        filled = super().fill(assignment)
        self._refuse_nul(filled)
        try:
            encode(filled)
        except UnicodeEncodeError as error:
            raise ValueError(f"{self.place} cannot be encoded ({error.reason}){self._names()}") from None
        return filled

    def _refuse_nul(self, text: str) -> None:
        if "\0" in text:
            raise ValueError(f"{self.place} must not hold NUL characters, which no program can be given{self._names()}")

    def _names(self) -> str:
        names = ", ".join(f"{{{part.text}}}" for part in self.parts if isinstance(part, Placeholder))
        return f"; it is filled from {names}" if names else ""


def _parts(text: str, place: str) -> Iterator[str | Placeholder]:
    # Formatter.parse only splits; str.format on live objects would hand out their attributes to whoever writes plans.
    try:
        pieces = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{place}: {error}; {{{{ and }}}} are literal braces") from None
    for literal, name, spec, conversion in pieces:
        if literal:
            yield literal
        if spec or conversion:
            raise ValueError(f"{place}: {{{name}}} must stand alone, without a conversion or a format")
        if name is not None:
            yield Placeholder.parse(name, place)
