"""Cancellation, timeouts, orders to end the program, and agents that spoil the task they ran in."""

import asyncio
import contextlib
import itertools
from typing import Any, cast

import anyio
import anyio.lowlevel
import pytest
from clocks import virtual_time
from groups import assignment, group_of

from parallel_agents import (
    AgentAssignment,
    AgentOutcome,
    OutcomeStatus,
    ParallelEvent,
    ParallelExecutionGroup,
    ParallelExecutor,
    _run,
    current_run,
)
from parallel_agents._traces import pending_cancellation, tasks_directly_in
from parallel_agents.events import PARALLEL_AGENT_START

pytestmark = pytest.mark.anyio


async def run(function: Any, group: Any, **options: Any) -> Any:
    with anyio.fail_after(5):
        return await ParallelExecutor(engine=function, **options).execute_group(group)


def runs_on_asyncio() -> bool:
    return anyio.get_cancelled_exc_class() is asyncio.CancelledError


async def raise_the_cancelled_exception() -> None:
    """Raise what a cancelled task raises, though nobody cancelled this one."""
    if runs_on_asyncio():
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future
    caught: list[BaseException] = []
    with anyio.CancelScope() as scope:
        scope.cancel()
        try:
            await anyio.lowlevel.checkpoint()
        except BaseException as error:
            caught.append(error)
            raise
    raise caught[0]


@pytest.mark.proves("X7")
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
async def test_an_order_to_end_the_program_stops_the_group_and_leaves_it_bare(kind: type[BaseException]) -> None:
    cleaned_up: list[str] = []

    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t1":
            raise kind("now")
        try:
            await anyio.sleep_forever()
        finally:
            cleaned_up.append(task.task_id)

    runs = []
    with pytest.raises(kind, match="now"), anyio.fail_after(5):
        async with ParallelExecutor(engine=agent).open_group(group_of(4, max_concurrency=2)) as open_run:
            runs.append(open_run)
    assert cleaned_up == ["t0"]
    statuses = [o.status for o in runs[0].result.outcomes]
    assert statuses == [
        OutcomeStatus.CANCELLED,
        OutcomeStatus.FAILED,
        OutcomeStatus.CANCELLED,
        OutcomeStatus.CANCELLED,
    ]
    assert runs[0].result.outcomes[0].error == f"Cancelled: agent 'a1' raised {kind.__name__}"


@pytest.mark.proves("X7")
async def test_an_order_to_end_from_a_callback_leaves_the_group_bare_too() -> None:
    def callback(progress: Any) -> None:
        if progress.completed:
            raise KeyboardInterrupt("callback")

    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t0":
            await anyio.sleep_forever()

    with pytest.raises(KeyboardInterrupt, match="callback"):
        await run(agent, group_of(3), progress_callback=callback)


@pytest.mark.proves("X7")
async def test_an_order_to_end_from_an_observer_leaves_the_group_bare_too() -> None:
    class Observer:
        def on_event(self, event: ParallelEvent, /) -> None:
            if event.name == PARALLEL_AGENT_START:
                raise SystemExit("observer")

    with pytest.raises(SystemExit, match="observer"):
        await run(lambda task: anyio.sleep_forever(), group_of(2), observers=[Observer()])


@pytest.mark.proves("X7")
async def test_an_order_to_end_in_the_block_of_an_open_group_leaves_it_bare() -> None:
    runs = []
    with pytest.raises(KeyboardInterrupt, match="block"):
        async with ParallelExecutor(engine=lambda task: anyio.sleep_forever()).open_group(group_of(2)) as open_run:
            runs.append(open_run)
            raise KeyboardInterrupt("block")
    assert [o.status for o in runs[0].result.outcomes] == [OutcomeStatus.CANCELLED] * 2


@pytest.mark.proves("X8", "X11")
async def test_a_cancelled_caller_waits_for_the_agents_cleanup_and_stays_cancelled() -> None:
    started = anyio.Event()
    cleaned_up: list[str] = []

    async def agent(task: AgentAssignment) -> str:
        if task.task_id == "t0":
            return "done"
        if task.task_id == "t2":
            started.set()
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                for _ in range(5):
                    await anyio.lowlevel.checkpoint()
                cleaned_up.append(task.task_id)
        raise AssertionError

    runs = []

    async def caller(scope: anyio.CancelScope) -> None:
        with scope:
            async with ParallelExecutor(engine=agent).open_group(group_of(4, max_concurrency=2)) as open_run:
                runs.append(open_run)
            raise AssertionError("the cancellation was swallowed")

    scope = anyio.CancelScope()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(caller, scope)
            await started.wait()
            scope.cancel()
    assert scope.cancelled_caught
    assert sorted(cleaned_up) == ["t1", "t2"]
    outcomes = runs[0].result.outcomes
    assert outcomes[0].output == "done"
    assert outcomes[1].error == "Cancelled: the caller was cancelled"
    assert outcomes[3].error == "Cancelled before it started: the caller was cancelled"


@pytest.mark.proves("X8")
async def test_a_caller_that_is_cancelled_inside_the_block_cancels_the_agents_too() -> None:
    runs = []
    with anyio.fail_after(5), anyio.CancelScope() as scope:
        async with ParallelExecutor(engine=lambda task: anyio.sleep_forever()).open_group(group_of(2)) as open_run:
            runs.append(open_run)
            while open_run.progress.in_progress < 2:
                await anyio.lowlevel.checkpoint()
            scope.cancel()
            await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert [o.error for o in runs[0].result.outcomes] == ["Cancelled: the caller was cancelled"] * 2


@pytest.mark.proves("X9")
async def test_what_an_agent_returned_stands_although_it_was_cancelled() -> None:
    started = anyio.Event()

    async def agent(task: AgentAssignment) -> str:
        if task.task_id == "t0":
            await started.wait()
            raise ValueError
        started.set()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            return "swallowed"
        raise AssertionError

    result = await run(agent, group_of(2, fail_fast=True))
    assert result.outcomes[1].status is OutcomeStatus.SUCCEEDED
    assert result.outcomes[1].output == "swallowed"


@pytest.mark.proves("X9", "X18")
@pytest.mark.parametrize("in_a_group", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 6])
async def test_an_agent_that_raises_the_cancelled_exception_itself_harms_nobody(in_a_group: bool, limit: int) -> None:
    async def agent(task: AgentAssignment) -> str:
        await anyio.lowlevel.checkpoint()
        if task.task_id in ("t0", "t3"):
            try:
                await raise_the_cancelled_exception()
            except BaseException as error:
                if in_a_group:
                    raise BaseExceptionGroup("tasks", [error]) from None
                raise
        await anyio.lowlevel.checkpoint()
        return task.task_id

    result = await run(agent, group_of(6, max_concurrency=limit))
    for outcome in result.outcomes:
        if outcome.task_id in ("t0", "t3"):
            assert outcome.status is OutcomeStatus.CANCELLED
            assert "by itself" in outcome.error
        else:
            assert outcome.output == outcome.task_id


@pytest.mark.proves("X2", "X9")
async def test_a_group_of_an_ordinary_and_a_cancelled_exception_is_an_ordinary_failure() -> None:
    async def agent(task: AgentAssignment) -> None:
        try:
            await raise_the_cancelled_exception()
        except BaseException as error:
            raise BaseExceptionGroup("tasks", [ValueError("real"), error]) from None

    result = await run(agent, group_of(2))
    assert [o.status for o in result.outcomes] == [OutcomeStatus.FAILED] * 2


@pytest.mark.proves("X10")
@virtual_time
async def test_a_timeout_cancels_the_agent_waits_for_its_cleanup_and_says_so() -> None:
    async def agent(task: AgentAssignment) -> str:
        if task.task_id == "t1":
            await anyio.sleep(2)
            return "in time"
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.5)
        raise AssertionError

    group = group_of(2, each={"timeout_seconds": 2.5})
    late, in_time = (await ParallelExecutor(engine=agent).execute_group(group)).outcomes
    assert (late.status, late.error) == (OutcomeStatus.TIMED_OUT, "Timed out after 2.5 s")
    assert late.duration_seconds == 3.0
    assert in_time.output == "in time"


@pytest.mark.proves("X10")
@virtual_time
async def test_time_in_the_queue_does_not_count_against_the_timeout() -> None:
    group = group_of(3, each={"timeout_seconds": 1.5}, max_concurrency=1)
    result = await ParallelExecutor(engine=lambda task: anyio.sleep(1)).execute_group(group)
    assert result.all_succeeded
    assert [o.started_after_seconds for o in result.outcomes] == [0.0, 1.0, 2.0]
    assert result.total_duration_seconds == 3.0


@pytest.mark.proves("X10")
async def test_an_agents_own_timeout_error_is_an_ordinary_failure() -> None:
    async def agent(task: AgentAssignment) -> None:
        with anyio.fail_after(0):
            await anyio.sleep_forever()

    (outcome,) = (await run(agent, group_of(1, each={"timeout_seconds": 60}))).outcomes
    assert (outcome.status, outcome.error) == (OutcomeStatus.FAILED, "TimeoutError (no message)")


@pytest.mark.proves("X10")
async def test_an_agent_that_blocked_past_its_time_and_then_raised_was_late_on_both_backends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ahead = 0.0

    async def agent(task: AgentAssignment) -> None:
        nonlocal ahead
        ahead = 100.0  # as if the agent had blocked the event loop for so long
        raise ValueError("too late")

    monkeypatch.setattr(_run, "_clock_of_the_loop", lambda: lambda: anyio.current_time() + ahead)
    (outcome,) = (
        await ParallelExecutor(engine=agent).execute_group(group_of(1, each={"timeout_seconds": 60}))
    ).outcomes
    assert outcome.status is OutcomeStatus.TIMED_OUT
    assert outcome.error == "Timed out after 60 s, then raised ValueError: too late"


@pytest.mark.proves("X10", "X18")
@virtual_time
async def test_a_timeout_of_one_agent_does_not_reach_the_next_on_the_same_worker() -> None:
    async def agent(task: AgentAssignment) -> None:
        await anyio.sleep(10 if task.task_id in ("t0", "t2") else 0.9)

    group = group_of(5, each={"timeout_seconds": 1}, max_concurrency=1)
    result = await ParallelExecutor(engine=agent).execute_group(group)
    assert [o.is_success for o in result.outcomes] == [False, True, False, True, True]


@pytest.mark.proves("X18")
@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("how", ["open", "cancelled", "deadline", "shielded", "cancelled by fail-fast"])
async def test_a_cancel_scope_left_open_harms_no_other_agent(how: str, limit: int) -> None:
    left_open: list[anyio.CancelScope] = []

    async def agent(task: AgentAssignment) -> str:
        if task.task_id == "t0":
            left_open.append(anyio.CancelScope(shield=how == "shielded").__enter__())
            if how == "cancelled":
                left_open[0].cancel()
            if how == "deadline":
                left_open[0].deadline = anyio.current_time() + 0.001
            if how == "cancelled by fail-fast":
                await anyio.sleep_forever()
            return "left it open"
        if how == "deadline":
            await anyio.sleep(0.01)
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        if how == "cancelled by fail-fast" and task.task_id == "t1":
            raise ValueError
        return "fine"

    if how == "cancelled by fail-fast":
        result = await run(agent, group_of(4, max_concurrency=2, fail_fast=True))
        assert result.outcomes[0].status is OutcomeStatus.CANCELLED
        assert result.outcomes[1].status is OutcomeStatus.FAILED
        return
    result = await run(agent, group_of(4, max_concurrency=limit))
    assert [o.output for o in result.outcomes] == ["left it open", "fine", "fine", "fine"]


@pytest.mark.proves("X18")
@pytest.mark.parametrize("backend_tells", [True, False])
async def test_a_scope_that_was_left_open_is_noticed_before_it_can_be_cancelled(
    backend_tells: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_open: list[anyio.CancelScope] = []

    async def agent(task: AgentAssignment) -> str:
        if task.task_id == "t0":
            left_open.append(anyio.CancelScope().__enter__())
        elif left_open:
            left_open.pop().cancel()
        await anyio.lowlevel.checkpoint()
        return "fine"

    if not backend_tells:
        not_a_scope: Any = None
        monkeypatch.setattr(_run, "tasks_directly_in", lambda scope: tasks_directly_in(not_a_scope))
    result = await run(agent, group_of(3, max_concurrency=1))
    assert [o.output for o in result.outcomes] == ["fine"] * 3


async def test_the_backend_tells_which_tasks_are_directly_in_a_scope() -> None:
    with anyio.CancelScope() as scope:
        inside = tasks_directly_in(scope)
        assert len(inside) == 1
        with anyio.CancelScope():
            assert not inside
        assert len(inside) == 1


@pytest.mark.parametrize("backend_tells", [True, False])
async def test_a_task_is_known_to_be_cancelled_from_its_scope_or_from_one_around_it(backend_tells: bool) -> None:
    task, not_a_scope = anyio.get_current_task(), cast("anyio.CancelScope", None)
    with anyio.CancelScope() as outer, anyio.CancelScope() as scope:
        is_cancelled = pending_cancellation(scope if backend_tells else not_a_scope, task)
        assert (is_cancelled == task.has_pending_cancellation) is not backend_tells
        assert not is_cancelled()
        outer.cancel()
        assert is_cancelled()
        scope.shield = True
        assert not is_cancelled()
        scope.cancel()
        assert is_cancelled()


async def test_what_a_scope_tells_of_its_cancellation_is_what_the_task_tells() -> None:
    task, flags = anyio.get_current_task(), list(itertools.product([False, True], repeat=3))
    for cancelled, shielded in itertools.product(flags, flags):
        with anyio.CancelScope() as outer, anyio.CancelScope() as middle, anyio.CancelScope() as inner:
            is_cancelled = pending_cancellation(inner, task)
            for scope, is_shielded, ends in zip((outer, middle, inner), shielded, cancelled, strict=True):
                scope.shield = is_shielded
                if ends:
                    scope.cancel()
                assert is_cancelled() == task.has_pending_cancellation()


@pytest.mark.proves("X18")
@pytest.mark.parametrize("anyio_backend", [pytest.param("asyncio", id="asyncio")], indirect=True)
async def test_a_native_cancellation_that_an_agent_took_back_too_late_strikes_no_other_agent() -> None:
    async def agent(task: AgentAssignment) -> str:
        await asyncio.sleep(0)
        if task.task_id == "t1":
            own = asyncio.current_task()
            assert own is not None
            own.cancel()
            own.uncancel()  # before Python 3.13 the next await is cancelled all the same
        return "fine"

    result = await run(agent, group_of(5, max_concurrency=1))
    assert [o.output for o in result.outcomes] == ["fine"] * 5


@pytest.mark.proves("X18")
@pytest.mark.parametrize("anyio_backend", [pytest.param("asyncio", id="asyncio")], indirect=True)
async def test_a_native_cancellation_beside_one_of_ours_is_no_other_agents_to_answer() -> None:
    started, requests = anyio.Event(), dict[str, int]()

    async def agent(task: AgentAssignment) -> None:
        own = asyncio.current_task()
        assert own is not None
        requests[task.task_id] = own.cancelling()
        if task.task_id == "t0":
            started.set()
            try:
                await anyio.sleep_forever()
            except asyncio.CancelledError:
                own.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)

    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agent).open_group(group_of(3, max_concurrency=1)) as open_run:
            await started.wait()
            open_run.cancel_task("t0")
    assert requests == dict.fromkeys(("t0", "t1", "t2"), 0)


@pytest.mark.proves("X18")
@pytest.mark.parametrize("anyio_backend", [pytest.param("asyncio", id="asyncio")], indirect=True)
@pytest.mark.parametrize("then", ["return", "await", "swallow"])
@pytest.mark.parametrize("limit", [1, 2])
async def test_a_native_cancel_of_its_own_task_is_one_outcome(then: str, limit: int) -> None:
    async def agent(task: AgentAssignment) -> str:
        await asyncio.sleep(0)
        if task.task_id == "t1":
            own = asyncio.current_task()
            assert own is not None
            own.cancel()
            if then == "await":
                await asyncio.sleep(0)
            if then == "swallow":
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0)
            return "spoiled"
        await asyncio.sleep(0)
        return "fine"

    result = await run(agent, group_of(5, max_concurrency=limit))
    spoiled: AgentOutcome[str] = result.outcomes[1]
    assert spoiled.status is (OutcomeStatus.CANCELLED if then == "await" else OutcomeStatus.SUCCEEDED)
    assert [o.output for o in result.outcomes if o is not spoiled] == ["fine"] * 4


@pytest.mark.proves("X18")
@pytest.mark.parametrize("anyio_backend", [pytest.param("asyncio", id="asyncio")], indirect=True)
async def test_a_native_cancel_of_a_worker_that_waits_for_a_slot_harms_nobody() -> None:
    limiter = anyio.CapacityLimiter(1)
    gate = anyio.Event()
    workers: list[asyncio.Task[Any] | None] = []

    async def agent(task: AgentAssignment) -> None:
        workers.append(asyncio.current_task())
        await gate.wait()

    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agent, limiter=limiter).open_group(group_of(3)) as open_run:
            while not limiter.statistics().tasks_waiting:
                await anyio.lowlevel.checkpoint()
            (waiting,) = (
                task for task in asyncio.all_tasks() - {*workers, asyncio.current_task()} if "worker" in task.get_name()
            )
            waiting.cancel()
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            gate.set()
    assert open_run.result.all_succeeded


@pytest.mark.proves("X9", "X18")
@pytest.mark.parametrize("anyio_backend", [pytest.param("asyncio", id="asyncio")], indirect=True)
@pytest.mark.parametrize("swallows", [False, True])
async def test_an_agent_does_not_inherit_the_cancellation_request_of_the_one_before_it(swallows: bool) -> None:
    async def fail() -> None:
        raise ValueError

    async def agent(task: AgentAssignment) -> None:
        own = asyncio.current_task()
        assert own is not None
        if task.task_id == "t0":
            own.cancel()
            with contextlib.suppress(asyncio.CancelledError) if swallows else contextlib.nullcontext():
                await asyncio.sleep(0)
            return
        assert own.cancelling() == 0
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail())

    first, second = (await run(agent, group_of(2, max_concurrency=1))).outcomes
    assert first.status is (OutcomeStatus.SUCCEEDED if swallows else OutcomeStatus.CANCELLED)
    assert second.error == "ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception)"


async def test_a_group_can_hold_every_kind_of_ending_at_once() -> None:
    async def agent(task: AgentAssignment) -> str:
        if task.task_id == "t0":
            raise ValueError
        if task.task_id == "t1":
            await raise_the_cancelled_exception()
        if task.task_id == "t2":
            await anyio.sleep_forever()
        return current_run().assignment.agent_id

    group = ParallelExecutionGroup(
        group_id="g", assignments=[assignment(n, timeout_seconds=0.001 if n == 2 else None) for n in range(4)]
    )
    result = await run(agent, group)
    assert [o.status for o in result.outcomes] == [
        OutcomeStatus.FAILED,
        OutcomeStatus.CANCELLED,
        OutcomeStatus.TIMED_OUT,
        OutcomeStatus.SUCCEEDED,
    ]
