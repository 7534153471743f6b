"""Cancels a program at each step of the scheduler in turn, in virtual time."""

from collections.abc import Awaitable, Callable
from itertools import count

import anyio
import stepping


def cancel_at_each_step(backend: str, program: Callable[[], Awaitable[object]], check: Callable[[], object]) -> int:
    """Run *program* again and again, cancelled at one step after another, until it ends before it is cancelled.

    *check* is called after each run that was cancelled, with ten seconds between. Returns the number of steps.
    """
    for step in count(1):
        if not _was_cancelled_at(step, backend, program, check):
            return step
    raise AssertionError


def _was_cancelled_at(
    at: int, backend: str, program: Callable[[], Awaitable[object]], check: Callable[[], object]
) -> bool:
    scopes: list[anyio.CancelScope] = []
    steps = 0

    def on_step(_step: int) -> None:
        nonlocal steps
        if scopes:
            steps += 1
            if steps == at:
                scopes[0].cancel()

    async def cancelled() -> bool:
        with anyio.fail_after(1_000), anyio.CancelScope() as scope:
            scopes.append(scope)
            await program()
        scopes.clear()
        await anyio.sleep(10)
        if scope.cancel_called:
            check()
        return scope.cancel_called

    was_cancelled: bool = stepping.run(backend, cancelled, seed=None, on_step=on_step)
    return was_cancelled
