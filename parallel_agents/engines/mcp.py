"""Tools of MCP servers, for agents to call. Needs the extra ``mcp``, the official SDK, which runs on asyncio and trio.

Knows the protocol through the SDK only: connections, processes and cancellation are the SDK's.
"""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
from anyio.abc import TaskStatus
from attrs import define, field

from .._checks import shown
from .._endings import leaves
from .._errors import ParallelAgentsError
from .._tools import Tool, ToolRegistry
from ..events import MCP_SERVER_LOST, error_text, write_log

try:
    from mcp import Client, StdioServerParameters
    from mcp.types import CallToolResult, TextContent
    from mcp.types import Tool as ToolOfServer
except ModuleNotFoundError as error:
    message = "mcp_tools needs the MCP SDK: pip install 'parallel-agents[mcp]'"
    raise ModuleNotFoundError(message, name=error.name) from error

PAGES = 1_000
"""Pages of tools that are asked for; a server that has more is broken."""


class McpToolError(ParallelAgentsError):
    """A tool of an MCP server did not succeed; the message is the server's."""


@asynccontextmanager
async def mcp_tools(
    server: str | Sequence[str] | Any, *, prefix: str = "", timeout_seconds: float | None = None
) -> AsyncIterator[ToolRegistry]:
    """Connect to an MCP server while the block runs, and give its tools.

    A call that is cancelled, or late, is cancelled at the server. Where the server fails, or is gone, a call is an
    error result. The tools are those that the server has when the block starts.

    Args:
        server: The address of a server that speaks streamable HTTP; or a program that speaks over its standard input
            and output, as a list of the command and its arguments, which is started here and ended with its process
            tree; or anything else that ``mcp.Client`` takes, such as ``mcp.StdioServerParameters`` with an environment.
        prefix: Put in front of the names of the tools, to tell servers apart.
        timeout_seconds: Of each call, from its start; ``None`` is no limit.

    Yields:
        The server's tools.

    Raises:
        OSError: The program cannot be started.
        ValueError: A tool's schema is none.
    """
    connection = _Connection(_as_server(server))
    problem: Exception | None = None
    async with anyio.create_task_group() as tasks:
        try:
            listed = await tasks.start(connection.keep)
            yield ToolRegistry([connection.tool(tool, prefix, timeout_seconds) for tool in listed])
        except Exception as error:  # noqa: BLE001 - raised below, bare: the task group would wrap it
            problem = error
        connection.is_over.set()
    if problem is not None:
        raise problem


@define(eq=False)
class _Connection:
    """Keeps a client in a task of its own: when the SDK loses a server, it cancels what runs around the client."""

    server: Any
    is_over: anyio.Event = field(factory=anyio.Event)
    _client: Client | None = None
    _lost: str = "the connection is closed"

    async def keep(self, *, task_status: TaskStatus[list[ToolOfServer]]) -> None:
        """Be connected until it is over, or the server is lost."""
        try:
            async with Client(self.server) as client:
                listed = await _listed(client)
                self._client = client
                task_status.started(listed)
                await self.is_over.wait()
                self._client = None
        except Exception as error:  # noqa: BLE001 - whatever the SDK and its transports raise
            first = next(leaves(error))
            if self._client is None and not self.is_over.is_set():
                raise first from None  # it never was connected, and who waits for that gets it
            self._client = None
            self._lost = f"the server is gone: {error_text(first)}"
            write_log(MCP_SERVER_LOST, error=error_text(first))

    def tool(self, tool: ToolOfServer, prefix: str, timeout_seconds: float | None) -> Tool:
        """Return a tool of the server as one of ours."""
        return Tool(
            name=prefix + tool.name,
            description=tool.description or tool.title or "",
            parameters=tool.input_schema,
            function=partial(self._call, tool.name),
            timeout_seconds=timeout_seconds,
        )

    async def _call(self, name: str, arguments: dict[str, Any]) -> str:
        if self._client is None:
            raise McpToolError(self._lost)
        result = await self._client.call_tool(name, arguments)
        text = _text_of(result)
        if result.is_error:
            raise McpToolError(text)
        return text


def _as_server(server: Any) -> Any:
    if isinstance(server, str) and not server.startswith(("http://", "https://")):
        raise ValueError(f"server must be an address, or a command as a list of strings, got {shown(server)}")
    if isinstance(server, list | tuple):
        if not server or not all(isinstance(item, str) for item in server):
            raise TypeError(f"a server's command must be a list of strings, got {shown(server)}")
        return StdioServerParameters(command=server[0], args=list(server[1:]))
    return server


async def _listed(client: Client) -> list[ToolOfServer]:
    found: list[ToolOfServer] = []
    cursor: str | None = None
    for _ in range(PAGES):
        page = await client.list_tools(cursor=cursor)
        found += page.tools
        cursor = page.next_cursor
        if cursor is None:
            return found
    raise ValueError(f"the server's list of tools has no end: {PAGES} pages were read")


def _text_of(result: CallToolResult) -> str:
    """Return what a result says; what is no text is told by its kind, and its structured form if there is no other."""
    if not result.content and result.structured_content is not None:
        return json.dumps(result.structured_content, ensure_ascii=False)
    return "\n".join(part.text if isinstance(part, TextContent) else f"[{part.type}]" for part in result.content)
