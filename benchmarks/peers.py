"""What is measured: each program runs a number of no-op agents, at most so many at once, on one backend.

A no-op agent is an async function with one checkpoint of the backend's own. Inputs are made before the clock starts,
outcomes and results are made while it runs, where a program makes any.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    AgentRunResult,
    ParallelExecutionGroup,
    ParallelExecutor,
    Task,
    TerminationReason,
)

Program = Callable[[], Awaitable[Any]]
Checkpoint = Callable[[], Awaitable[None]]


def checkpoint_of(backend: str) -> Checkpoint:
    if backend == "asyncio":
        return partial(asyncio.sleep, 0)
    import trio  # noqa: PLC0415 - only where it is measured

    return trio.lowlevel.checkpoint


def group_of(count: int, at_once: int, **each: Any) -> ParallelExecutionGroup:
    claimed = each.pop("claim", False)
    assignments = [
        AgentAssignment(
            identity=AgentIdentity(id=f"a{n}"),
            task=Task(id=f"t{n}"),
            resource_claims=(f"r{n}",) if claimed else (),
            **each,
        )
        for n in range(count)
    ]
    return ParallelExecutionGroup(group_id="g", assignments=assignments, max_concurrency=at_once)


def executor(count: int, at_once: int, backend: str) -> Program:
    group = group_of(count, at_once)
    checkpoint = checkpoint_of(backend)

    async def agent(_: AgentAssignment) -> None:
        await checkpoint()

    return lambda: ParallelExecutor(engine=agent).execute_group(group)


class NoOpEngine:
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    async def run(self, task: AgentAssignment, /) -> AgentRunResult[None]:
        await self._checkpoint()
        return AgentRunResult(
            task_id=task.task_id, agent_id=task.agent_id, termination_reason=TerminationReason.COMPLETED
        )


def executor_with_engine(count: int, at_once: int, backend: str) -> Program:
    """With an engine that makes its results itself, which are validated then."""
    group = group_of(count, at_once)
    engine = NoOpEngine(checkpoint_of(backend))
    return lambda: ParallelExecutor(engine=engine).execute_group(group)


def executor_with_everything(count: int, at_once: int, backend: str) -> Program:
    """With a timeout and a claim for each, a shared limiter, and a progress callback."""
    group = group_of(count, at_once, timeout_seconds=60, claim=True)
    checkpoint = checkpoint_of(backend)

    async def agent(_: AgentAssignment) -> None:
        await checkpoint()

    async def program() -> None:
        limiter = anyio.CapacityLimiter(at_once)
        await ParallelExecutor(engine=agent, limiter=limiter, progress_callback=lambda _: None).execute_group(group)

    return program


def native_pool(count: int, at_once: int, backend: str) -> Program:
    """The floor: as many tasks as may run pull numbers from one iterator, and make nothing of them."""
    checkpoint = checkpoint_of(backend)

    async def on_asyncio() -> None:
        numbers = iter(range(count))

        async def work() -> None:
            for _ in numbers:
                await checkpoint()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(at_once):
                tasks.create_task(work())

    async def on_trio() -> None:
        import trio  # noqa: PLC0415 - only where it is measured

        numbers = iter(range(count))

        async def work() -> None:
            for _ in numbers:
                await checkpoint()

        async with trio.open_nursery() as nursery:
            for _ in range(at_once):
                nursery.start_soon(work)

    return on_asyncio if backend == "asyncio" else on_trio


def gather_with_semaphore(count: int, at_once: int, backend: str) -> Program:
    checkpoint = checkpoint_of(backend)

    async def program() -> None:
        semaphore = asyncio.Semaphore(at_once)

        async def one() -> None:
            async with semaphore:
                await checkpoint()

        await asyncio.gather(*(one() for _ in range(count)))

    return program


def task_group_with_semaphore(count: int, at_once: int, backend: str) -> Program:
    checkpoint = checkpoint_of(backend)

    async def program() -> None:
        semaphore = asyncio.Semaphore(at_once)

        async def one() -> None:
            async with semaphore:
                await checkpoint()

        async with asyncio.TaskGroup() as tasks:
            for _ in range(count):
                tasks.create_task(one())

    return program


def anyio_group_with_limiter(count: int, at_once: int, backend: str) -> Program:
    checkpoint = checkpoint_of(backend)

    async def program() -> None:
        limiter = anyio.CapacityLimiter(at_once)

        async def one() -> None:
            async with limiter:
                await checkpoint()

        async with anyio.create_task_group() as tasks:
            for _ in range(count):
                tasks.start_soon(one)

    return program


def nursery_with_limiter(count: int, at_once: int, backend: str) -> Program:
    checkpoint = checkpoint_of(backend)

    async def program() -> None:
        import trio  # noqa: PLC0415 - only where it is measured

        limiter = trio.CapacityLimiter(at_once)

        async def one() -> None:
            async with limiter:
                await checkpoint()

        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(one)

    return program


def aiometer_run_all(count: int, at_once: int, backend: str) -> Program:
    import aiometer  # noqa: PLC0415 - a peer that need not be installed

    checkpoint = checkpoint_of(backend)
    calls = [checkpoint] * count
    return lambda: aiometer.run_all(calls, max_at_once=at_once)


EXECUTOR, ENGINE = "parallel_agents", "parallel_agents, engine"
EVERYTHING = "parallel_agents, everything on"
GATHER, ANYIO, AIOMETER = "asyncio.gather + Semaphore", "anyio group + CapacityLimiter", "aiometer.run_all"
NURSERY = "trio nursery + CapacityLimiter"

PROGRAMS: dict[str, Callable[[int, int, str], Program]] = {
    "native worker pool": native_pool,
    EXECUTOR: executor,
    ENGINE: executor_with_engine,
    EVERYTHING: executor_with_everything,
    GATHER: gather_with_semaphore,
    "asyncio.TaskGroup + Semaphore": task_group_with_semaphore,
    ANYIO: anyio_group_with_limiter,
    NURSERY: nursery_with_limiter,
    AIOMETER: aiometer_run_all,
}

ONLY_ON = {GATHER: "asyncio", "asyncio.TaskGroup + Semaphore": "asyncio", NURSERY: "trio"}
"""Programs that exist for one backend."""
