"""The worker of a Ray cluster: starts hosts, tells how they are doing, and stops them without losing an agent.

The agents run in the hosts, which are Ray's processes; this one looks after them. Killed, it leaves them as they are,
and the next one goes on with them.
"""

import sys
from collections.abc import Iterator
from typing import Any

import anyio
from attrs import field, fields, frozen

from ._checks import integer, not_blank, number
from ._errors import ParallelAgentsError
from ._health import serve_health
from ._shutdown import CooperativeTimeout, ShutdownManager
from ._words import harmless
from .engines._ray_host import HostState
from .engines._remote import unpack
from .engines.ray import answers, connect, end_host, first_line, host_actor

LOOK_SECONDS = 1.0
"""How often the hosts are asked how they are doing."""

BUSY_SECONDS = 0.1
"""How often they are asked when they are to stop."""

ANSWER_SECONDS = 30.0
"""How long a host may take to answer; one that Ray restarts elsewhere takes as long."""

START_SECONDS = 120.0
"""How long hosts may take to start; more means that the cluster has no room for them."""

CLEANUP_SECONDS = 10.0
"""How long cancelled agents have to end, and drivers to hear of it."""

SUCCEEDED, FAILED = 0, 1


class CannotServeError(ParallelAgentsError):
    """A worker that cannot begin, or cannot go on; the message says why."""


@frozen(kw_only=True)
class RayWorkerSettings:
    """How hosts run.

    Attributes:
        engine: The inner engine, as ``module:attribute``.
        name: Names the hosts, as in ``RayEngine``.
        hosts: How many there are.
        max_agents: The most agents of each.
        grace_seconds: How long agents may go on after a signal.
        address: Of the cluster.
        health: Host and port at which the health and the metrics are told.
    """

    engine: str = field(validator=not_blank)
    name: str = field(default="parallel-agents", validator=not_blank)
    hosts: int = field(default=1, validator=integer(at_least=1))
    max_agents: int = field(default=1000, validator=integer(at_least=1))
    grace_seconds: float = field(default=30.0, validator=number(at_least=0))
    address: str = "auto"
    health: tuple[str, int] | None = None


async def serve(settings: RayWorkerSettings) -> int:
    """Have hosts until SIGINT or SIGTERM; return the exit code.

    Then they take no more agents, and those that run may finish in the grace period; a second signal cancels them at
    once. One that was cancelled runs again when there are hosts again.

    Raises:
        CannotServeError: If the cluster is not to be had, has no room, or has hosts of that name with another engine.
    """
    hosts = _Hosts(settings)
    await hosts.start()
    manager = ShutdownManager(CooperativeTimeout(grace_seconds=settings.grace_seconds))
    signals = _Signals()
    manager.attach(signals)
    problem: CannotServeError | None = None
    code = FAILED
    async with manager.handle_signals(), anyio.create_task_group() as tasks:
        try:
            if settings.health is not None:
                await tasks.start(serve_health, settings.health, hosts.numbers, lambda: not signals.is_first.is_set())
            _say(f"{settings.hosts} hosts of {settings.name!r} run {settings.engine}; after SIGTERM agents may finish")
            watching = anyio.CancelScope()
            tasks.start_soon(hosts.watch, watching)
            await signals.is_first.wait()
            watching.cancel()
            with anyio.move_on_after(settings.grace_seconds):
                await hosts.drain(signals)
            code = await hosts.stop()
        except OSError as error:
            problem = CannotServeError(f"the health cannot be told at {settings.health}: {error.strerror}")
        except CannotServeError as error:
            problem = error  # raised below: the task group would wrap it
        tasks.cancel_scope.cancel()
        manager.detach(signals)
    if problem is not None:
        raise problem
    return code


class _Signals:
    """What the shutdown manager stops.

    Attributes:
        is_first: Set when the hosts are to take no more.
        is_second: Set when what runs is to be cancelled.
    """

    def __init__(self) -> None:
        self.is_first = anyio.Event()
        self.is_second = anyio.Event()

    def begin_shutdown(self, grace_seconds: float) -> None:
        """Let agents finish; without a grace period, cancel them."""
        self.is_first.set()
        if not grace_seconds:
            self.is_second.set()


class _Hosts:
    """The hosts of a worker."""

    def __init__(self, settings: RayWorkerSettings) -> None:
        self._settings = settings
        self._actors: list[Any] = []
        self._states: list[HostState] = []

    def numbers(self) -> dict[str, int]:
        """Return what all hosts count together."""
        names = [a.name for a in fields(HostState) if a.type is int and a.name != "pid"]
        return {"hosts": len(self._states)} | {name: sum(getattr(s, name) for s in self._states) for name in names}

    async def start(self) -> None:
        """Start those that are not there, and wait for all."""
        try:
            await anyio.to_thread.run_sync(connect, self._settings.address)
        except Exception as error:
            where = f"No connection to Ray at {self._settings.address!r}"
            raise CannotServeError(f"{where}: {first_line(error)}") from error
        await self._make()
        await self._ask("state", START_SECONDS)
        for state in self._states:
            if state.engine != self._settings.engine:
                raise CannotServeError(
                    f"hosts named {self._settings.name!r} are there, and run {state.engine}: choose another --name"
                )

    async def _make(self) -> None:
        """Start those that are not there."""
        self._actors = await anyio.to_thread.run_sync(lambda: list(self._made()))

    def _made(self) -> Iterator[Any]:
        for n in range(self._settings.hosts):
            yield host_actor(
                f"{self._settings.name}-{n}", self._settings.engine, max_agents=self._settings.max_agents, options={}
            )

    async def watch(self, scope: anyio.CancelScope) -> None:
        """Keep the numbers up to date and the hosts there, until the scope is cancelled."""
        with scope:
            while True:
                await anyio.sleep(LOOK_SECONDS)
                try:
                    await self._ask("state", ANSWER_SECONDS)
                except CannotServeError as error:
                    self._states = []
                    _say(str(error))
                    await self._make()

    async def drain(self, signals: _Signals) -> None:
        """Wait until all agents have ended and their drivers know, or until a second signal."""
        _say("Stopping: no more agents are taken, those that run may finish. Interrupt again to cancel them now")
        await self._ask("drain", ANSWER_SECONDS)
        while self._are_busy and not signals.is_second.is_set():
            with anyio.move_on_after(BUSY_SECONDS):
                await signals.is_second.wait()
            await self._ask("state", ANSWER_SECONDS)

    @property
    def _are_busy(self) -> bool:
        return any(state.running or state.untold for state in self._states)

    async def stop(self) -> int:
        """Cancel what still runs, let drivers hear of it, and end the hosts; return the exit code."""
        await self._ask("state", ANSWER_SECONDS)
        interrupted = sum(state.running for state in self._states)
        if interrupted:
            _say(f"Cancelling {interrupted} agents; they run again where there is a host")
            with anyio.move_on_after(CLEANUP_SECONDS):
                await self._ask("interrupt", ANSWER_SECONDS)
                while self._are_busy:
                    await anyio.sleep(BUSY_SECONDS)
                    await self._ask("state", ANSWER_SECONDS)
        for actor in self._actors:
            await anyio.to_thread.run_sync(end_host, actor)
        return FAILED if interrupted else SUCCEEDED

    async def _ask(self, method: str, seconds: float) -> None:
        """Have all hosts do something, and take note of how they are then."""
        try:
            texts = await anyio.to_thread.run_sync(answers, self._actors, method, seconds)
            self._states = [unpack(HostState, text, "worker") for text in texts]
        except ParallelAgentsError as error:
            raise CannotServeError(str(error)) from error
        except Exception as error:
            raise CannotServeError(f"A host does not answer: {first_line(error)}. See: ray status") from error


def _say(text: str) -> None:
    sys.stderr.write(f"parallel-agents: {harmless(text)}\n")
    sys.stderr.flush()
