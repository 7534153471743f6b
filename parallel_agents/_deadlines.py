"""Deadlines of many scopes, watched by one task.

A deadline of a cancel scope is a timer of the event loop, which costs more to set and to take back than all else that
is done for an agent. Nearly all agents end before their time. So the deadlines are numbers that one task looks at, when
the earliest of those it saw is over.

Knows anyio's scopes; knows neither agents nor groups.
"""

import math
from collections.abc import Callable, Iterable

import anyio


class WatchedScope:
    """A cancel scope with a deadline that a ``DeadlineWatch`` watches; inside it, anyio does not know the deadline.

    Args:
        scope: What is cancelled when the deadline is over.
    """

    __slots__ = ("_scope", "deadline")

    def __init__(self, scope: anyio.CancelScope) -> None:
        self._scope = scope
        self.deadline = math.inf
        """A time of the loop's clock; whoever sets it tells the watch."""

    @property
    def cancel_called(self) -> bool:
        """Whether it was cancelled."""
        return self._scope.cancel_called

    def cancel(self) -> None:
        """Cancel it; may be repeated."""
        self._scope.cancel()


class DeadlineWatch:
    """Cancels scopes when their deadlines are over.

    Args:
        clock: Tells the loop's time.
        scopes: Returns the scopes that are to be watched, at any time.
        start: Starts a task that awaits ``run()``; called when there is something to watch, and nobody does.
    """

    def __init__(
        self, clock: Callable[[], float], scopes: Callable[[], Iterable[WatchedScope]], start: Callable[[], object]
    ) -> None:
        self._clock = clock
        self._scopes = scopes
        self._start = start
        self._nap: anyio.CancelScope | None = None
        self.looks_at = math.inf
        """When it looks next: only a deadline before that must be told."""

    def tell(self, deadline: float) -> None:
        """Have the watch look at *deadline*, or before."""
        if deadline < self.looks_at:
            is_new = self.looks_at == math.inf
            self.looks_at = deadline
            if self._nap is not None:
                self._nap.deadline = deadline
            elif is_new:
                self._start()

    async def run(self) -> None:
        """Watch until no scope that is there has a deadline; cancelled, it watches no more."""
        while self.looks_at < math.inf:
            with anyio.CancelScope(deadline=self.looks_at) as self._nap:
                await anyio.sleep_forever()
            self._nap = None
            self.looks_at = math.inf  # what is cancelled below may tell a deadline
            self._look(self._clock())

    def _look(self, now: float) -> None:
        """Cancel what is over, and find out when to look again: at the next deadline, however many come after it."""
        for scope in tuple(self._scopes()):
            if scope.deadline <= now:
                scope.deadline = math.inf
                scope.cancel()
            elif scope.deadline < self.looks_at:
                self.looks_at = scope.deadline
