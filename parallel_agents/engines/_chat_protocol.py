"""The chat completions protocol: from an assignment to a request, from a response to a reply. Opens no connection."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attrs import define, field, frozen

from .._checks import shown, thawed
from .._errors import ParallelAgentsError
from .._models import ChatMessage, CompletionConfig, ToolCall, Usage
from .._tools import Tool
from ..serialization import InvalidDataError, parse_json

_MESSAGE_CHARACTERS = 1_000
"""Characters of a server's explanation that are told."""


class ChatError(ParallelAgentsError):
    """A chat server did not answer, or not with what can be used.

    Attributes:
        message: What happened.
        status: The HTTP status; ``None`` if there was no answer.
        retry_after_seconds: When the server wants to be asked again, if it says so; ``RetryEngine`` goes by it.
        may_pass: Whether the same request may be answered another time.
    """

    def __init__(
        self,
        message: str,
        status: int | None = None,
        retry_after_seconds: float | None = None,
        may_pass: bool = False,
    ) -> None:
        super().__init__(message, status, retry_after_seconds, may_pass)
        self.message = message
        self.status = status
        self.retry_after_seconds = retry_after_seconds
        self.may_pass = may_pass

    def __str__(self) -> str:
        return self.message


@frozen
class ChatReply:
    """What a model said.

    Attributes:
        content: Its text.
        tool_calls: What it wants to be called.
        finish_reason: Why it stopped, as the server tells.
        refusal: Why it does not want to answer, if so.
        usage: The tokens it took, without their cost.
    """

    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    finish_reason: str = "stop"
    refusal: str = ""
    usage: Usage = field(factory=Usage)

    @property
    def message(self) -> ChatMessage:
        """The reply as a message of the conversation."""
        return ChatMessage(role="assistant", content=self.content, tool_calls=self.tool_calls)


# Requests


def request_body(
    model: str,
    messages: Sequence[ChatMessage],
    *,
    tools: Iterable[Tool] = (),
    config: CompletionConfig | None = None,
    output_schema: Mapping[str, Any] | None = None,
    stream: bool = False,
) -> bytes:
    """Return the JSON of a request, in UTF-8; text that cannot be written so (lone surrogates) has ``?`` instead."""
    body: dict[str, Any] = {"model": model, "messages": [_message(message) for message in messages]}
    if output_schema is not None:
        body["response_format"] = {
            "type": "json_schema",
            "json_schema": {"name": "output", "strict": True, "schema": output_schema},
        }
    if config is not None:
        settings = {name: getattr(config, name) for name in ("temperature", "max_tokens", "seed", "response_format")}
        body |= {name: value for name, value in settings.items() if value is not None}
        if config.stop:
            body["stop"] = config.stop
    if functions := [_function(tool) for tool in tools]:
        body["tools"] = functions
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if config is not None:
        body |= config.extra
    return json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")


def _message(message: ChatMessage) -> dict[str, Any]:
    table: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        table["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _arguments_text(call)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        table["tool_call_id"] = message.tool_call_id
    return table


def _arguments_text(call: ToolCall) -> str:
    """Return the arguments as JSON; servers read those of earlier calls, so what was none is a JSON text."""
    return json.dumps(thawed(call.arguments), ensure_ascii=False)


def _function(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


# Replies


def read_reply(body: bytes) -> ChatReply:
    """Read the JSON of an answer.

    Raises:
        ChatError: If it is no answer.
    """
    table = _table(body)
    _refuse_error(table)
    choices = _tables(table.get("choices"), "choices")
    if not choices:
        raise _unusable("there are no choices in it")
    choice = choices[0]
    message = _as_table(choice.get("message"), "choices[0].message")
    return ChatReply(
        content=_text(message.get("content"), "content"),
        tool_calls=tuple(_tool_call(table) for table in _tables(message.get("tool_calls"), "tool_calls")),
        finish_reason=_text(choice.get("finish_reason"), "finish_reason"),
        refusal=_text(message.get("refusal"), "refusal"),
        usage=_usage(table.get("usage")),
    )


def _table(text: bytes) -> dict[str, Any]:
    try:
        return _as_table(parse_json(text), "it")
    except InvalidDataError as error:
        raise _unusable(f"it is no JSON: {error}") from None


def _as_table(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _unusable(f"{place} is no table: {shown(value)}")
    return value


def _tables(value: object, place: str) -> list[dict[str, Any]]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise _unusable(f"{place} is no list: {shown(value)}")
    return [_as_table(item, f"{place}[{position}]") for position, item in enumerate(value)]


def _text(value: object, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _unusable(f"{place} is no text: {shown(value)}")
    return value


def _unusable(problem: str) -> ChatError:
    return ChatError(f"the answer cannot be used: {problem}", 200, may_pass=True)


def _refuse_error(table: Mapping[str, Any]) -> None:
    """Refuse an error that comes with the status of a success, as some servers send it, also within a stream."""
    if table.get("error"):
        raise ChatError(f"the server answered with an error: {explanation(table)}", 200, may_pass=True)


def explanation(table: object) -> str:
    """Return what a server says about its error."""
    error = table.get("error", table) if isinstance(table, Mapping) else table
    told = error.get("message", error) if isinstance(error, Mapping) else error
    text = told if isinstance(told, str) else json.dumps(told, ensure_ascii=False)
    return text if len(text) <= _MESSAGE_CHARACTERS else f"{text[:_MESSAGE_CHARACTERS]}..."


def _tool_call(table: Mapping[str, Any]) -> ToolCall:
    function = _as_table(table.get("function"), "tool_calls.function")
    name, text = _text(function.get("name"), "function.name"), function.get("arguments")
    return ToolCall(id=_text(table.get("id"), "tool_calls.id"), name=name, arguments=_arguments(text))


def _arguments(text: object) -> Any:
    """Return the arguments that a model wrote; what is no JSON stays a text, which no tool takes."""
    if not isinstance(text, str):
        return text if isinstance(text, Mapping) else {}
    try:
        value = parse_json(text or "{}")
        ToolCall(id="", name="", arguments=value)
    except (InvalidDataError, ValueError):
        return text
    return value


def _usage(table: object) -> Usage:
    if not isinstance(table, Mapping):
        return Usage()
    return Usage(input_tokens=_count(table.get("prompt_tokens")), output_tokens=_count(table.get("completion_tokens")))


def _count(value: object) -> int:
    return value if type(value) is int and value >= 0 else 0


@define
class _CallParts:
    id: str = ""
    name: str = ""
    arguments: str = ""


class StreamReader:
    """Puts a reply together from the events of a stream.

    Attributes:
        is_done: Whether the server said that nothing more follows.
    """

    def __init__(self) -> None:
        self.is_done = False
        self._line = b""
        self._content: list[str] = []
        self._calls: dict[object, _CallParts] = {}
        self._finish_reason = ""
        self._refusal = ""
        self._usage = Usage()

    def add(self, data: bytes) -> str:
        """Take bytes of the stream; return the text that they bring.

        Raises:
            ChatError: If they are no events of a chat stream.
        """
        *lines, self._line = (self._line + data).split(b"\n")
        return "".join([self._event(line[5:].strip()) for line in lines if line.startswith(b"data:")])

    def _event(self, data: bytes) -> str:
        if data == b"[DONE]":
            self.is_done = True
            return ""
        table = _table(data)
        _refuse_error(table)
        if table.get("usage"):
            self._usage = _usage(table["usage"])
        (choice, *_) = _tables(table.get("choices"), "choices") or [{}]
        self._finish_reason = _text(choice.get("finish_reason"), "finish_reason") or self._finish_reason
        delta = _as_table(choice.get("delta") or {}, "delta")
        for call in _tables(delta.get("tool_calls"), "tool_calls"):
            self._add_call(call)
        self._refusal += _text(delta.get("refusal"), "refusal")
        text = _text(delta.get("content"), "content")
        if text:
            self._content.append(text)
        return text

    def _add_call(self, table: Mapping[str, Any]) -> None:
        parts = self._calls.setdefault(table.get("index"), _CallParts())
        function = _as_table(table.get("function") or {}, "tool_calls.function")
        parts.id = parts.id or _text(table.get("id"), "tool_calls.id")
        parts.name = parts.name or _text(function.get("name"), "function.name")
        parts.arguments += _text(function.get("arguments"), "function.arguments")

    def reply(self) -> ChatReply:
        """Return what was said.

        Raises:
            ChatError: If the stream stopped before its end.
        """
        if not self.is_done and not self._finish_reason:
            raise ChatError("the answer stopped in the middle", 200, may_pass=True)
        if not self._finish_reason:
            raise _unusable("there are no choices in it")
        return ChatReply(
            content="".join(self._content),
            tool_calls=tuple(
                ToolCall(id=parts.id, name=parts.name, arguments=_arguments(parts.arguments))
                for parts in self._calls.values()
            ),
            finish_reason=self._finish_reason,
            refusal=self._refusal,
            usage=self._usage,
        )
