"""How a worker is doing, for whoever asks over HTTP: a load balancer, an orchestrator, Prometheus.

One small answer for each connection, whatever is asked; no web server, and nothing that could be changed from outside.
"""

import json
from collections.abc import Callable, Mapping

import anyio
import anyio.abc

SECONDS = 5.0
"""How long somebody may take to ask, and to take the answer."""

REQUEST_BYTES = 8192
"""As much is read of a request; its first line is what counts."""


async def serve_health(
    address: tuple[str, int],
    numbers: Callable[[], Mapping[str, int]],
    is_ready: Callable[[], bool],
    *,
    task_status: anyio.abc.TaskStatus[int] = anyio.TASK_STATUS_IGNORED,
) -> None:
    """Answer until cancelled: ``/metrics`` with *numbers* for Prometheus, anything else with them as JSON.

    Tells its starter the port. The status is 200, or 503 when it is not ready for more agents.

    Args:
        address: Host and port to listen at; port 0 takes one that is free.
        numbers: Returns numbers by their names.
        is_ready: Returns whether more agents are taken.
        task_status: Of ``TaskGroup.start()``.
    """

    async def answer(stream: anyio.abc.SocketStream) -> None:
        with anyio.move_on_after(SECONDS):
            async with stream:
                try:
                    request = await stream.receive(REQUEST_BYTES)
                    await stream.send(_answer(request, numbers(), is_ready=is_ready()))
                except (anyio.EndOfStream, anyio.BrokenResourceError):
                    return  # whoever asked went away

    host, port = address
    async with await anyio.create_tcp_listener(local_host=host, local_port=port) as listener:
        task_status.started(listener.extra(anyio.abc.SocketAttribute.local_port))  # noqa: S610 - anyio's, not Django's
        await listener.serve(answer)


def _answer(request: bytes, numbers: Mapping[str, int], *, is_ready: bool) -> bytes:
    if request.startswith(b"GET /metrics"):
        status, kind = "200 OK", "text/plain; version=0.0.4"
        body = "".join(f"parallel_agents_worker_{name} {number}\n" for name, number in numbers.items())
    else:
        status, kind = "200 OK" if is_ready else "503 Service Unavailable", "application/json"
        body = json.dumps({"status": "running" if is_ready else "stopping", **numbers}) + "\n"
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return (head + body).encode()
