"""Progress: snapshots at the start and at each start and end of an agent, and callbacks that misbehave."""

from typing import Any

import anyio
import anyio.lowlevel
import pytest
from groups import group_of
from hypothesis import given
from hypothesis import strategies as st

from parallel_agents import AgentAssignment, ParallelExecutor, ParallelProgress

pytestmark = pytest.mark.anyio


@pytest.mark.proves("P1", "P2")
async def test_there_is_a_snapshot_at_the_start_and_at_each_start_and_end_of_an_agent() -> None:
    snapshots: list[ParallelProgress] = []

    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t1":
            raise ValueError

    with anyio.fail_after(5):
        await ParallelExecutor(engine=agent, progress_callback=snapshots.append).execute_group(
            group_of(3, max_concurrency=1)
        )
    seen = [(p.completed, p.in_progress, p.succeeded, p.failed, p.pending) for p in snapshots]
    assert seen == [
        (0, 0, 0, 0, 3),
        (0, 1, 0, 0, 2),
        (1, 0, 1, 0, 2),
        (1, 1, 1, 0, 1),
        (2, 0, 1, 1, 1),
        (2, 1, 1, 1, 0),
        (3, 0, 2, 1, 0),
    ]


@pytest.mark.proves("P2")
async def test_only_agents_whose_engine_call_runs_are_in_progress() -> None:
    limiter = anyio.CapacityLimiter(1)
    running = 0

    def check(progress: ParallelProgress) -> None:
        assert progress.in_progress <= 1
        seen.append(progress.in_progress)

    async def agent(task: AgentAssignment) -> None:
        nonlocal running
        running += 1
        assert run.progress.in_progress == running == 1
        await anyio.lowlevel.checkpoint()
        running -= 1

    seen: list[int] = []
    with anyio.fail_after(5):
        executor = ParallelExecutor(engine=agent, limiter=limiter, progress_callback=check)
        async with executor.open_group(group_of(4)) as run:
            pass
    assert run.result.all_succeeded
    assert set(seen) == {0, 1}


@pytest.mark.proves("P1", "P2")
@given(
    endings=st.lists(st.sampled_from(["fine", "raise", "wait"]), min_size=1, max_size=6),
    limit=st.none() | st.integers(1, 3),
    fail_fast=st.booleans(),
)
async def test_counters_never_go_back_and_the_last_snapshot_is_complete(
    endings: list[str], limit: int | None, *, fail_fast: bool
) -> None:
    snapshots: list[ParallelProgress] = []

    async def agent(task: AgentAssignment) -> None:
        ending = endings[int(task.task_id[1:])]
        await anyio.lowlevel.checkpoint()
        if ending == "raise":
            raise ValueError
        if ending == "wait":
            await anyio.sleep(3600)

    group = group_of(len(endings), max_concurrency=limit, fail_fast=fail_fast)
    executor = ParallelExecutor(engine=agent, progress_callback=snapshots.append)
    with anyio.fail_after(5):
        async with executor.open_group(group) as run:
            for _ in range(30):
                await anyio.lowlevel.checkpoint()
            run.cancel()
    assert snapshots[0].pending == len(endings)
    assert snapshots[-1].completed == len(endings)
    for counter in ("completed", "succeeded", "failed", "parked"):
        values = [getattr(snapshot, counter) for snapshot in snapshots]
        assert values == sorted(values)
    assert snapshots[-1].succeeded == run.result.agents_succeeded
    assert snapshots[-1].failed == run.result.agents_failed


@pytest.mark.proves("P3")
async def test_what_a_callback_or_an_observer_raises_changes_nothing() -> None:
    errors: list[BaseException] = [ValueError("{not} a <format>")]
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.lowlevel.checkpoint()
        except BaseException as error:
            errors.append(error)
            raise
    raised = 0

    def callback(progress: ParallelProgress) -> None:
        nonlocal raised
        raised += 1
        raise errors[progress.completed % 2]

    class Observer:
        def on_event(self, event: Any) -> None:
            raise errors[1]

    async def agent(task: AgentAssignment) -> str:
        await anyio.lowlevel.checkpoint()
        return task.task_id

    with anyio.fail_after(5):
        executor = ParallelExecutor(engine=agent, progress_callback=callback, observers=[Observer()])
        result = await executor.execute_group(group_of(3))
    assert result.all_succeeded
    assert raised == 7


@pytest.mark.proves("P3")
async def test_a_callback_that_is_a_coroutine_function_is_refused_when_the_executor_is_made() -> None:
    async def callback(progress: ParallelProgress) -> None: ...

    with pytest.raises(TypeError, match="plain function"):
        ParallelExecutor(engine=lambda task: anyio.sleep(0), progress_callback=callback)
