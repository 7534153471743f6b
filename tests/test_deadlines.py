"""The watch over the deadlines of engine calls: each is cancelled when its time is over, and none before."""

import math

import anyio
import anyio.lowlevel
import pytest
from groups import assignment, group_of

from parallel_agents import AgentAssignment, OutcomeStatus, ParallelExecutionGroup, ParallelExecutor
from parallel_agents._deadlines import DeadlineWatch, WatchedScope

pytestmark = pytest.mark.anyio

virtual_time = pytest.mark.parametrize("anyio_backend", [pytest.param("trio-virtual", id="trio")], indirect=True)


async def sleeps_on(_task: AgentAssignment) -> None:
    await anyio.sleep_forever()


@pytest.mark.proves("X10")
@virtual_time
@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_each_agent_has_its_own_time_in_whatever_order_they_start(limit: int) -> None:
    seconds = [30, 10, 20, 5, 40]
    assignments = [assignment(n, timeout_seconds=s) for n, s in enumerate(seconds)]
    group = ParallelExecutionGroup(group_id="g", assignments=assignments, max_concurrency=limit)
    result = await ParallelExecutor(engine=sleeps_on).execute_group(group)
    assert [o.status for o in result.outcomes] == [OutcomeStatus.TIMED_OUT] * 5
    assert [o.duration_seconds for o in result.outcomes] == pytest.approx(seconds)


@pytest.mark.proves("X10")
async def test_agents_that_are_late_at_the_same_moment_are_all_cancelled() -> None:
    with anyio.fail_after(30):
        result = await ParallelExecutor(engine=sleeps_on).execute_group(group_of(50, each={"timeout_seconds": 0.01}))
    assert {o.error for o in result.outcomes} == {"Timed out after 0.01 s"}


@virtual_time
@pytest.mark.parametrize("time", [{"each": {"timeout_seconds": 60}}, {"deadline_seconds": 60}])
async def test_a_group_whose_agents_end_in_their_first_step_does_not_wait_for_its_watches(
    time: dict[str, float],
) -> None:
    async def at_once(_task: AgentAssignment) -> str:
        return "done"

    started = anyio.current_time()
    for _ in range(20):  # trio runs the tasks of a step in any order
        await ParallelExecutor(engine=at_once).execute_group(group_of(1, **time))  # type: ignore[arg-type]
    assert anyio.current_time() == started


@virtual_time
async def test_a_watch_looks_when_the_first_deadline_is_over_and_ends_when_there_is_none() -> None:
    started = anyio.current_time()
    scopes: list[WatchedScope] = []
    ended: list[float] = []
    watches = 0

    async def wait_until(deadline: float) -> None:
        with anyio.CancelScope() as scope:
            watched = WatchedScope(scope)
            scopes.append(watched)
            watched.deadline = deadline
            watch.tell(deadline)
            await anyio.sleep_forever()
        scopes.remove(watched)
        ended.append(anyio.current_time() - started)

    async def watching() -> None:
        nonlocal watches
        watches += 1
        await watch.run()
        watches -= 1

    async with anyio.create_task_group() as tasks:
        watch = DeadlineWatch(anyio.current_time, lambda: scopes, lambda: tasks.start_soon(watching))
        tasks.start_soon(wait_until, started + 3)
        await anyio.sleep(1)
        assert watch.looks_at == started + 3
        tasks.start_soon(wait_until, started + 5)
        await anyio.sleep(0.5)
        assert watch.looks_at == started + 3, "a later one does not matter now"
        tasks.start_soon(wait_until, started + 2)
        await anyio.sleep(1)
        assert (watches, watch.looks_at) == (1, started + 3)
        await anyio.sleep(5)
        assert (watches, watch.looks_at) == (0, math.inf)
        tasks.start_soon(wait_until, started + 10)
    assert ended == pytest.approx([2, 3, 5, 10])
    assert watches == 0
