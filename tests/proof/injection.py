"""One act at one step of the scheduler, while a public operation runs, and what must hold afterwards."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import anyio
import anyio.lowlevel

from parallel_agents.testing.stepping import Backend, installed_backends, run_in_virtual_time

Kind: TypeAlias = Literal["scope", "native", "both"]
"""How the caller is cancelled: by a scope around it, natively, or by both before anything else can run."""

WAYS: list[tuple[Backend, Kind]] = [
    ("asyncio", "native"),
    ("asyncio", "both"),
    *((backend, "scope") for backend in installed_backends()),
]

HANGS_AFTER = 500.0
"""Virtual seconds."""

SETTLING_SECONDS = 20.0
"""Virtual seconds in which a task that was left behind would show."""


class Operation(ABC):
    """Something of the public interface that is called, with all that it needs; made anew for each run."""

    is_cancelled_natively = False
    """Whether a native cancellation may come, against which no shield of anyio holds in the task that it is for."""

    async def prepare(self) -> None:  # noqa: B027 - not all have anything to do
        """Make what must be made in the loop."""

    @abstractmethod
    async def run(self) -> None:
        """Call the operation."""

    def after(self) -> None:  # noqa: B027 - the same
        """Called as soon as it is over, however it ended."""

    @abstractmethod
    def check(self) -> None:
        """Raise if something was left undone, or told wrongly."""

    async def use_again(self) -> None:  # noqa: B027 - the same
        """Use what is left once more; all of it must work as if nothing had happened."""


class Injection:
    """Acts once, at a given step, while the operation runs; None never acts, and only counts."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.steps = 0
        self.act: Callable[[], object] | None = None
        self.happened = False

    def on_step(self, _step: int) -> None:
        if self.act is None:
            return
        self.steps += 1
        if self.steps == self.at:
            self.happened = True
            self.act()


def _cancel(kind: Kind, scope: anyio.CancelScope) -> Callable[[], object]:
    if kind == "scope":
        return scope.cancel
    task = asyncio.current_task()
    assert task is not None

    def cancel_both() -> None:
        scope.cancel()
        task.cancel()

    return task.cancel if kind == "native" else cancel_both


async def _reaches_three_checkpoints() -> bool:
    """Whether no cancellation is raised: with a shuffled queue, asyncio may deliver it at the second checkpoint."""
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
    return True


class LostCancellationError(AssertionError):
    """A native cancellation of the caller never arrived."""


async def _call(operation: Operation, injection: Injection, kind: Kind) -> None:
    swallowed = False
    with anyio.CancelScope() as outer, anyio.fail_after(HANGS_AFTER):
        injection.act = _cancel(kind, outer)
        try:
            await operation.run()
        finally:
            injection.act = None
            operation.after()
        swallowed = await _reaches_three_checkpoints() and injection.happened
    assert not swallowed, "the caller's cancellation was swallowed"
    if kind == "both" and injection.happened:
        await _reaches_three_checkpoints()
        raise LostCancellationError("the caller's native cancellation was lost")


def run_once(operation: Operation, backend: Backend, kind: Kind, seed: int | None, at: int | None) -> Injection:
    """Run an operation, cancel its caller at one step, and hold what is left against the promises."""
    injection = Injection(at)
    operation.is_cancelled_natively = kind != "scope"

    async def program() -> None:
        await operation.prepare()
        before = {task.id for task in anyio.get_running_tasks()}
        lost: list[LostCancellationError] = []
        try:
            await _call(operation, injection, kind)
        except asyncio.CancelledError:
            task: Any = asyncio.current_task()
            assert injection.happened
            assert kind != "scope"
            assert task.uncancel() == 0, "one cancellation became several"
        except LostCancellationError as error:
            lost.append(error)
        await anyio.sleep(SETTLING_SECONDS)
        left = [str(task.name) for task in anyio.get_running_tasks() if task.id not in before]
        assert not left, f"tasks were left behind: {', '.join(left)}"
        operation.check()
        with anyio.fail_after(HANGS_AFTER):
            await operation.use_again()
        if lost:
            raise lost[0]

    run_in_virtual_time(program, backend, seed=seed, on_step=injection.on_step)
    return injection
