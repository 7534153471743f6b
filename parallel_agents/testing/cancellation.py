"""Cancels a program at each step of the scheduler in turn: what examples do not find, this does."""

from collections.abc import Awaitable, Callable
from itertools import count

import anyio
from attrs import frozen

from .stepping import Backend, call_after, installed_backends, run_in_virtual_time, running_clock, wake_what_hangs

HANGS_AFTER = 1_000.0
"""Virtual seconds that a program may take; more, and it hangs."""

STEPS_OF_CLEANUP = 100_000
"""Steps of the scheduler that a program may take once it was cancelled; more, and it hangs."""

SETTLING_SECONDS = 10.0
"""Virtual seconds between the end of a program and the look at what it left."""


def cancel_at_every_checkpoint(
    program: Callable[[], Awaitable[object]],
    /,
    *,
    check: Callable[[], object] | None = None,
    backend: Backend | None = None,
    cleanup_seconds: float = 10.0,
    seed: int | None = None,
) -> int:
    """Run *program* again and again, cancelled at one step of the scheduler after another, until it ends before that.

    It runs in virtual time, on asyncio and on trio. Each time it must end soon after it was cancelled, raise nothing
    but the cancellation, and leave no task behind. This is for programs that wait for tasks, events and timers alone,
    not for files, sockets, other programs or threads.

    A plain function, because it runs event loops of its own: call it from a test that is not async.

    Args:
        program: Makes all that it needs anew each time, such as locks and engines.
        check: Called after each run that was cancelled, ten virtual seconds later in the same event loop; it raises if
            something is wrong.
        backend: ``asyncio`` or ``trio``; both, as far as they are installed, unless given.
        cleanup_seconds: How many virtual seconds it may take from the cancellation to its end.
        seed: Decides the order in which tasks run that could all run next; asyncio's own order unless given.

    Returns:
        How many times it was cancelled.

    Raises:
        AssertionError: If it went on for too long after a cancellation, or for ever, or left tasks behind.
        TimeoutError: If it does not end though nobody cancels it.
        BaseException: What *program* or *check* raises, with a note that names the step.
    """
    backends = installed_backends() if backend is None else (backend,)
    return sum(_Trial(program, check, each, cleanup_seconds, seed).steps_cancelled() for each in backends)


@frozen
class _Trial:
    program: Callable[[], Awaitable[object]]
    check: Callable[[], object] | None
    backend: Backend
    cleanup_seconds: float
    seed: int | None

    def steps_cancelled(self) -> int:
        for step in count(1):
            try:
                if not self.was_cancelled_at(step):
                    return step - 1
            except BaseException as error:
                error.add_note(f"cancelled at step {step} on {self.backend}")
                raise
        raise AssertionError

    def was_cancelled_at(self, step: int) -> bool:
        injection = _Injection(step, self.backend)

        async def cancelled() -> bool:
            call_after(2 * HANGS_AFTER, injection.give_up, self.backend)
            before = {task.id for task in anyio.get_running_tasks()}
            with anyio.fail_after(HANGS_AFTER), anyio.CancelScope() as scope:
                injection.begin(scope)
                await self.program()
            took = injection.end()
            assert took <= self.cleanup_seconds, f"it went on for {took:g} s after it was cancelled"
            await anyio.sleep(SETTLING_SECONDS)
            left = [str(task.name) for task in anyio.get_running_tasks() if task.id not in before]
            assert not left, f"it left tasks behind: {', '.join(left)}"
            if self.check is not None and scope.cancel_called:
                self.check()
            return scope.cancel_called

        try:
            was_cancelled: bool = run_in_virtual_time(
                cancelled, self.backend, seed=self.seed, on_step=lambda _step: injection.on_step()
            )
        except BaseException:
            if injection.found_it_hanging:
                raise AssertionError("it hangs after it was cancelled") from None  # noqa: ASYNC104 - the loop has ended
            raise
        return was_cancelled


class _Injection:
    """Cancels a scope once, at a step counted from its beginning, tells how long ago that was, and ends what hangs."""

    def __init__(self, at: int, backend: Backend) -> None:
        self.at = at
        self.backend: Backend = backend
        self.steps = 0
        self.scope: anyio.CancelScope | None = None
        self.clock: Callable[[], float]
        self.cancelled_at: float | None = None
        self.found_it_hanging = False

    def begin(self, scope: anyio.CancelScope) -> None:
        self.scope, self.clock = scope, running_clock(self.backend)

    def on_step(self) -> None:
        if self.scope is None:
            return
        self.steps += 1
        if self.steps == self.at:
            self.scope.cancel()
            self.cancelled_at = self.clock()
        elif self.steps == self.at + STEPS_OF_CLEANUP:  # on asyncio a shield is told of a cancellation at each step
            self.give_up()

    def give_up(self) -> None:
        self.found_it_hanging = True
        wake_what_hangs(self.backend)

    def end(self) -> float:
        self.scope = None
        return 0.0 if self.cancelled_at is None else self.clock() - self.cancelled_at
