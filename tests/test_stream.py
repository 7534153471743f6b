"""Streams: assignments that come one after another, lazily, and outcomes that are taken one after another."""

import tracemalloc
from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import wait_all_tasks_blocked
from clocks import virtual_time
from groups import assignment

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    Budget,
    ClaimPolicy,
    FunctionEngine,
    InMemoryResourceLock,
    OutcomeStatus,
    ParallelExecutionError,
    ParallelExecutor,
    ShutdownManager,
    Task,
    Usage,
    current_run,
)

pytestmark = pytest.mark.anyio


async def fine(task: AgentAssignment) -> str:
    await anyio.lowlevel.checkpoint()
    return task.task_id


class Source:
    """Counts what is pulled, and whether it was closed."""

    def __init__(self, total: int | None = None, **fields: Any) -> None:
        self.total = total
        self.fields = fields
        self.pulled = 0
        self.is_closed = False

    def __iter__(self) -> Iterator[AgentAssignment]:
        for number in count():
            if number == self.total:
                return
            self.pulled += 1
            yield assignment(number, **self.fields)

    async def asynchronously(self) -> AsyncIterator[AgentAssignment]:
        try:
            for item in self:
                await anyio.lowlevel.checkpoint()
                yield item
        finally:
            self.is_closed = True


async def taken(executor: ParallelExecutor, source: Any, **given: Any) -> list[Any]:
    options: dict[str, Any] = {"group_id": "s", "max_concurrency": 3, **given}
    with anyio.fail_after(100):
        async with executor.open_stream(source, **options) as outcomes:
            return [outcome async for outcome in outcomes]


@pytest.mark.proves("X1", "X5")
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_each_assignment_has_one_outcome_and_no_more_run_than_the_limit(*, asynchronous: bool) -> None:
    running = most = 0
    three = anyio.Event()

    async def agent(task: AgentAssignment) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        if running == 3:
            three.set()
        await three.wait()
        running -= 1
        if task.task_id == "t7":
            raise ValueError
        return task.task_id

    source = Source(50)
    outcomes = await taken(ParallelExecutor(engine=agent), source.asynchronously() if asynchronous else source)
    assert sorted(outcome.task_id for outcome in outcomes) == sorted(f"t{n}" for n in range(50))
    assert [outcome.task_id for outcome in outcomes if not outcome.is_success] == ["t7"]
    assert most == 3
    assert source.is_closed == asynchronous


async def test_a_source_may_be_any_asynchronous_iterable() -> None:
    class Numbers:
        def __init__(self) -> None:
            self.left = 3

        def __aiter__(self) -> "Numbers":
            return self

        async def __anext__(self) -> AgentAssignment:
            await anyio.lowlevel.checkpoint()
            if not self.left:
                raise StopAsyncIteration
            self.left -= 1
            return assignment(self.left)

    assert len(await taken(ParallelExecutor(engine=fine), Numbers())) == 3


async def test_nothing_is_pulled_before_an_agent_can_start_nor_while_outcomes_wait_to_be_taken() -> None:
    go_on = anyio.Event()

    async def agent(task: AgentAssignment) -> None:
        await go_on.wait()

    source = Source()
    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agent).open_stream(source, group_id="s", max_concurrency=3) as outcomes:
            await wait_all_tasks_blocked()
            assert source.pulled == 3
            assert (outcomes.progress.total, outcomes.progress.in_progress) == (3, 3)
            go_on.set()
            await wait_all_tasks_blocked()
            assert source.pulled <= 6
            for _ in range(10):
                assert (await anext(outcomes)).is_success
            await wait_all_tasks_blocked()
            assert 10 < source.pulled <= 16


@pytest.mark.proves("X8", "X11")
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_leaving_early_cancels_what_runs_and_closes_the_source(*, asynchronous: bool) -> None:
    ended: list[str] = []

    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t0":
            return
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(task.task_id)

    source = Source()
    executor = ParallelExecutor(engine=agent)
    with anyio.fail_after(5):
        async with executor.open_stream(
            source.asynchronously() if asynchronous else source, group_id="s", max_concurrency=3
        ) as outcomes:
            async for outcome in outcomes:
                assert outcome.task_id == "t0"
                break
            await wait_all_tasks_blocked()
    assert len(ended) == 3
    assert source.is_closed == asynchronous


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_source_that_raises_ends_the_stream_with_its_error_after_what_runs_was_cancelled(
    *, asynchronous: bool
) -> None:
    def plain() -> Iterator[AgentAssignment]:
        yield assignment(0)
        yield assignment(1)
        raise OSError("the queue is gone")

    async def asynchronously() -> AsyncIterator[AgentAssignment]:
        for item in plain():
            await anyio.lowlevel.checkpoint()
            yield item

    async def agent(task: AgentAssignment) -> None:
        await anyio.sleep_forever()

    outcomes = []
    with anyio.fail_after(5):
        executor = ParallelExecutor(engine=agent)
        with pytest.raises(OSError, match="the queue is gone"):
            async with executor.open_stream(
                asynchronously() if asynchronous else plain(), group_id="s", max_concurrency=3
            ) as stream:
                outcomes += [outcome async for outcome in stream]
    outcomes = []
    with anyio.fail_after(5), pytest.raises(OSError, match="the queue is gone"):
        async with executor.open_stream(plain(), group_id="s", max_concurrency=3) as stream:
            async for outcome in stream:
                outcomes.append(outcome)
    assert {outcome.status for outcome in outcomes} <= {OutcomeStatus.CANCELLED}
    assert len(outcomes) == 2
    assert all("the source of the assignments raised OSError" in str(outcome.error) for outcome in outcomes)


@pytest.mark.parametrize(
    ("items", "error", "said"),
    [
        (["text"], TypeError, "needs AgentAssignments, got 'text'"),
        ([assignment(0), assignment(0)], ValueError, "Duplicate task IDs: t0 is in flight already"),
        (
            [assignment(0), AgentAssignment(identity=AgentIdentity(id="a0"), task=Task(id="x"))],
            ValueError,
            "Duplicate agent IDs: a0 is in flight already",
        ),
        (
            [AgentAssignment(identity=AgentIdentity(id="a"), task=Task(id="x", depends_on=["y"]))],
            ValueError,
            "depends on others",
        ),
    ],
)
async def test_what_a_stream_cannot_run_ends_it(items: list[Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        await taken(ParallelExecutor(engine=fine), items)


async def test_an_engine_may_refuse_an_assignment_of_a_stream() -> None:
    class Picky(FunctionEngine):
        def check(self, assignment: AgentAssignment) -> None:
            if assignment.task_id == "t1":
                raise ValueError("not this one")

    outcomes = await taken(ParallelExecutor(engine=Picky(fine)), Source(3))
    assert {o.task_id: o.error for o in outcomes} == {"t0": None, "t1": "ValueError: not this one", "t2": None}


@pytest.mark.proves("L3", "L4")
@pytest.mark.parametrize("policy", ClaimPolicy)
async def test_claims_in_a_stream_are_taken_when_an_assignment_starts(policy: ClaimPolicy) -> None:
    lock = InMemoryResourceLock()
    outside = await lock.acquire("r", "outsider")
    assert outside
    executor = ParallelExecutor(engine=fine, resource_lock=lock)
    outcomes = []
    with anyio.fail_after(5):
        async with executor.open_stream(
            Source(3, resource_claims=("r",)), group_id="s", max_concurrency=2, claim_policy=policy
        ) as stream:
            if policy is ClaimPolicy.WAIT:
                await wait_all_tasks_blocked()
                await lock.release("r", "outsider")
            outcomes = [outcome async for outcome in stream]
    rejected = policy is ClaimPolicy.REJECT
    assert {o.status for o in outcomes} == {OutcomeStatus.REJECTED if rejected else OutcomeStatus.SUCCEEDED}
    assert len(outcomes) == 3
    if rejected:
        assert outcomes[0].error == "Claim not to be had: 'r' is held by 'outsider'"
    assert lock.is_locked("r") == rejected


@pytest.mark.proves("L3")
@virtual_time
async def test_time_to_wait_for_claims_is_limited_in_a_stream_as_well() -> None:
    """Each of three in turn holds the file for three seconds; then nobody waits for a while; then again."""
    seconds = {"t0": 3, "t1": 3, "t2": 3, "t3": 20, "t4": 3, "t5": 3}

    async def agent(task: AgentAssignment) -> None:
        await anyio.sleep(seconds[task.task_id])

    def items() -> Iterator[AgentAssignment]:
        for number in range(6):
            yield assignment(number, resource_claims=() if number == 3 else ("r",))

    outcomes = await taken(
        ParallelExecutor(engine=agent), items(), claim_policy=ClaimPolicy.WAIT, claim_timeout_seconds=5
    )
    statuses = {outcome.task_id: outcome.status for outcome in outcomes}
    assert len(statuses) == 6
    late = [task_id for task_id, status in statuses.items() if status is OutcomeStatus.REJECTED]
    assert late == ["t2"]
    assert all(o.is_success for o in outcomes if o.task_id != "t2")


@pytest.mark.proves("L3")
@virtual_time
async def test_one_watch_is_enough_for_all_that_wait_in_a_stream() -> None:
    tasks = 0

    async def agent(task: AgentAssignment) -> None:
        nonlocal tasks
        await anyio.sleep(1 if int(task.task_id[1:]) % 2 == 0 else 0.5)
        tasks = max(tasks, len(anyio.get_running_tasks()))

    outcomes = await taken(
        ParallelExecutor(engine=agent),
        (assignment(number, resource_claims=(f"r{number // 2}",)) for number in range(40)),
        max_concurrency=2,
        claim_policy=ClaimPolicy.WAIT,
        claim_timeout_seconds=1_000,
    )
    assert all(outcome.is_success for outcome in outcomes)
    assert tasks < 8


@pytest.mark.proves("X4", "X14")
@virtual_time
@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"fail_fast": True}, 3),
        ({"stop_after_successes": 4}, 8),
        ({"budget": Budget(max_cost=4)}, 8),
        ({"deadline_seconds": 2.5}, 9),
    ],
)
async def test_what_stops_a_group_stops_a_stream(options: dict[str, Any], most: int) -> None:
    async def agent(task: AgentAssignment) -> None:
        await anyio.sleep(1)
        current_run().record_usage(Usage(cost=1))
        if "fail_fast" in options:
            raise ValueError

    source = Source()
    outcomes = await taken(ParallelExecutor(engine=agent), source, **options)
    assert source.pulled <= most
    assert len(outcomes) == source.pulled


@pytest.mark.proves("S1")
async def test_a_shutdown_ends_a_stream() -> None:
    manager = ShutdownManager()

    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t3":
            manager.request_shutdown()
        await anyio.lowlevel.checkpoint()

    source = Source()
    outcomes = await taken(ParallelExecutor(engine=agent, shutdown_manager=manager), source)
    assert len(outcomes) == source.pulled
    with anyio.fail_after(5):
        assert (await manager.initiate_shutdown()).cleanup_finished


@pytest.mark.proves("X6", "X7")
async def test_what_is_fatal_in_a_group_is_fatal_in_a_stream() -> None:
    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t1":
            raise MemoryError

    with pytest.raises(ParallelExecutionError) as caught:
        await taken(ParallelExecutor(engine=agent), Source(4))
    assert caught.value.result.outcomes == ()

    def interrupted() -> Iterator[AgentAssignment]:
        yield assignment(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await taken(ParallelExecutor(engine=fine), interrupted())


@pytest.mark.proves("X8")
async def test_cancelling_the_caller_ends_the_stream() -> None:
    async def agent(task: AgentAssignment) -> None:
        await anyio.sleep_forever()

    source = Source()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(taken, ParallelExecutor(engine=agent), source)
            await wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
    assert source.pulled == 3


async def test_tasks_in_flight_can_be_cancelled_by_their_ids() -> None:
    agents: list[str] = []

    async def agent(task: AgentAssignment) -> None:
        agents.append(task.task_id)
        if task.task_id == "t1":
            await anyio.sleep_forever()

    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agent).open_stream(Source(3), group_id="s", max_concurrency=1) as stream:
            assert (await anext(stream)).task_id == "t0"
            await wait_all_tasks_blocked()
            with pytest.raises(KeyError, match="has no task 't0' in flight"):
                stream.cancel_task("t0")
            assert stream.cancel_task("t1")
            assert [outcome.status async for outcome in stream] == [OutcomeStatus.CANCELLED, OutcomeStatus.SUCCEEDED]


async def test_a_stream_needs_a_limit() -> None:
    executor = ParallelExecutor(engine=fine)
    with pytest.raises(ValueError, match="max_concurrency must be given"):
        await taken(executor, Source(1), max_concurrency=None)


async def test_memory_does_not_grow_with_the_number_of_assignments() -> None:
    executor = ParallelExecutor(engine=fine)

    async def peak(total: int) -> int:
        tracemalloc.start()
        try:
            async with executor.open_stream(Source(total), group_id="s", max_concurrency=10) as stream:
                async for _ in stream:
                    pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    await peak(200)
    small = await peak(500)
    assert await peak(5_000) < small * 1.3
