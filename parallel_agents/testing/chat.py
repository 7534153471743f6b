"""A chat server for tests: an OpenAI-compatible endpoint on the loopback whose replies are scripted.

It speaks real HTTP over real sockets, so that what is tested is the client that will be used. Needs the extra ``chat``.
"""

import json
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeAlias

import anyio
import anyio.abc
from attrs import define, field, frozen

from .._checks import as_tuple, thawed
from .._models import ToolCall, Usage

try:
    import h11
except ModuleNotFoundError as error:
    message = "The scripted chat server needs h11: pip install 'parallel-agents[chat]'"
    raise ModuleNotFoundError(message, name=error.name) from error

_CHUNK = 65_536
_TOKENS = Usage(input_tokens=10, output_tokens=5)


@frozen(kw_only=True)
class ChatRequest:
    """A request as the server got it.

    Attributes:
        number: From 0, in the order of arrival.
        path: Such as ``/v1/chat/completions``.
        headers: By their names in lower case.
        body: The JSON of the request.
    """

    number: int
    path: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]


@frozen(kw_only=True)
class ChatReply:
    """What the server answers, and how.

    Attributes:
        content: The text of the model.
        tool_calls: What the model wants to be called.
        finish_reason: ``tool_calls`` where there are some, else ``stop``, unless given.
        usage: What the model spent; ``None`` leaves it out.
        status: The HTTP status.
        headers: Further HTTP headers.
        body: Sent instead of what the above would make.
        wait_for: The reply is sent when it is set.
        delay_seconds: The reply is sent so much later.
        pieces: Into how many pieces a streamed text is cut.
        wait_between: A streamed reply stops before its last piece until this is set.
        drop_after: The connection is closed after so many bytes of the body.
    """

    content: str = ""
    tool_calls: tuple[ToolCall, ...] = field(default=(), converter=as_tuple)
    finish_reason: str | None = None
    usage: Usage | None = _TOKENS
    status: int = 200
    headers: Mapping[str, str] = field(factory=dict)
    body: bytes | None = None
    wait_for: anyio.Event | None = None
    delay_seconds: float = 0.0
    pieces: int = 3
    wait_between: anyio.Event | None = None
    drop_after: int | None = None


Script: TypeAlias = "Callable[[ChatRequest], ChatReply | str] | Iterable[ChatReply | str]"
"""A function of each request, or the replies in the order of the requests; a text is a reply with that content."""


class ScriptExhaustedError(Exception):
    """A request came for which the script has no reply."""


@define(eq=False)
class ScriptedChatServer:
    """A server that runs; ``scripted_chat_server()`` starts one.

    Attributes:
        base_url: For clients, such as ``http://127.0.0.1:54321/v1``.
        requests: What it was asked, in the order of arrival.
        hung_up: The numbers of the requests whose client went away before the reply was complete.
        in_flight: Requests that are being answered.
        peak: The most requests that were answered at the same time.
        connections: How many connections were made.
    """

    base_url: str
    _answer: Callable[[ChatRequest], ChatReply | str] = field(repr=False)
    requests: list[ChatRequest] = field(factory=list, init=False, repr=False)
    hung_up: list[int] = field(factory=list, init=False, repr=False)
    in_flight: int = field(default=0, init=False)
    peak: int = field(default=0, init=False)
    connections: int = field(default=0, init=False)
    _changed: anyio.Event = field(factory=anyio.Event, init=False, repr=False)

    async def until(self, condition: Callable[["ScriptedChatServer"], bool]) -> None:
        """Wait until *condition* holds, such as ``lambda server: server.in_flight == 0``."""
        while not condition(self):
            await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _serve(self, stream: anyio.abc.ByteStream) -> None:
        self.connections += 1
        connection = _Connection(stream)
        try:
            async with stream:
                while (received := await connection.receive()) is not None:
                    await self._reply(connection, ChatRequest(number=len(self.requests), **received))
                    if not connection.goes_on():
                        break
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, anyio.EndOfStream, h11.ProtocolError):
            self._tell()  # the client has gone

    async def _reply(self, connection: "_Connection", request: ChatRequest) -> None:
        self.requests.append(request)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        self._tell()
        is_complete = False
        try:
            answer = self._answer(request)
            reply = ChatReply(content=answer) if isinstance(answer, str) else answer
            is_complete = await connection.send(reply, request)
        finally:
            self.in_flight -= 1
            if not is_complete:
                self.hung_up.append(request.number)
            self._tell()


class _Connection:
    """One client."""

    def __init__(self, stream: anyio.abc.ByteStream) -> None:
        self._stream = stream
        self._http = h11.Connection(h11.SERVER)

    async def _event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            try:
                self._http.receive_data(await self._stream.receive(_CHUNK))
            except anyio.EndOfStream:
                self._http.receive_data(b"")
        return event

    async def receive(self) -> dict[str, Any] | None:
        event = await self._event()
        if not isinstance(event, h11.Request):
            return None
        body = b""
        while isinstance(data := await self._event(), h11.Data):
            body += data.data
        return {
            "path": event.target.decode(),
            "headers": {name.decode(): value.decode() for name, value in event.headers},
            "body": json.loads(body) if body else {},
        }

    def goes_on(self) -> bool:
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        self._http.start_next_cycle()
        return True

    async def send(self, reply: ChatReply, request: ChatRequest) -> bool:
        """Send a reply; return whether it could be sent to its end before the client went away."""
        is_complete = False
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._cancel_when_the_client_goes, tasks.cancel_scope)
            if reply.wait_for is not None:
                await reply.wait_for.wait()
            if reply.delay_seconds:
                await anyio.sleep(reply.delay_seconds)
            with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # the client goes while it is sent
                is_complete = await self._send_now(reply, _chunks(reply, request))
            tasks.cancel_scope.cancel()
        return is_complete

    async def _cancel_when_the_client_goes(self, scope: anyio.CancelScope) -> None:
        try:
            self._http.receive_data(await self._stream.receive(_CHUNK))
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            scope.cancel()

    async def _send_now(self, reply: ChatReply, chunks: list[bytes]) -> bool:
        is_stream = len(chunks) > 1
        headers = {"content-type": "text/event-stream" if is_stream else "application/json", **reply.headers}
        if not is_stream:
            headers.setdefault("content-length", str(len(chunks[0])))
        await self._send_event(h11.Response(status_code=reply.status, headers=list(headers.items())))
        left = reply.drop_after
        for position, chunk in enumerate(chunks):
            if position == len(chunks) - 1 and reply.wait_between is not None:
                await reply.wait_between.wait()
            await self._send_event(h11.Data(data=chunk[:left]))
            if left is not None and (left := left - len(chunk)) <= 0:
                return True  # the connection does not go on in the middle of a body
        await self._send_event(h11.EndOfMessage())
        return True

    async def _send_event(self, event: Any) -> None:
        await self._stream.send(self._http.send(event))


def _chunks(reply: ChatReply, request: ChatRequest) -> list[bytes]:
    """Return the body of a reply: one piece, or the events of a stream."""
    if reply.body is not None:
        return [reply.body]
    if reply.status != 200:
        return [json.dumps({"error": {"message": reply.content or "scripted"}}).encode()]
    if not request.body.get("stream"):
        return [json.dumps(_completion(reply, request)).encode()]
    return [*_events(reply, request), b"data: [DONE]\n\n"]


def _completion(reply: ChatReply, request: ChatRequest) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply.content or None}
    if reply.tool_calls:
        message["tool_calls"] = [_tool_call(call) for call in reply.tool_calls]
    table = _head(request, "chat.completion")
    table["choices"] = [{"index": 0, "message": message, "finish_reason": _finish_reason(reply)}]
    return table if reply.usage is None else table | {"usage": _usage(reply.usage)}


def _events(reply: ChatReply, request: ChatRequest) -> list[bytes]:
    head = _head(request, "chat.completion.chunk")
    size = -(-len(reply.content) // reply.pieces) or 1
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": reply.content[at : at + size]} for at in range(0, len(reply.content), size)]
    for index, call in enumerate(reply.tool_calls):
        table = {"index": index, **_tool_call(call)}
        text = table["function"]["arguments"]
        start = {**table, "function": {"name": call.name, "arguments": text[:3]}}
        deltas += [{"tool_calls": [start]}, {"tool_calls": [{"index": index, "function": {"arguments": text[3:]}}]}]
    chunks = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    chunks.append({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": _finish_reason(reply)}]})
    if reply.usage is not None and (request.body.get("stream_options") or {}).get("include_usage"):
        chunks.append({**head, "choices": [], "usage": _usage(reply.usage)})
    return [f"data: {json.dumps(chunk)}\n\n".encode() for chunk in chunks]


def _head(request: ChatRequest, kind: str) -> dict[str, Any]:
    return {"id": f"chat-{request.number}", "object": kind, "created": 0, "model": request.body.get("model", "")}


def _finish_reason(reply: ChatReply) -> str:
    return reply.finish_reason or ("tool_calls" if reply.tool_calls else "stop")


def _tool_call(call: ToolCall) -> dict[str, Any]:
    text = call.arguments if isinstance(call.arguments, str) else json.dumps(thawed(call.arguments))
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": text}}


def _usage(usage: Usage) -> dict[str, int]:
    total = usage.input_tokens + usage.output_tokens
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": total,
    }


def _from_list(replies: Iterable[ChatReply | str]) -> Callable[[ChatRequest], ChatReply | str]:
    left = iter(replies)

    def answer(request: ChatRequest) -> ChatReply | str:
        try:
            return next(left)
        except StopIteration:
            raise ScriptExhaustedError(f"the script has no reply for request {request.number}") from None

    return answer


@asynccontextmanager
async def scripted_chat_server(script: Script, *, tls: Any = None) -> AsyncIterator[ScriptedChatServer]:
    """Run a chat server on a free port of the loopback while the block runs.

    Args:
        script: What it answers.
        tls: An ``ssl.SSLContext`` for a server that is asked by ``https``.

    Raises:
        ScriptExhaustedError: In an exception group, when the block is left, if a request came that had no reply.
    """
    answer = script if callable(script) else _from_list(script)
    async with await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=0) as listener:
        port = listener.extra(anyio.abc.SocketAttribute.local_port)  # noqa: S610 - anyio's, not Django's
        scheme = "http" if tls is None else "https"
        server = ScriptedChatServer(f"{scheme}://127.0.0.1:{port}/v1", answer)
        served: Any = listener
        if tls is not None:
            from anyio.streams.tls import TLSListener  # noqa: PLC0415 - not everybody's Python has ssl

            served = TLSListener(listener, tls)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(served.serve, server._serve)  # noqa: ASYNC113 - it listens already
            yield server
            tasks.cancel_scope.cancel()
