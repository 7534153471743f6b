"""An MCP server for tests: ``python mcp_server.py FOLDER`` speaks over stdio, with ``--http`` over HTTP.

With ``--http`` it prints its port. Calls that wait write to pipes in the folder when they start and end.
"""

import os
import socket
import sys
from pathlib import Path

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver import Image

FOLDER = Path(sys.argv[1])

server = MCPServer("for-tests", log_level="CRITICAL")


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def fail() -> str:
    """Never succeed."""
    raise ValueError("no such luck")


@server.tool()
async def wait(name: str) -> str:
    """Wait until cancelled."""
    (FOLDER / f"{name}-started").write_text("started")
    try:
        await anyio.sleep_forever()
    finally:
        (FOLDER / f"{name}-ended").write_text("ended")
    return ""


@server.tool()
def picture() -> list[str | Image]:
    """Return a text and a picture."""
    return ["a dot", Image(data=b"GIF89a", format="gif")]


@server.tool()
def die() -> str:
    """End the server, without a word."""
    os._exit(3)


def main() -> None:
    if "--http" not in sys.argv:
        server.run("stdio")
        return
    import uvicorn  # noqa: PLC0415 - for HTTP only

    listener = socket.create_server(("127.0.0.1", 0))
    sys.stdout.write(f"{listener.getsockname()[1]}\n")
    sys.stdout.flush()
    app = server.streamable_http_app()
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    main()
