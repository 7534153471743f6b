"""A gate on the overhead per agent that cannot be noisy: it counts calls, bytes and tasks, and measures no time.

Everything is the slope between a smaller and a larger group, so that what a group costs once does not count, and is
compared with what people write themselves, counted in the same process. ``benchmarks/`` measures time.
"""

import asyncio
import gc
import sys
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from groups import assignment, group_of

from parallel_agents import (
    AgentAssignment,
    AgentRunResult,
    ParallelExecutionGroup,
    ParallelExecutor,
    TerminationReason,
)

FEW, MANY, AT_ONCE = 500, 1_500, 10

Program = Callable[[], Awaitable[object]]
Peer = Callable[[int], Program]


async def no_op(task: object) -> None:
    await anyio.lowlevel.checkpoint()


class NoOpEngine:
    async def run(self, task: AgentAssignment, /) -> AgentRunResult[None]:
        await anyio.lowlevel.checkpoint()
        return AgentRunResult(
            task_id=task.task_id, agent_id=task.agent_id, termination_reason=TerminationReason.COMPLETED
        )


def executor_of(count: int) -> Program:
    group = group_of(count, max_concurrency=AT_ONCE)
    return lambda: ParallelExecutor(engine=no_op).execute_group(group)


def executor_with_engine_of(count: int) -> Program:
    group = group_of(count, max_concurrency=AT_ONCE)
    return lambda: ParallelExecutor(engine=NoOpEngine()).execute_group(group)


def executor_with_everything_of(count: int) -> Program:
    assignments = [assignment(n, timeout_seconds=60, resource_claims=(f"r{n}",)) for n in range(count)]
    group = ParallelExecutionGroup(group_id="g", assignments=assignments, max_concurrency=AT_ONCE)

    async def program() -> None:
        executor = ParallelExecutor(
            engine=no_op, limiter=anyio.CapacityLimiter(AT_ONCE), progress_callback=lambda progress: None
        )
        await executor.execute_group(group)

    return program


def gather_of(count: int) -> Program:
    async def program() -> None:
        semaphore = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            async with semaphore:
                await no_op(number)

        await asyncio.gather(*(one(n) for n in range(count)))

    return program


def task_group_of(count: int) -> Program:
    async def program() -> None:
        limiter = anyio.CapacityLimiter(AT_ONCE)

        async def one(number: int) -> None:
            async with limiter:
                await no_op(number)

        async with anyio.create_task_group() as tasks:
            for n in range(count):
                tasks.start_soon(one, n)

    return program


def calls(program: Program, backend: str) -> int:
    """Return how many Python and C functions a program calls."""
    counted = 0

    def profile(_frame: object, event: str, _argument: object) -> None:
        nonlocal counted
        counted += event in ("call", "c_call")

    async def profiled() -> None:
        gc.collect()
        gc.disable()  # callbacks of the collector would be counted at random
        sys.setprofile(profile)
        try:
            await program()
        finally:
            sys.setprofile(None)
            gc.enable()

    anyio.run(profiled, backend=backend)
    return counted


def calls_per_agent(make: Peer, backend: str) -> float:
    calls(make(FEW), backend)  # what is done once in a process
    return (calls(make(MANY), backend) - calls(make(FEW), backend)) / (MANY - FEW)


def bytes_per_agent(make: Peer, backend: str) -> float:
    """Return the slope of the peak of memory, with all inputs made before."""

    def peak(count: int) -> int:
        program = make(count)
        kept: list[object] = []

        async def traced() -> None:
            gc.collect()
            tracemalloc.start()
            try:
                kept.append(await program())
                kept.append(tracemalloc.get_traced_memory()[1])
            finally:
                tracemalloc.stop()

        anyio.run(traced, backend=backend)
        return int(kept[-1])  # type: ignore[call-overload,no-any-return]

    peak(FEW)
    return (peak(MANY) - peak(FEW)) / (MANY - FEW)


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    name: str = request.param
    return name


def test_an_agent_costs_a_fraction_of_the_calls_of_a_task_in_a_group_with_a_limiter(backend: str) -> None:
    theirs = calls_per_agent(task_group_of, backend)
    for make, most in ((executor_of, 0.28), (executor_with_engine_of, 0.30)):
        ours = calls_per_agent(make, backend)
        assert ours <= most * theirs, f"{ours} calls per agent, {theirs} of a task group with a limiter"


def test_an_agent_costs_half_the_calls_of_gather_with_a_semaphore_and_gives_an_outcome_for_them() -> None:
    theirs = calls_per_agent(gather_of, "asyncio")
    for make, most in ((executor_of, 0.52), (executor_with_engine_of, 0.56)):
        ours = calls_per_agent(make, "asyncio")
        assert ours <= most * theirs, f"{ours} calls per agent, {theirs} of gather with a semaphore"


def test_with_everything_on_an_agent_costs_less_than_a_task_in_a_group_with_a_limiter(backend: str) -> None:
    ours, theirs = calls_per_agent(executor_with_everything_of, backend), calls_per_agent(task_group_of, backend)
    assert ours <= 0.56 * theirs, f"{ours} calls per agent, {theirs} of a task group with a limiter"


def test_an_outcome_with_its_result_is_kept_in_350_bytes(backend: str) -> None:
    ours = bytes_per_agent(executor_of, backend)
    assert ours < 350, f"{ours} bytes per agent"
    assert ours < 0.1 * bytes_per_agent(task_group_of, backend)


def live_tasks(backend: str) -> int:
    if backend == "asyncio":
        return len(asyncio.all_tasks())
    import trio  # noqa: PLC0415 - one session of the checks runs without it

    return trio.lowlevel.current_statistics().tasks_living


@pytest.mark.proves("X5")
def test_100_000_assignments_make_as_many_tasks_as_may_run(backend: str) -> None:
    group = group_of(100_000, max_concurrency=100)
    seen: set[int] = set()

    class Counting(NoOpEngine):
        async def run(self, task: AgentAssignment, /) -> AgentRunResult[None]:
            result = await super().run(task)
            if int(task.task_id[1:]) % 1_000 == 0:
                seen.add(live_tasks(backend))
            return result

    result: Any = anyio.run(ParallelExecutor(engine=Counting()).execute_group, group, backend=backend)
    assert result.all_succeeded
    assert max(seen) <= 100 + 5


@pytest.mark.proves("X4")
def test_none_of_100_000_agents_starts_after_a_failure_and_what_is_cancelled_is_what_ran(backend: str) -> None:
    started: list[str] = []

    async def program() -> Any:
        everybody = anyio.Event()

        async def agent(task: AgentAssignment) -> None:
            started.append(task.task_id)
            if len(started) == 100:
                everybody.set()
            await everybody.wait()
            if task.task_id == "t7":
                raise ValueError
            await anyio.sleep_forever()

        group = group_of(100_000, max_concurrency=100, fail_fast=True)
        return await ParallelExecutor(engine=agent).execute_group(group)

    result = anyio.run(program, backend=backend)
    assert len(started) == 100
    assert sum(outcome.started_after_seconds is not None for outcome in result.outcomes) == 100
