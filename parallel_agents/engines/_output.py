"""What a program prints: what is kept of it is bounded, whatever it prints. Knows no program."""

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from attrs import frozen

from .._checks import frozen_json, shown
from .._models import ChatMessage, Usage

_STDERR_LINES = 20
_STDERR_CHARACTERS = 2000
_JSON_LEVELS = 100


@frozen(kw_only=True)
class Said:
    """What a program's stdout came to."""

    output: Any
    messages: tuple[ChatMessage, ...] = ()
    problem: str | None = None


class Stdout(Protocol):
    def add(self, data: bytes) -> None: ...

    def said(self) -> Said: ...


class Tail:
    """Keeps the last bytes of a stream."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._data = bytearray()
        self._cut = 0

    def add(self, data: bytes) -> None:
        self._data += data
        if len(self._data) > 2 * self._limit:  # not at every call: each cut moves what is kept
            self._drop(len(self._data) - self._limit)

    def text(self) -> str:
        """Return what was kept; where something was cut, the first line says how much."""
        self._drop(len(self._data) - self._limit)
        if not self._cut:
            return self._data.decode(errors="replace")
        # The cut may have hit the middle of a character.
        self._drop(next((i for i, byte in enumerate(self._data[:4]) if byte & 0xC0 != 0x80), 0))
        return f"[... {self._cut} bytes cut ...]\n{self._data.decode(errors='replace')}"

    def said(self) -> Said:
        return Said(output=self.text())

    def _drop(self, count: int) -> None:
        if count > 0:
            del self._data[:count]
            self._cut += count


class JsonLines:
    """Reads the JSON-lines protocol; what is none of it is kept as text."""

    def __init__(self, limit: int, record_usage: Callable[[Usage], None]) -> None:
        self._limit = limit
        self._record_usage = record_usage
        self._text = Tail(limit)
        self._messages: deque[tuple[ChatMessage, int]] = deque()
        self._messages_bytes = 0
        self._messages_cut = 0
        self._result: Any = None
        self._has_result = False
        self._problem: str | None = None
        self._line = bytearray()
        self._line_number = 1
        self._line_is_text = False

    def add(self, data: bytes) -> None:
        first, *others = data.split(b"\n")
        self._extend_line(first)
        for part in others:
            self._end_line(b"\n")
            self._extend_line(part)

    def said(self) -> Said:
        self._end_line(b"")
        messages = [message for message, _ in self._messages]
        if self._messages_cut:
            messages.insert(0, ChatMessage(role="system", content=f"[... {self._messages_cut} messages cut ...]"))
        return Said(
            output=self._result if self._has_result else self._text.text(),
            messages=tuple(messages),
            problem=self._problem,
        )

    def _extend_line(self, part: bytes) -> None:
        if self._line_is_text:
            self._text.add(part)
            return
        self._line += part
        if len(self._line) > self._limit:
            if self._line.lstrip().startswith(b"{"):
                self._refuse_line(f"longer than output_limit_bytes ({self._limit})")
            self._text.add(bytes(self._line))
            self._line.clear()
            self._line_is_text = True

    def _end_line(self, newline: bytes) -> None:
        if self._line_is_text or not self._took(self._line):
            self._text.add(bytes(self._line) + newline)
        self._line.clear()
        self._line_is_text = False
        self._line_number += 1

    def _took(self, line: bytearray) -> bool:
        """Whether *line* belongs to the protocol; if so it has been dealt with."""
        if not line.lstrip().startswith(b"{"):
            return False
        try:
            message = json.loads(line.decode(errors="replace"))
        except json.JSONDecodeError:
            return False
        except (ValueError, RecursionError):  # whatever it is, a number or a nesting of this size means no good
            self._refuse_line("a number is too long, or the nesting too deep")
            return True
        take = self._takers().get(message.get("type")) if isinstance(message.get("type"), str) else None
        if take is None:
            return False
        try:
            del message["type"]
            take(message, len(line))
        except (TypeError, ValueError) as error:
            self._refuse_line(str(error))
        return True

    def _takers(self) -> Mapping[str, Callable[[dict[str, Any], int], None]]:
        return {"usage": self._take_usage, "message": self._take_message, "result": self._take_result}

    def _take_usage(self, message: dict[str, Any], _size: int) -> None:
        _check_keys(message, ("input_tokens", "output_tokens", "requests", "cost"))
        self._record_usage(Usage(**message))

    def _take_message(self, message: dict[str, Any], size: int) -> None:
        _check_keys(message, ("role", "content"), required="role")
        self._messages.append((ChatMessage(**message), size))
        self._messages_bytes += size
        while self._messages_bytes > self._limit:
            self._messages_bytes -= self._messages.popleft()[1]
            self._messages_cut += 1

    def _take_result(self, message: dict[str, Any], _size: int) -> None:
        _check_keys(message, ("output",), required="output")
        if _deeper_than(_JSON_LEVELS, message["output"]):
            raise ValueError(f"output is nested more than {_JSON_LEVELS} levels deep")
        self._result = frozen_json(message["output"], "output")
        self._has_result = True

    def _refuse_line(self, problem: str) -> None:
        self._problem = self._problem or f"line {self._line_number} of stdout: {problem}"


def _check_keys(message: Mapping[str, Any], known: Sequence[str], *, required: str | None = None) -> None:
    if required is not None and required not in message:
        raise ValueError(f"{required} is missing")
    if unknown := sorted(message.keys() - set(known)):
        raise ValueError(f"unknown key {shown(unknown[0])}, there are {', '.join(known)}")


def _deeper_than(levels: int, value: object) -> bool:
    if not isinstance(value, dict | list):
        return False
    children = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper_than(levels - 1, child) for child in children)


def last_lines(text: str) -> str:
    return "\n".join(text.rstrip()[-_STDERR_CHARACTERS:].splitlines()[-_STDERR_LINES:])
