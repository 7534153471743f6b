"""Shutdown: what was asked to stop, what had time to, and what is cleaned up afterwards."""

import os
import signal
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from clocks import virtual_time
from groups import group_of

from parallel_agents import (
    AgentAssignment,
    CooperativeTimeout,
    ImmediateCancel,
    OutcomeStatus,
    ParallelExecutor,
    ShutdownInProgressError,
    ShutdownManager,
    current_run,
)

pytestmark = pytest.mark.anyio


@pytest.mark.proves("S1")
@virtual_time
async def test_after_the_request_nothing_starts_and_running_agents_have_the_grace_period() -> None:
    manager = ShutdownManager(CooperativeTimeout(grace_seconds=10))
    asked: list[bool] = []

    async def agent(task: AgentAssignment) -> str:
        if task.task_id == "t0":
            asked.append(current_run().shutdown_requested)
            while not current_run().shutdown_requested:
                await anyio.sleep(1)
            return "finished in time"
        await anyio.sleep(3600)
        raise AssertionError

    executor = ParallelExecutor(engine=agent, shutdown_manager=manager)
    async with executor.open_group(group_of(4, max_concurrency=2)) as run:
        await anyio.sleep(5)
        manager.request_shutdown()
        manager.request_shutdown()
        assert manager.is_shutting_down
    assert asked == [False]
    finished, cancelled, *rejected = run.result.outcomes
    assert finished.output == "finished in time"
    assert (cancelled.status, cancelled.error) == (OutcomeStatus.CANCELLED, "Cancelled: the program is shutting down")
    assert cancelled.duration_seconds == 15
    assert [(o.status, o.error) for o in rejected] == [(OutcomeStatus.REJECTED, "Shutdown in progress")] * 2
    assert [o.started_after_seconds for o in rejected] == [None, None]
    assert "is_shutting_down=True" in repr(manager)


@pytest.mark.proves("S1", "X10")
@virtual_time
async def test_an_agents_own_timeout_still_holds_in_the_grace_period() -> None:
    manager = ShutdownManager(CooperativeTimeout(grace_seconds=10))
    executor = ParallelExecutor(engine=lambda task: anyio.sleep(3600), shutdown_manager=manager)
    async with executor.open_group(group_of(1, each={"timeout_seconds": 3})) as run:
        await anyio.sleep(1)
        manager.request_shutdown()
    assert run.result.outcomes[0].error == "Timed out after 3 s"
    assert run.result.total_duration_seconds == 3


@pytest.mark.proves("S1")
async def test_immediate_cancel_grants_no_time() -> None:
    manager = ShutdownManager(ImmediateCancel())
    started = anyio.Event()

    async def agent(task: AgentAssignment) -> None:
        started.set()
        await anyio.sleep_forever()

    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agent, shutdown_manager=manager).open_group(group_of(1)) as run:
            await started.wait()
            manager.request_shutdown()
    assert run.result.outcomes[0].status is OutcomeStatus.CANCELLED


@pytest.mark.proves("S1")
async def test_a_group_that_comes_after_the_request_is_rejected_whole() -> None:
    manager = ShutdownManager()
    manager.request_shutdown()
    started: list[str] = []

    async def agent(task: AgentAssignment) -> None:
        started.append(task.task_id)

    with anyio.fail_after(5):
        result = await ParallelExecutor(engine=agent, shutdown_manager=manager).execute_group(group_of(2))
    assert started == []
    assert [o.status for o in result.outcomes] == [OutcomeStatus.REJECTED] * 2


@pytest.mark.proves("S2")
@virtual_time
async def test_initiating_a_shutdown_tells_what_became_of_the_agents_and_cleans_up_in_order() -> None:
    manager = ShutdownManager(CooperativeTimeout(grace_seconds=5))
    cleaned_up: list[str] = []

    async def slowly() -> None:
        await anyio.sleep(1)
        cleaned_up.append("slowly")

    manager.register_cleanup(slowly)
    manager.register_cleanup(lambda: cleaned_up.append("at once"))

    async def agent(task: AgentAssignment) -> None:
        await anyio.sleep(2 if task.task_id == "t0" else 3600)

    executor = ParallelExecutor(engine=agent, shutdown_manager=manager)
    async with executor.open_group(group_of(3, max_concurrency=2)):
        await anyio.sleep(1)
        result = await manager.initiate_shutdown()
    assert result.completed == ("g:t0",)
    assert result.interrupted == ("g:t1",)
    assert result.cleanup_finished
    assert cleaned_up == ["slowly", "at once"]
    with pytest.raises(ShutdownInProgressError, match="Shutdown in progress"):
        manager.register_cleanup(slowly)


@pytest.mark.proves("S2")
@virtual_time
@pytest.mark.parametrize("fault", ["raises", "hangs"])
async def test_a_callback_that_fails_does_not_stop_the_next_and_all_share_one_time_budget(fault: str) -> None:
    manager = ShutdownManager(ImmediateCancel(cleanup_seconds=3))
    cleaned_up: list[str] = []

    async def first() -> None:
        if fault == "raises":
            raise ValueError("on purpose")
        await anyio.sleep(2)

    async def second() -> None:
        cleaned_up.append("second")
        await anyio.sleep(0 if fault == "raises" else 2)
        cleaned_up.append("done")

    manager.register_cleanup(first)
    manager.register_cleanup(second)
    before = anyio.current_time()
    result = await manager.initiate_shutdown()
    assert not result.cleanup_finished
    assert cleaned_up == (["second", "done"] if fault == "raises" else ["second"])
    assert anyio.current_time() - before == (0 if fault == "raises" else 3)


@pytest.mark.proves("S2")
@virtual_time
async def test_cleaning_up_begins_when_the_last_of_several_groups_has_ended() -> None:
    manager = ShutdownManager()
    cleaned_up_at: list[float] = []
    manager.register_cleanup(lambda: cleaned_up_at.append(anyio.current_time()))
    executor = ParallelExecutor(
        engine=lambda task: anyio.sleep(float(task.timeout_seconds or 0) - 1), shutdown_manager=manager
    )
    before = anyio.current_time()
    async with anyio.create_task_group() as tasks:
        for seconds in (5, 9):
            group = group_of(1, each={"timeout_seconds": seconds})
            tasks.start_soon(executor.execute_group, group)
        await anyio.sleep(1)
        await manager.initiate_shutdown()
    assert cleaned_up_at == [before + 8]


@pytest.mark.proves("S2")
async def test_cleaning_up_is_done_although_the_wait_for_it_is_cancelled() -> None:
    manager = ShutdownManager()
    cleaned_up: list[str] = []

    async def callback() -> None:
        await anyio.lowlevel.checkpoint()
        cleaned_up.append("yes")

    manager.register_cleanup(callback)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await manager.initiate_shutdown()
    assert cleaned_up == ["yes"]


@pytest.mark.proves("S2")
@pytest.mark.parametrize("received", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_requests_a_shutdown_and_a_second_one_cancels_at_once(received: signal.Signals) -> None:
    manager = ShutdownManager(CooperativeTimeout(grace_seconds=3600))
    cleaned_up: list[str] = []
    manager.register_cleanup(lambda: cleaned_up.append("yes"))
    polite_started, stubborn_started = anyio.Event(), anyio.Event()

    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t0":
            polite_started.set()
            while not current_run().shutdown_requested:
                await anyio.sleep(0.001)
        else:
            stubborn_started.set()
            await anyio.sleep_forever()

    executor = ParallelExecutor(engine=agent, shutdown_manager=manager)
    with anyio.fail_after(10):
        async with manager.handle_signals(), executor.open_group(group_of(3, max_concurrency=2)) as run:
            await polite_started.wait()
            await stubborn_started.wait()
            os.kill(os.getpid(), received)
            async for outcome in run:
                if outcome.task_id == "t0":
                    break
            assert manager.received_signal is received
            assert cleaned_up == []
            os.kill(os.getpid(), signal.SIGTERM)
    assert [o.status for o in run.result.outcomes] == [
        OutcomeStatus.SUCCEEDED,
        OutcomeStatus.CANCELLED,
        OutcomeStatus.REJECTED,
    ]
    assert cleaned_up == ["yes"]
    assert manager.received_signal is received


async def test_without_a_signal_the_block_cleans_nothing_up() -> None:
    manager = ShutdownManager()
    called: list[Any] = []
    manager.register_cleanup(lambda: called.append(1))
    with anyio.fail_after(5):
        async with manager.handle_signals():
            pass
    assert called == []
    assert manager.received_signal is None
