"""Runs a program under a scheduler that can be stopped at each step: seeded order, virtual time, an injection.

On trio the scheduler's own instruments do it, on asyncio an event loop whose queue of ready callbacks counts. Both
reach into private names; ``test_cancel_at_every_step.py`` fails with a clear message when one of them is gone.
"""

import asyncio
import random
import selectors
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

Step = Callable[[int], None]
"""Called before each step of the scheduler, with its number, from 1."""


class DeadlockError(Exception):
    """Nothing is ready, and no timer will ever make anything ready."""


class _CountingQueue(deque[Any]):
    def __init__(self, seed: int | None, on_step: Step) -> None:
        super().__init__()
        self.random = None if seed is None else random.Random(seed)
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
        return self.now

    def _run_once(self) -> None:
        self._ready.left_of_batch = 0
        super()._run_once()  # type: ignore[misc]


def _trio_options(seed: int | None, on_step: Step) -> dict[str, Any]:
    trio = pytest.importorskip("trio")

    class StepInstrument(trio.abc.Instrument):  # type: ignore[misc, name-defined]
        step = 0

        def before_task_step(self, task: Any) -> None:
            if not task.name.startswith(("<Init>", "trio._core")):
                self.step += 1
                on_step(self.step)

    trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio._core._run._r.seed(seed or 0)
    return {"instruments": [StepInstrument()], "clock": trio.testing.MockClock(autojump_threshold=0)}


def run(backend: str, program: Callable[[], Awaitable[Any]], *, seed: int | None, on_step: Step) -> Any:
    """Run *program* on *backend* in an order that depends on *seed* alone; ``None`` keeps asyncio's own order."""
    if backend == "trio":
        options = _trio_options(seed, on_step)
    else:
        options = {"loop_factory": lambda: SteppingLoop(seed, on_step)}
    return anyio.run(program, backend=backend, backend_options=options)
