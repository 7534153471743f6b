"""ParallelExecutor: from a group to a result."""

import inspect
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from ._models import AgentAssignment, GroupOptions, ParallelExecutionGroup
from ._outcomes import ParallelExecutionResult, ParallelProgress
from ._run import GroupRun, Settings
from ._shutdown import ShutdownManager
from ._stream import StreamRun
from .engines._protocol import AgentEngine
from .engines.function import FunctionEngine
from .events import Observer
from .locks._protocol import ResourceLock
from .locks.memory import InMemoryResourceLock


class ParallelExecutor:
    """Runs groups of agents, and gives back exactly one outcome for each agent.

    May be made outside an event loop and used on any backend, one loop after another.

    Args:
        engine: What runs one agent: an engine, or any async function of an assignment.
        limiter: Bounds the engine calls of every group and executor that is given it. Unlike the executor, an anyio
            limiter stays with the backend that uses it first.
        resource_lock: Where claims are taken; by default one in memory, shared by all groups of this executor.
        shutdown_manager: Stops this executor's groups, with those of others that are given it.
        progress_callback: A plain function of a ``ParallelProgress``, called at the start, and at each start and
            end of an agent. It must not block; what it raises is logged and changes nothing.
        observers: Are told every event.

    Raises:
        TypeError: For an engine that is none, and for a callback that is a coroutine function.
    """

    def __init__(
        self,
        *,
        engine: AgentEngine | Callable[[AgentAssignment], Awaitable[Any]],
        limiter: anyio.CapacityLimiter | None = None,
        resource_lock: ResourceLock | None = None,
        shutdown_manager: ShutdownManager | None = None,
        progress_callback: Callable[[ParallelProgress], object] | None = None,
        observers: Iterable[Observer] = (),
    ) -> None:
        if _is_async(progress_callback):
            raise TypeError("progress_callback must be a plain function: nobody would await a coroutine function")
        self._settings = Settings(
            engine=_as_engine(engine),
            limiter=limiter,
            resource_lock=InMemoryResourceLock() if resource_lock is None else resource_lock,
            shutdown_manager=shutdown_manager,
            progress_callback=progress_callback,
            observers=tuple(observers),
        )

    def __repr__(self) -> str:
        return f"ParallelExecutor(engine={self._settings.engine!r})"

    async def execute_group(self, group: ParallelExecutionGroup) -> ParallelExecutionResult[Any]:
        """Run a group to its end.

        A checkpoint. Cancelling it cancels every agent and waits for their cleanup. An agent that calls it lends its
        own slot of the limiter to the group meanwhile.

        Returns:
            One outcome per assignment, in the order of the assignments, whatever became of them.

        Raises:
            ResourceConflictError: If claims overlap or are held by somebody else; nothing was run.
            ParallelExecutionError: After all agents have ended, if one met a MemoryError or RecursionError, or if
                locks could not be given back; the complete result is in its ``result``.
            ValueError: If the engine refuses an assignment; nothing was run.
        """
        async with self.open_group(group) as run:
            pass
        return run.result

    @asynccontextmanager
    async def open_group(self, group: ParallelExecutionGroup) -> AsyncIterator[GroupRun[Any]]:
        """Run a group for the length of a block, in which it can be watched and cancelled.

        The end of the block waits for the agents. An exception in the block cancels them first, and then leaves the
        block as it is. ``run.result`` is complete after the block, however it was left.

        Raises:
            ResourceConflictError: As ``execute_group()`` does, before the block.
            ParallelExecutionError: As ``execute_group()`` does, after the block.
            ValueError: As ``execute_group()`` does, before the block.
        """
        run: GroupRun[Any] = GroupRun(group, self._settings, group.assignments)
        async with run.slot_lent(), run.opened():
            yield run

    @asynccontextmanager
    async def open_stream(
        self,
        assignments: Iterable[AgentAssignment] | AsyncIterable[AgentAssignment],
        *,
        group_id: str,
        max_concurrency: int,
        **options: Any,
    ) -> AsyncIterator[StreamRun[Any]]:
        """Run assignments as they come, for the length of a block in which their outcomes are taken.

        An assignment is pulled when an agent can start at once, and none while *max_concurrency* outcomes wait to be
        taken: memory grows with that number, not with the number of assignments. Iterating over what the block gets
        yields outcomes in order of completion; it ends when the source has ended and all outcomes are taken, or with
        the error that the source raised, after what ran was cancelled. Leaving the block cancels what still runs.

        Args:
            assignments: Any iterable, pulled in the event loop, or asynchronous iterable, which is closed at the end.
                Ids are unique among those in flight. Tasks that depend on others are refused.
            group_id: Names the stream in events and locks.
            max_concurrency: The most engine calls at the same time.
            options: The other fields of ``GroupOptions``. Claims are taken when an assignment starts, under ``REJECT``
                as well: then one whose claims are not to be had is ``REJECTED``.

        Raises:
            ParallelExecutionError: After the block, as ``execute_group()`` does; its ``result`` holds no outcomes.
        """
        of_stream = GroupOptions(group_id=group_id, max_concurrency=max_concurrency, **options)
        run: StreamRun[Any] = StreamRun(assignments, of_stream, self._settings)
        async with run.slot_lent(), run.opened():
            try:
                yield run
            finally:
                run.leave()


def _as_engine(engine: AgentEngine | Callable[[AgentAssignment], Awaitable[Any]]) -> AgentEngine:
    if isinstance(engine, AgentEngine):
        return engine
    if callable(engine):
        return FunctionEngine(engine)
    raise TypeError(f"engine must have an async method run(assignment), or be an async function, got {engine!r}")


def _is_async(callback: object) -> bool:
    called = callback if inspect.isroutine(callback) else getattr(type(callback), "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(called)
