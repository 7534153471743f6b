"""mcp_tools against real servers, over stdio and over HTTP."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from loguru import logger

from parallel_agents import ToolCall, ToolInvoker, ToolRegistry, ToolResult
from parallel_agents.engines import mcp
from parallel_agents.engines.mcp import mcp_tools
from parallel_agents.events import MCP_SERVER_LOST

pytestmark = pytest.mark.anyio

SERVER = Path(__file__).parent / "mcp_server.py"


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    return [sys.executable, str(SERVER), str(tmp_path)]


@pytest.fixture(params=["stdio", "http"])
def server(request: pytest.FixtureRequest, command: list[str]) -> Iterator[Any]:
    if request.param == "stdio":
        yield command
        return
    with subprocess.Popen([*command, "--http"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/mcp"
        finally:
            process.kill()


def call(tool: str, /, **arguments: Any) -> ToolCall:
    return ToolCall(id=tool, name=tool, arguments=arguments)


@asynccontextmanager
async def connected(server: Any, **options: Any) -> AsyncIterator[tuple[ToolRegistry, ToolInvoker]]:
    with anyio.fail_after(60):
        async with mcp_tools(server, **options) as tools:
            yield tools, ToolInvoker(tools)


async def test_tools_of_a_server_are_tools(server: Any) -> None:
    async with connected(server) as (tools, invoker):
        assert [tool.name for tool in tools] == ["add", "fail", "wait", "picture", "die"]
        add = tools.get("add")
        assert add is not None
        assert add.description == "Add two numbers."
        assert add.parameters["required"] == ["a", "b"]
        results = await invoker.invoke_all(
            [call("add", a=1, b=2), call("fail"), call("add", a="x", b=1), call("picture")]
        )
    assert [(result.content, result.is_error) for result in results] == [
        ("3", False),
        ("McpToolError: Error executing tool fail", True),
        ("ToolArgumentsError: $.a: 'x' is not of type 'integer'", True),
        ("a dot\n[image]", False),
    ]


async def test_a_cancelled_call_is_cancelled_at_the_server(server: Any, tmp_path: Path) -> None:
    for name in ("w-started", "w-ended"):
        os.mkfifo(tmp_path / name)
    async with connected(server) as (_, invoker):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(invoker.invoke_all, [call("wait", name="w")])
            assert await anyio.to_thread.run_sync((tmp_path / "w-started").read_text) == "started"
            tasks.cancel_scope.cancel()
        assert await anyio.to_thread.run_sync((tmp_path / "w-ended").read_text) == "ended"
        (result,) = await invoker.invoke_all([call("add", a=2, b=2)])
    assert result.content == "4"


async def test_a_late_call_is_cancelled_at_the_server(command: list[str], tmp_path: Path) -> None:
    for name in ("w-started", "w-ended"):
        os.mkfifo(tmp_path / name)
    results: list[ToolResult] = []
    async with connected(command, timeout_seconds=0.2) as (_, invoker):

        async def wait() -> None:
            results.extend(await invoker.invoke_all([call("wait", name="w")]))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.to_thread.run_sync((tmp_path / "w-started").read_text)
            assert await anyio.to_thread.run_sync((tmp_path / "w-ended").read_text) == "ended"
    assert [result.content for result in results] == ["TimeoutError: Timed out after 0.2 s"]


async def test_a_server_that_dies_is_an_error_of_each_call(server: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "w-started")
    results: list[ToolResult] = []
    async with connected(server) as (_, invoker):

        async def wait() -> None:
            results.extend(await invoker.invoke_all([call("wait", name="w")]))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.to_thread.run_sync((tmp_path / "w-started").read_text)
            results.extend(await invoker.invoke_all([call("die")]))
        results.extend(await invoker.invoke_all([call("add", a=1, b=2)]))
    assert sorted((result.tool_call_id, result.is_error) for result in results) == [
        ("add", True),
        ("die", True),
        ("wait", True),
    ]


async def test_what_happens_after_the_server_is_lost_or_left(
    server: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    lines: list[str] = []
    logger.enable("parallel_agents")
    sink = logger.add(lambda line: lines.append(line.record["message"]), level="WARNING")
    async with connected(server) as (tools, invoker):
        await invoker.invoke_all([call("die")])
        (late,) = await invoker.invoke_all([call("add", a=1, b=2)])
    (after,) = await ToolInvoker(tools).invoke_all([call("add", a=1, b=2)])
    logger.remove(sink)
    logger.disable("parallel_agents")
    assert late.is_error
    assert after.is_error
    is_lost = isinstance(server, str)  # over stdio the SDK tells each call, and ends in order
    assert (MCP_SERVER_LOST in lines) is is_lost
    assert after.content.startswith(f"McpToolError: the {'server is gone: ' if is_lost else 'connection is closed'}")


async def test_what_the_block_raises_comes_out_as_it_is(command: list[str]) -> None:
    with pytest.raises(KeyError, match="mine"):
        async with connected(command):
            raise KeyError("mine")


async def test_names_can_be_told_apart(command: list[str]) -> None:
    async with connected(command, prefix="calc_") as (tools, invoker):
        assert tools.get("calc_add") is not None
        (result,) = await invoker.invoke_all([call("calc_add", a=1, b=2)])
    assert result.content == "3"


async def test_a_server_that_cannot_be_reached() -> None:
    with pytest.raises(FileNotFoundError):
        async with connected(["no-such-program"]):
            pass
    with pytest.raises(Exception, match="onnect"):
        async with connected("http://127.0.0.1:9/mcp"):
            pass


async def test_what_is_no_server_is_refused() -> None:
    for wrong, kind in ((["a", 1], TypeError), ([], TypeError), ("python server.py", ValueError)):
        with pytest.raises(kind, match="server"):
            async with connected(wrong):
                pass


async def test_an_endless_list_of_tools_is_refused(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcp, "PAGES", 0)
    with pytest.raises(ValueError, match="has no end"):
        async with connected(command):
            pass


def test_structured_content_is_told_where_there_is_no_other() -> None:
    from mcp.types import CallToolResult  # noqa: PLC0415 - the one test that makes a result

    result = CallToolResult(content=[], structured_content={"a": "ü"})
    assert mcp._text_of(result) == '{"a": "ü"}'
