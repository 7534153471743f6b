"""A bug of anyio that the proof meets, mended: a native cancellation can be lost beside one of anyio's own.

Seen in anyio 4.16.0 on asyncio. A scope counts how often it has cancelled its task, to take that back when it is left.
A scope that is left while one around it is cancelled hands its count on to that one, even where that one belongs to
another task, as the scope of a task group does for those of its children. The outer scope then takes back from its own
task what the child's had got, and with it a native ``Task.cancel()`` that came in the same turn of the event loop.

``test_anyio_loses_no_native_cancellation_beside_one_of_its_own`` fails as soon as anyio has mended it; then this module
can go.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from anyio._backends import _asyncio


@contextmanager
def mended() -> Iterator[None]:
    """Have scopes hand on their count only to scopes of the same task, for the length of the block."""
    scope_class: Any = _asyncio.CancelScope
    leave = scope_class.__exit__

    def leave_mended(
        scope: Any, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        parent = scope._parent_scope
        goes_on = not scope._cancel_called or scope._parent_cancellation_is_visible_to_us
        if goes_on and parent is not None and parent._host_task is not scope._host_task:
            scope._pending_uncancellations = 0
        left: bool | None = leave(scope, kind, error, traceback)
        return left

    scope_class.__exit__ = leave_mended
    try:
        yield
    finally:
        scope_class.__exit__ = leave
