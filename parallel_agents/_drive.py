"""Drives an engine call in a context of its own without giving it a task of its own.

A task costs six times what this does; the code behind ``await`` cannot tell the difference, except that the native
current task is the worker's.
"""

import inspect
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextvars import Context
from typing import Any, TypeVar, cast

T = TypeVar("T")


def coroutine_function(function: Callable[[T], Awaitable[Any]]) -> Callable[[T], Coroutine[Any, Any, Any]]:
    """Return a function that makes a coroutine, in which *function* runs: itself, if that is what it does."""
    plain = function.__func__ if isinstance(function, types.MethodType) else function
    if isinstance(plain, types.FunctionType) and plain.__code__.co_flags & inspect.CO_COROUTINE:
        return cast("Callable[[T], Coroutine[Any, Any, Any]]", function)

    async def call(argument: T) -> Any:
        return await function(argument)

    return call


@types.coroutine
def drive(context: Context, coroutine: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Await a coroutine that has not begun, every step of it inside *context*."""
    send: Callable[..., Any] = coroutine.send
    step = send
    sent: Any = None
    while True:
        try:
            waits_for = context.run(step, sent)
        except StopIteration as returned:
            value: T = returned.value
            return value
        try:
            sent = yield waits_for
        except GeneratorExit:
            context.run(coroutine.close)
            raise
        except BaseException as error:  # noqa: ASYNC103, BLE001 - the coroutine gets it, as from a task of its own
            step, sent = coroutine.throw, error
        else:
            step = send
