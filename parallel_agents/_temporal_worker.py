"""The process of a worker: serves until a signal, lets agents finish, and decides the exit code."""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import NoReturn

import anyio
import anyio.abc
from attrs import field, frozen
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.envconfig import ClientConfig
from temporalio.service import RetryConfig, RPCError

from ._checks import integer, not_blank, number
from ._endings import leaves
from ._errors import ParallelAgentsError
from ._health import serve_health
from ._shutdown import CooperativeTimeout, ShutdownManager
from ._words import harmless
from .engines._protocol import AgentEngine
from .engines._temporal_worker import Agents

CLEANUP_SECONDS = 10.0
"""How long cancelled agents have to end."""

REPORT_SECONDS = 600.0
"""For so long a worker tries to tell a server that does not answer how an agent has ended: its work is dear."""

LOOK_SECONDS = 0.05
"""Between two looks whether a workflow has ended."""

SUCCEEDED, FAILED = 0, 1


class CannotServeError(ParallelAgentsError):
    """A worker that cannot begin, or cannot go on; the message says why."""


@frozen(kw_only=True)
class TemporalWorkerSettings:
    """How a worker of Temporal runs.

    Attributes:
        task_queue: Where assignments come from.
        address: Of the server, as ``host:port``; what Temporal's configuration says unless given.
        namespace: Of the server; the same.
        max_agents: The most agents at the same time.
        heartbeat_seconds: How often an agent tells what it has spent, and hears whether it is cancelled.
        grace_seconds: How long agents may go on after a signal.
        health: Host and port at which the health and the metrics are told.
    """

    task_queue: str = field(validator=not_blank)
    address: str | None = None
    namespace: str | None = None
    max_agents: int = field(default=1000, validator=integer(at_least=1))
    heartbeat_seconds: float = field(default=5.0, validator=number(above=0))
    grace_seconds: float = field(default=30.0, validator=number(at_least=0))
    health: tuple[str, int] | None = None


async def serve(engine: AgentEngine, settings: TemporalWorkerSettings) -> NoReturn:
    """Run agents until SIGINT or SIGTERM; then end the process, with 1 if agents had to be cancelled. On asyncio.

    Then no more are taken, and those that run may finish in the grace period; a second signal cancels them at once. One
    that was cancelled runs again on another worker.

    Raises:
        CannotServeError: If the server is not to be had, or refuses.
    """
    try:
        client = await _client(settings)
    except (RPCError, RuntimeError, ValueError, OSError) as error:
        raise CannotServeError(f"Temporal cannot be reached: {error}") from error
    agents = Agents(engine, heartbeat_seconds=settings.heartbeat_seconds)
    workers = agents.workers(
        client,
        settings.task_queue,
        max_agents=settings.max_agents,
        grace_seconds=settings.grace_seconds,
    )
    manager = ShutdownManager(CooperativeTimeout(grace_seconds=settings.grace_seconds))
    drain = _Drain(agents)
    manager.attach(drain)
    try:
        async with manager.handle_signals(), anyio.create_task_group() as tasks:
            if settings.health is not None:
                await tasks.start(serve_health, settings.health, agents.numbers, lambda: not agents.is_stopping)
            for worker in (workers.agents, workers.workflows, workers.news):
                tasks.start_soon(worker.run)
            _say(f"Running agents of {settings.task_queue!r}; after SIGTERM or Ctrl-C those that run may finish")
            await drain.is_asked.wait()
            _say(f"Stopping: {agents.running} agents may finish within {settings.grace_seconds:g} s")
            with anyio.move_on_after(settings.grace_seconds + CLEANUP_SECONDS) as in_time:
                await workers.agents.shutdown()
            if in_time.cancelled_caught:
                _say(f"{agents.running} agents did not stop: ending all the same; they run again on another worker")
                _end(FAILED)  # the event loop would wait for them
            await _until_recorded(client, agents.ended_late)
            await workers.workflows.shutdown()
            await workers.news.shutdown()
            tasks.cancel_scope.cancel()
    except* (RPCError, RuntimeError) as errors:
        raise CannotServeError(f"Temporal's worker failed: {next(leaves(errors))}") from errors
    except* OSError as errors:
        raise CannotServeError(f"the health cannot be told at {settings.health}: {next(leaves(errors))}") from errors
    _end(FAILED if agents.interrupted else SUCCEEDED)


async def _client(settings: TemporalWorkerSettings) -> Client:
    """Connect as Temporal's own configuration says, in its file and the environment, and the settings above it."""
    config = ClientConfig.load_client_connect_config()
    if settings.address is not None:
        config["target_host"] = settings.address
    if settings.namespace is not None:
        config["namespace"] = settings.namespace
    config.setdefault("target_host", "localhost:7233")
    patience = RetryConfig(max_elapsed_time_millis=int(REPORT_SECONDS * 1000), max_retries=1000)
    return await Client.connect(**config, retry_config=patience)


async def _until_recorded(client: Client, ended: Iterable[str]) -> None:
    """Wait until the workflows of agents have ended, too; this may be the only worker that can take note of it."""
    give_up = anyio.current_time() + CLEANUP_SECONDS
    with suppress(RPCError):
        for handle in map(client.get_workflow_handle, ended):
            while (await handle.describe()).status is WorkflowExecutionStatus.RUNNING:
                if anyio.current_time() > give_up:
                    return
                await anyio.sleep(LOOK_SECONDS)


class _Drain:
    """What the shutdown manager stops."""

    def __init__(self, agents: Agents) -> None:
        self.is_asked = anyio.Event()
        self._agents = agents

    def begin_shutdown(self, grace_seconds: float) -> None:
        """Let agents finish; without a grace period, cancel them."""
        self._agents.stop()
        if not grace_seconds:
            self._agents.interrupt()
        self.is_asked.set()


def _end(code: int) -> NoReturn:
    """End the process without the interpreter's farewell, in which one of Temporal's threads may abort it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def _say(text: str) -> None:
    sys.stderr.write(f"parallel-agents: {harmless(text)}\n")
    sys.stderr.flush()
