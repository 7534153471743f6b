"""Asks a chat server once, over httpx2: connections, limits, and what a failure means. Knows no agent.

Each connection has a client of its own. The pool inside a client looks at all its connections for each request:
measured with httpx2 2.16, one takes 0.4 ms of the processor alone, but beside 1,000 others 3.8 ms on asyncio and 1.8 on
trio; with a client for each, 0.5 ms beside as many.
"""

import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import httpx2
from anyio.lowlevel import RunVar
from attrs import define, field

from .._checks import shown
from ..events import error_text
from ..serialization import InvalidDataError, parse_json
from ._chat_protocol import ChatError, ChatReply, StreamReader, explanation, read_reply
from ._retry_after import retry_after_seconds

PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which the same request may be answered."""

CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 2.0
ERROR_BYTES = 65_536
"""Bytes of an error's explanation that are read."""


@define(eq=False)
class _Idle:
    """What one event loop has."""

    users: int = 0
    clients: list[httpx2.AsyncClient] = field(factory=list)


class ChatClient:
    """Asks servers; its connections are shared by all that use it in an event loop.

    Args:
        make_client: Makes an httpx2 client for each connection; ``None`` makes one that the environment sets up.
        answer_seconds: A server that sends nothing for so long is given up.
        reply_limit_bytes: The longest answer.
    """

    def __init__(
        self, make_client: Callable[[], httpx2.AsyncClient] | None, answer_seconds: float, reply_limit_bytes: int
    ) -> None:
        self._make_client = make_client
        self._timeout = httpx2.Timeout(answer_seconds, connect=CONNECT_SECONDS, pool=None)
        self._reply_limit_bytes = reply_limit_bytes
        self._tls: ssl.SSLContext | None = None
        self._idle: RunVar[_Idle] = RunVar("parallel_agents_chat_connections")

    @asynccontextmanager
    async def kept_open(self) -> AsyncIterator[None]:
        """Keep idle connections for the next request as long as any such block runs in the event loop."""
        try:
            idle = self._idle.get()
        except LookupError:
            idle = _Idle()
            self._idle.set(idle)
        idle.users += 1
        try:
            yield
        finally:
            idle.users -= 1
            if not idle.users:
                clients, idle.clients = idle.clients, []
                with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                    for client in clients:
                        await client.aclose()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[httpx2.AsyncClient]:
        """Lend a client to one request; where that fails or is cancelled, its connection is closed at once."""
        clients = self._idle.get().clients
        client = clients.pop() if clients else self._new_client()
        try:
            yield client
        except BaseException:
            with anyio.move_on_after(CLOSE_SECONDS, shield=True):
                await client.aclose()
            raise
        clients.append(client)

    def _new_client(self) -> httpx2.AsyncClient:
        if self._make_client is not None:
            return self._make_client()
        if self._tls is None:
            self._tls = httpx2.create_ssl_context()  # takes 20 ms, and can be shared
        return httpx2.AsyncClient(verify=self._tls, limits=httpx2.Limits(max_connections=1), timeout=self._timeout)

    async def ask(
        self, base_url: str, key: str | None, body: bytes, on_text: Callable[[str], object] | None = None
    ) -> ChatReply:
        """Send a request and return the answer, which *on_text* gets piece by piece if it comes so.

        Raises:
            ChatError: There was none, or none that can be used.
        """
        url = f"{base_url.rstrip('/')}/chat/completions"
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        try:
            async with (
                self._connection() as client,
                client.stream("POST", url, content=body, headers=headers, follow_redirects=False) as response,
            ):
                if response.status_code != httpx2.codes.OK:
                    raise await _refusal(response, base_url, key)
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise ChatError(f"{base_url} packs its answers, although it was asked not to", 200)
                return await self._read(response, on_text)
        except httpx2.HTTPError as error:
            raise _lost(error, base_url) from error

    async def _read(self, response: httpx2.Response, on_text: Callable[[str], object] | None) -> ChatReply:
        is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
        reader, pieces, size = StreamReader(), [], 0

        def take(data: bytes) -> bool:
            nonlocal size
            size += len(data)
            if size > self._reply_limit_bytes:
                raise ChatError(f"the answer is longer than reply_limit_bytes, {self._reply_limit_bytes}", 200)
            if not is_stream:
                pieces.append(data)
            elif (text := reader.add(data)) and on_text is not None:
                on_text(text)
            return True

        await _read_while(response, take)
        return reader.reply() if is_stream else read_reply(b"".join(pieces))


async def _read_while(response: httpx2.Response, take: Callable[[bytes], bool]) -> None:
    """Hand a body to *take* piece by piece until it returns False or raises.

    The iterators of httpx2 are generators around generators, and are closed in order only if they are read to the end
    or an exception comes from within. So what ends the reading early is a cancellation of the next read.
    """
    problem: Exception | None = None
    with anyio.CancelScope() as scope:
        async for data in response.aiter_raw():
            if scope.cancel_called:
                continue
            try:
                goes_on = take(data)
            except Exception as error:  # noqa: BLE001 - raised below
                problem, goes_on = error, False
            if not goes_on:
                scope.cancel()
    if problem is not None:
        raise problem


async def _refusal(response: httpx2.Response, base_url: str, key: str | None) -> ChatError:
    """Return the error for an answer that is no success, with the server's explanation and without the key."""
    status = response.status_code
    if response.is_redirect:
        target = shown(response.headers.get("location"))
        return ChatError(f"{base_url} answered {status}: it is elsewhere, at {target}; set base_url", status)
    raw = bytearray()

    def take(data: bytes) -> bool:
        raw.extend(data)
        return len(raw) < ERROR_BYTES

    await _read_while(response, take)
    told = _told(bytes(raw)) or httpx2.codes.get_reason_phrase(status)
    if key is not None:
        told = told.replace(key, "[key]")
    wait = retry_after_seconds(httpx2.HTTPStatusError("", request=response.request, response=response))
    return ChatError(f"{base_url} answered {status}: {told}", status, wait, status in PASSING_STATUS)


def _told(raw: bytes) -> str:
    try:
        return explanation(parse_json(raw))
    except InvalidDataError:
        return explanation(raw.decode("utf-8", "replace").strip())


def _lost(error: httpx2.HTTPError, base_url: str) -> ChatError:
    """Return the error for a server that did not answer."""
    reason: BaseException | None = error
    while reason is not None:
        if isinstance(reason, ssl.SSLCertVerificationError):
            way_out = "if you trust it, name the file of its authority in SSL_CERT_FILE"
            return ChatError(f"{base_url} cannot be trusted: {reason.verify_message}; {way_out}")
        reason = reason.__cause__ or reason.__context__
    return ChatError(f"{base_url} did not answer: {error_text(error)}", may_pass=True)
