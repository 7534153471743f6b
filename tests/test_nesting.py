"""Groups inside agents, and executors made before any event loop runs."""

from typing import Any

import anyio
import anyio.lowlevel
import pytest
from groups import assignment, group_of

from parallel_agents import (
    AgentAssignment,
    OutcomeStatus,
    ParallelAgentsError,
    ParallelExecutionGroup,
    ParallelExecutor,
    ResourceConflictError,
    ShutdownManager,
    current_run,
)
from parallel_agents._run import MAX_NESTING
from parallel_agents._slots import Slot


class Counting:
    """Counts the engine calls that run their own code, not those that wait for a nested group."""

    def __init__(self) -> None:
        self.running = self.peak = 0

    def __enter__(self) -> None:
        self.running += 1
        self.peak = max(self.peak, self.running)

    def __exit__(self, *_: object) -> None:
        self.running -= 1


async def leaf(task: AgentAssignment) -> str:
    await anyio.lowlevel.checkpoint()
    return task.task_id


MADE_AT_IMPORT = ParallelExecutor(engine=leaf, shutdown_manager=ShutdownManager())


@pytest.mark.proves("X16")
@pytest.mark.parametrize("claims", [(), ("r",)])
def test_an_executor_made_at_import_time_works_on_one_backend_after_the_other(claims: tuple[str, ...]) -> None:
    pytest.importorskip("trio")
    group = ParallelExecutionGroup(
        group_id="g", assignments=[assignment(n, resource_claims=claims if n == 0 else ()) for n in range(4)]
    )
    for backend in ("asyncio", "trio", "asyncio"):
        result = anyio.run(MADE_AT_IMPORT.execute_group, group, backend=backend)
        assert result.all_succeeded


@pytest.mark.anyio
@pytest.mark.proves("X17")
@pytest.mark.parametrize("open_it", [False, True])
@pytest.mark.parametrize("tokens", [1, 2])
async def test_nested_groups_on_one_limiter_end_and_the_bound_still_holds(tokens: int, open_it: bool) -> None:
    limiter = anyio.CapacityLimiter(tokens)
    counting = Counting()
    executor: ParallelExecutor

    async def agent(task: AgentAssignment) -> int:
        depth = int(current_run().group_id)
        with counting:
            await anyio.lowlevel.checkpoint()
        if depth < 4:
            nested = ParallelExecutionGroup(group_id=str(depth + 1), assignments=group_of(2).assignments)
            if open_it:
                async with executor.open_group(nested) as run:
                    assert [o.is_success async for o in run] == [True, True]
                outcomes = run.result.outcomes
            else:
                outcomes = (await executor.execute_group(nested)).outcomes
            assert all(o.is_success for o in outcomes)
        with counting:
            await anyio.lowlevel.checkpoint()
        return depth

    executor = ParallelExecutor(engine=agent, limiter=limiter)
    with anyio.fail_after(5):
        outer = ParallelExecutionGroup(group_id="1", assignments=group_of(3).assignments)
        result = await executor.execute_group(outer)
    result.raise_for_failures()
    assert counting.peak <= tokens
    assert limiter.borrowed_tokens == 0


@pytest.mark.anyio
@pytest.mark.proves("X17")
async def test_an_agent_may_wait_for_several_groups_side_by_side() -> None:
    limiter = anyio.CapacityLimiter(1)
    inner = ParallelExecutor(engine=leaf, limiter=limiter)

    async def agent(task: AgentAssignment) -> None:
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(inner.execute_group, group_of(2))

    with anyio.fail_after(5):
        result = await ParallelExecutor(engine=agent, limiter=limiter).execute_group(group_of(2))
    result.raise_for_failures()
    assert limiter.borrowed_tokens == 0


@pytest.mark.anyio
@pytest.mark.proves("X17")
async def test_a_group_without_the_limiter_in_between_does_not_keep_the_slot_of_the_outer_agent() -> None:
    limiter = anyio.CapacityLimiter(1)
    innermost = ParallelExecutor(engine=leaf, limiter=limiter)

    async def between(task: AgentAssignment) -> None:
        (await innermost.execute_group(group_of(2))).raise_for_failures()

    async def outermost(task: AgentAssignment) -> None:
        (await ParallelExecutor(engine=between).execute_group(group_of(2))).raise_for_failures()

    with anyio.fail_after(5):
        result = await ParallelExecutor(engine=outermost, limiter=limiter).execute_group(group_of(2))
    result.raise_for_failures()


@pytest.mark.anyio
@pytest.mark.proves("X17", "X8")
async def test_a_cancelled_agent_that_waits_for_a_nested_group_gives_everything_back() -> None:
    limiter = anyio.CapacityLimiter(1)
    started = anyio.Event()
    ended: list[str] = []

    async def inner(task: AgentAssignment) -> None:
        started.set()
        try:
            await anyio.sleep_forever()
        finally:
            ended.append(task.task_id)

    async def agent(task: AgentAssignment) -> None:
        await ParallelExecutor(engine=inner, limiter=limiter).execute_group(group_of(2))

    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agent, limiter=limiter).open_group(group_of(2)) as run:
            await started.wait()
            run.cancel()
    assert [o.status for o in run.result.outcomes] == [OutcomeStatus.CANCELLED] * 2
    assert ended == ["t0"]
    assert limiter.borrowed_tokens == 0


@pytest.mark.anyio
@pytest.mark.proves("X17")
async def test_groups_that_are_nested_too_deep_are_refused_at_once() -> None:
    depths: list[int] = []
    executor: ParallelExecutor

    async def agent(task: AgentAssignment) -> None:
        depths.append(len(depths) + 1)
        (await executor.execute_group(group_of(1))).raise_for_failures()

    executor = ParallelExecutor(engine=agent, limiter=anyio.CapacityLimiter(1))
    with anyio.fail_after(5):
        (outcome,) = (await executor.execute_group(group_of(1))).outcomes
    assert len(depths) == MAX_NESTING == 32
    error: Any = outcome.exception
    while hasattr(error, "exceptions"):
        error = error.exceptions[0].outcome.exception
    assert isinstance(error, ParallelAgentsError)
    assert "33 deep" in str(error)


@pytest.mark.anyio
@pytest.mark.proves("X17", "L2")
@pytest.mark.parametrize("share_the_lock", [False, True])
async def test_claiming_what_an_enclosing_assignment_holds_is_an_error_at_once(share_the_lock: bool) -> None:
    async def inner_agent(task: AgentAssignment) -> None: ...

    executor: Any = None

    async def agent(task: AgentAssignment) -> None:
        nested = ParallelExecutionGroup(group_id="n", assignments=[assignment(7, resource_claims=("r",))])
        if task.agent_id == "a0":
            await executor.execute_group(nested)

    inner = ParallelExecutor(engine=inner_agent)
    group = group_of(1, each={"resource_claims": ("r",)})
    outer = ParallelExecutor(engine=agent)
    executor = outer if share_the_lock else inner
    with anyio.fail_after(5):
        (outcome,) = (await outer.execute_group(group)).outcomes
    error = outcome.exception
    assert isinstance(error, ResourceConflictError)
    assert (error.resource, error.holder, error.claimant) == ("r", "a0", "a7")


@pytest.mark.anyio
async def test_a_slot_that_was_given_back_is_not_taken_again_by_a_loan_that_ends_late() -> None:
    limiter = anyio.CapacityLimiter(1)
    slot = Slot(limiter, owner=None)
    assert slot.take_nowait()
    assert not Slot(limiter, owner=None).take_nowait()
    async with slot.lent(), slot.lent():
        assert limiter.borrowed_tokens == 0
        slot.give_back()
    assert limiter.borrowed_tokens == 0
