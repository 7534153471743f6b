"""AsyncioEngine: agents that are written for asyncio, from asyncio and from trio."""

import asyncio  # noqa: TID251 - its agents run on nothing else
from collections.abc import Awaitable, Callable
from contextvars import Context, copy_context
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
from attrs import define

from .._checks import shown
from .._context import RunContext, RunInAnotherThread, _current, current_run
from .._models import AgentAssignment
from .._outcomes import AgentRunResult
from ..events import ASYNCIO_AGENT_LEFT
from .function import result_of

AsyncFunction = Callable[[AgentAssignment], Awaitable[Any]]
Send = Callable[[Callable[[], object]], object]
"""Has a function called in some event loop."""


def _call(function: Callable[[], object]) -> object:
    return function()


class AsyncioEngine:
    """Runs an async function that is written for asyncio, natively on asyncio, and from trio in a thread.

    Each agent runs in an asyncio task of its own. When its call is cancelled, the task gets one native ``cancel()`` and
    is waited for, so that cleanup that awaits is not cut off. If it has not ended after *cleanup_seconds*, it is left
    to itself, with an event ``execution.asyncio.agent_left``. If it returns all the same, it has returned.

    On trio the agents of a run share one thread with an asyncio loop. It lives as long as the run, so what agents keep
    between calls, such as HTTP connections, stays good. Context variables, ``current_run()`` among them, are those of
    the call; the usage that is recorded arrives a moment later. What blocks the loop blocks all agents in it.

    Args:
        function: Called with the assignment; its return value becomes the output of a completed result, unless it is
            an ``AgentRunResult``.
        cleanup_seconds: How long a cancelled agent is waited for.
    """

    def __init__(self, function: AsyncFunction, *, cleanup_seconds: float = 5.0) -> None:
        if not callable(function):
            raise TypeError(f"function must be an async function of an assignment, got {shown(function)}")
        if not cleanup_seconds >= 0:
            raise ValueError(f"cleanup_seconds must be >= 0, got {cleanup_seconds}")
        self._function = function
        self._cleanup_seconds = cleanup_seconds

    def __repr__(self) -> str:
        return f"AsyncioEngine({getattr(self._function, '__qualname__', self._function)!s})"

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Run the agent in a task of its own.

        Raises:
            LookupError: Outside an engine call of an executor.
        """
        run = current_run()
        agent = _Agent(partial(self._function, assignment), anyio.Event())
        _start(agent, run)
        try:
            await agent.is_over.wait()
        except anyio.get_cancelled_exc_class():  # noqa: ASYNC103 - what the agent returns all the same is its result
            agent.cancel()
            with anyio.move_on_after(self._cleanup_seconds, shield=True):
                await agent.is_over.wait()
            if not agent.is_over.is_set():
                run.emit(ASYNCIO_AGENT_LEFT, cleanup_seconds=self._cleanup_seconds)
                raise
            if agent.was_cancelled:
                raise
        if agent.was_cancelled:
            await raise_a_cancellation()
        return result_of(assignment, agent.result())


@define(eq=False)
class _Agent:
    """One agent's task, as the event loop of its engine call sees it.

    Attributes:
        function: What it runs.
        is_over: Whether it has ended.
    """

    function: Callable[[], Awaitable[Any]]
    is_over: anyio.Event
    _to_asyncio: Send = _call
    _task: "asyncio.Task[Any] | None" = None
    _order: BaseException | None = None

    def start(self, context: Context, to_asyncio: Send, to_owner: Send) -> None:
        """Start the task; *to_owner* brings its end back."""
        self._to_asyncio = to_asyncio
        to_asyncio(partial(self._create, context, to_owner))

    def _create(self, context: Context, to_owner: Send) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), context=context)
        self._task.add_done_callback(partial(self._tell, to_owner))

    def _tell(self, to_owner: Send, task: "asyncio.Task[Any]") -> None:
        if not task.cancelled():
            task.exception()  # asyncio complains of those that nobody has looked at, as of an agent that was left
        to_owner(self.is_over.set)

    async def _run(self) -> Any:
        try:
            return await self.function()
        except (KeyboardInterrupt, SystemExit) as order:  # in a task it would end the loop before anybody is told
            self._order = order

    def cancel(self) -> None:
        """Cancel the task, after it was started."""
        self._to_asyncio(self._cancel)

    def _cancel(self) -> None:
        assert self._task is not None
        self._task.cancel()

    @property
    def was_cancelled(self) -> bool:
        """Whether it has ended with a cancellation."""
        return self.is_over.is_set() and self._task is not None and self._task.cancelled()

    def result(self) -> Any:
        """Return what it returned, or raise what it raised."""
        if self._order is not None:
            raise self._order
        assert self._task is not None
        return self._task.result()


def _start(agent: _Agent, run: RunContext) -> None:
    """Start an agent where asyncio runs: here, or beside trio."""
    context = copy_context()
    if isinstance(anyio.lowlevel.current_token().native_token, asyncio.AbstractEventLoop):
        agent.start(context, _call, _call)
        return
    from ._asyncio_thread import AsyncioThread, forget_the_library  # noqa: PLC0415 - imports trio

    thread = AsyncioThread.of_this_run()
    context.run(forget_the_library)
    context.run(_current.set, RunInAnotherThread(run, thread.to_trio))
    agent.start(context, thread.to_asyncio, thread.to_trio)


async def raise_a_cancellation() -> None:
    """Raise the backend's cancelled exception, as the agent did, though nobody cancels this task."""
    found: BaseException | None = None
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.lowlevel.checkpoint()
        except anyio.get_cancelled_exc_class() as cancelled:
            found = cancelled
            raise
    assert found is not None
    raise found
