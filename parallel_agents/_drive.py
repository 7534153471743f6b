"""Drives an engine call in a context of its own without giving it a task of its own.

A task costs six times what this does; the code behind ``await`` cannot tell the difference, except that the native
current task is the worker's.
"""

import types
from collections.abc import Awaitable, Callable, Generator
from contextvars import Context
from typing import Any


@types.coroutine
def drive(context: Context, function: Callable[[Any], Awaitable[Any]], argument: Any) -> Generator[Any, Any, Any]:
    """Call an async function and await it, every step of it inside *context*."""
    run = context.run
    coroutine = run(function, argument)
    if type(coroutine) is not types.CoroutineType:
        coroutine = _awaited(coroutine)
    send: Callable[..., Any] = coroutine.send
    step = send
    sent: Any = None
    while True:
        try:
            waits_for = run(step, sent)
        except StopIteration as returned:
            return returned.value
        try:
            sent = yield waits_for
        except GeneratorExit:
            run(coroutine.close)
            raise
        except BaseException as error:  # noqa: ASYNC103, BLE001 - the coroutine gets it, as from a task of its own
            step, sent = coroutine.throw, error
        else:
            step = send


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
