"""Shutdown: nothing new starts, what runs may finish in time, then clean-up.

Knows no executor: runs attach themselves.
"""

import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Protocol

import anyio
from attrs import field, frozen

from ._checks import number
from ._errors import ShutdownInProgressError
from .events import PARALLEL_OBSERVER_ERROR, error_text, write_log

Cleanup = Callable[[], Awaitable[object] | object]
"""A plain or async function without arguments."""


@frozen(kw_only=True)
class CooperativeTimeout:
    """Running agents are told, have some time to finish, and are then cancelled.

    Attributes:
        grace_seconds: How long they have.
        cleanup_seconds: How long all cleanup callbacks have together.
    """

    grace_seconds: float = field(default=30.0, validator=number(at_least=0))
    cleanup_seconds: float = field(default=5.0, validator=number(at_least=0))


@frozen(kw_only=True)
class ImmediateCancel:
    """Running agents are cancelled at once.

    Attributes:
        cleanup_seconds: How long all cleanup callbacks have together.
    """

    cleanup_seconds: float = field(default=5.0, validator=number(at_least=0))

    @property
    def grace_seconds(self) -> float:
        """None at all."""
        return 0.0


ShutdownStrategy = CooperativeTimeout | ImmediateCancel


@frozen(kw_only=True)
class ShutdownResult:
    """What a shutdown came to.

    Attributes:
        completed: ``group_id:task_id`` of the agents that ran when it was requested and ended by themselves.
        interrupted: ``group_id:task_id`` of the agents that had to be cancelled.
        cleanup_finished: Whether every cleanup callback ran to its end, in time and without an error.
    """

    completed: tuple[str, ...]
    interrupted: tuple[str, ...]
    cleanup_finished: bool


class StoppableRun(Protocol):
    """A run in flight, as the manager sees it."""

    def begin_shutdown(self, grace_seconds: float) -> None:
        """Start nothing more; cancel what still runs when the grace period is over. Never waits."""
        ...


class ShutdownManager:
    """Shuts down the groups of every executor that is given it. May be made outside an event loop; serves one shutdown.

    Its methods are called in the event loop's thread.

    Args:
        strategy: What running agents are granted.
    """

    def __init__(self, strategy: ShutdownStrategy | None = None) -> None:
        self.strategy: ShutdownStrategy = strategy or CooperativeTimeout()
        self.received_signal: signal.Signals | None = None
        self._shutting_down = False
        self._runs: dict[StoppableRun, None] = {}
        self._run_ended: anyio.Event | None = None
        self._cleanups: list[Cleanup] = []
        self._cleanup_began = False
        self._completed: list[str] = []
        self._interrupted: list[str] = []

    def __repr__(self) -> str:
        return f"ShutdownManager({self.strategy!r}, is_shutting_down={self._shutting_down}, runs={len(self._runs)})"

    @property
    def is_shutting_down(self) -> bool:
        """Whether a shutdown was requested."""
        return self._shutting_down

    def request_shutdown(self) -> None:
        """Let nothing new start, and start the grace period of what runs. Never waits; may be repeated."""
        if self._shutting_down:
            return
        self._shutting_down = True
        for run in tuple(self._runs):
            run.begin_shutdown(self.strategy.grace_seconds)

    def cancel_now(self) -> None:
        """End the grace period: request a shutdown, and cancel what runs. Never waits."""
        self._shutting_down = True
        for run in tuple(self._runs):
            run.begin_shutdown(0.0)

    def register_cleanup(self, callback: Cleanup) -> None:
        """Have a plain or async function called once the agents have ended, in the order of registration.

        Raises:
            ShutdownInProgressError: When cleaning up has begun already, so that it would never be called.
        """
        if self._cleanup_began:
            raise ShutdownInProgressError
        self._cleanups.append(callback)

    async def initiate_shutdown(self) -> ShutdownResult:
        """Request a shutdown, wait for the agents, clean up, and tell what came of it.

        Waits for as long as agents need to end; cancelling ends that wait. The callbacks then have
        ``cleanup_seconds`` together, whether this call is cancelled or not. A later call finds nothing left to do.
        """
        self.request_shutdown()
        while self._runs:
            self._run_ended = self._run_ended or anyio.Event()
            await self._run_ended.wait()
        finished = await self._clean_up()
        return ShutdownResult(
            completed=tuple(self._completed), interrupted=tuple(self._interrupted), cleanup_finished=finished
        )

    @asynccontextmanager
    async def handle_signals(self) -> AsyncIterator[None]:
        """Shut down at SIGINT and SIGTERM for the length of the block; a second signal cancels at once.

        Leaving the block waits, after a signal, until the shutdown is complete. ``received_signal`` keeps the first.
        """
        async with anyio.create_task_group() as tasks:
            await tasks.start(self._listen)
            try:
                yield
            finally:
                tasks.cancel_scope.cancel()
                if self._shutting_down:
                    await self._clean_up()  # noqa: ASYNC102 - it is shielded and bounded itself

    async def _listen(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for received in signals:
                if self.received_signal is None:
                    self.received_signal = received
                    self.request_shutdown()
                else:
                    self.cancel_now()

    async def _clean_up(self) -> bool:
        self._cleanup_began = True
        callbacks, self._cleanups = self._cleanups, []
        finished = True
        with anyio.move_on_after(self.strategy.cleanup_seconds, shield=True) as scope:
            for callback in callbacks:
                finished &= await _ran_without_error(callback)
        return finished and not scope.cancelled_caught

    def attach(self, run: StoppableRun) -> None:
        """Have *run* shut down with the others, until it is detached."""
        self._runs[run] = None

    def detach(self, run: StoppableRun) -> None:
        """Wait for *run* no more: its agents have ended. May be repeated."""
        self._runs.pop(run, None)
        if self._run_ended is not None:
            self._run_ended.set()
            self._run_ended = None

    def note_ended(self, agent: str, *, by_itself: bool) -> None:
        """Note how an agent ended that ran when the shutdown was requested."""
        (self._completed if by_itself else self._interrupted).append(agent)


async def _ran_without_error(callback: Cleanup) -> bool:
    try:
        ended = callback()
        if isinstance(ended, Awaitable):
            await ended
    except Exception as error:  # noqa: BLE001 - one that fails does not stop the next; the result says that not all went well
        write_log(PARALLEL_OBSERVER_ERROR, error=error_text(error))
        return False
    return True
