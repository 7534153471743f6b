"""Schedulers for tests: virtual time, an order that a seed decides, and a hook before each step.

On trio its own clock and instruments do it, on asyncio an event loop of this module. Both reach into private names of
the backends: the order of tasks and what they wait for on trio, the queue of ready callbacks on asyncio.
"""

import asyncio  # noqa: TID251 - its event loop is what this module makes another one of
import random
import selectors
from collections import deque
from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Any, Literal, NoReturn, TypeAlias

import anyio

Backend: TypeAlias = Literal["asyncio", "trio"]

Step: TypeAlias = Callable[[int], object]
"""Called before each step of the scheduler, with its number, from 1."""


class DeadlockError(Exception):
    """Nothing is ready, and no timer will ever make anything ready.

    Raised in virtual time on asyncio, where nothing waits for files, sockets, programs and threads.
    """


class _CountingQueue(deque[Any]):
    def __init__(self, seed: int | None, on_step: Step) -> None:
        super().__init__()
        self.random = None if seed is None else random.Random(seed)  # noqa: S311 - an order, no secret
        self.on_step = on_step
        self.step = 0
        self.left_of_batch = 0

    def popleft(self) -> Any:
        if self.left_of_batch <= 0:
            self.left_of_batch = len(self)
            if self.random is not None and len(self) > 1:
                batch = list(self)
                self.random.shuffle(batch)
                self.clear()
                self.extend(batch)
        self.left_of_batch -= 1
        self.step += 1
        self.on_step(self.step)
        return super().popleft()


class _JumpingSelector(selectors.DefaultSelector):
    """Moves the clock on where the real one would sleep."""

    loop: "SteppingLoop"

    def select(self, timeout: float | None = None) -> Any:
        events = super().select(0)
        if events or timeout == 0:
            return events
        if timeout is None:
            raise DeadlockError
        self.loop.now += timeout
        return []


class SteppingLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop with a seeded order, virtual time and a hook before each callback."""

    def __init__(self, seed: int | None, on_step: Step) -> None:
        self.now = 0.0
        selector = _JumpingSelector()
        selector.loop = self
        super().__init__(selector)
        self._ready = _CountingQueue(seed, on_step)

    def time(self) -> float:
        """Return the virtual time, in seconds."""
        return self.now

    def _run_once(self) -> None:
        self._ready.left_of_batch = 0
        super()._run_once()  # type: ignore[misc]


class VirtualTimeLoop(SteppingLoop):
    """An asyncio event loop in which sleeping takes no time; for code that waits for nothing outside of it."""

    def __init__(self) -> None:
        super().__init__(None, lambda _step: None)


def virtual_time(backend: Backend) -> tuple[str, dict[str, Any]]:
    """Return what a fixture ``anyio_backend`` returns so that tests run in virtual time.

    The clock stands still while anything can run, and then jumps to the next timer: a test of an agent that takes an
    hour takes no time. Code that waits for files, sockets, programs or threads does not belong into it.

    Args:
        backend: ``asyncio`` or ``trio``.

    Raises:
        ModuleNotFoundError: If trio is wanted and not installed.
    """
    if backend == "asyncio":
        return "asyncio", {"loop_factory": VirtualTimeLoop}
    from trio.testing import MockClock  # noqa: PLC0415, TID251 - whoever asks for trio has it

    return "trio", {"clock": MockClock(autojump_threshold=0)}


def running_clock(backend: Backend) -> Callable[[], float]:
    """Return the clock of the event loop that runs, which can be read between its tasks as well."""
    if backend == "asyncio":
        return asyncio.get_running_loop().time
    import trio  # noqa: PLC0415, TID251 - whoever runs on trio has it

    return trio.current_time


def call_after(seconds: float, function: Callable[[], object], backend: Backend) -> None:
    """Call *function* from the loop that runs when *seconds* have passed, unless the loop has ended by then."""
    if backend == "asyncio":
        asyncio.get_running_loop().call_later(seconds, function)
        return
    import trio  # noqa: PLC0415, TID251 - whoever runs on trio has it

    async def call() -> None:
        await trio.sleep(seconds)
        function()

    trio.lowlevel.spawn_system_task(call)


def wake_what_hangs(backend: Backend) -> None:
    """Make all that waits in the loop that runs raise an exception, in shields as well."""
    if backend == "asyncio":
        for task in asyncio.all_tasks():
            task.cancel()
        return
    import trio  # noqa: PLC0415, TID251 - whoever runs on trio has it

    def hangs() -> NoReturn:
        raise DeadlockError

    scheduler: Any = trio._core._run
    tasks = [scheduler.GLOBAL_RUN_CONTEXT.runner.main_task]
    for task in tasks:
        tasks.extend(child for nursery in task.child_nurseries for child in nursery.child_tasks)
        if task._abort_func is not None:
            task._attempt_abort(hangs)


def installed_backends() -> tuple[Backend, ...]:
    """Return the backends that tests can run on."""
    return ("asyncio", "trio") if find_spec("trio") is not None else ("asyncio",)


def _trio_options(seed: int | None, on_step: Step) -> dict[str, Any]:
    import trio  # noqa: PLC0415, TID251 - whoever asks for trio has it

    class StepInstrument(trio.abc.Instrument):
        step = 0

        def before_task_step(self, task: Any) -> None:
            if not task.name.startswith(("<Init>", "trio._core")):
                self.step += 1
                on_step(self.step)

    scheduler: Any = trio._core._run
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(seed or 0)
    return {"instruments": [StepInstrument()], "clock": virtual_time("trio")[1]["clock"]}


def run_in_virtual_time(
    program: Callable[[], Awaitable[Any]],
    backend: Backend,
    *,
    seed: int | None = None,
    on_step: Step = lambda _step: None,
) -> Any:
    """Run *program* in virtual time, in an order that depends on *seed* alone, and return what it returns.

    Args:
        program: What runs; it waits for tasks, events and timers alone.
        backend: ``asyncio`` or ``trio``.
        seed: The same seed is the same order; ``None`` is the order in which things became ready on asyncio, and one
            certain order on trio.
        on_step: Called before each step of the scheduler.
    """
    options = (
        _trio_options(seed, on_step) if backend == "trio" else {"loop_factory": lambda: SteppingLoop(seed, on_step)}
    )
    return anyio.run(program, backend=backend, backend_options=options)
