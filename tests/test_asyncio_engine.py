"""AsyncioEngine: agents that are written for asyncio, on asyncio and beside trio."""

import asyncio
import contextlib
import gc
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from groups import group_of

from parallel_agents import (
    AgentAssignment,
    AgentOutcome,
    AgentRunResult,
    Budget,
    CooperativeTimeout,
    Observer,
    OutcomeStatus,
    ParallelEvent,
    ParallelExecutionError,
    ParallelExecutor,
    ShutdownManager,
    TerminationReason,
    Usage,
    current_run,
)
from parallel_agents.engines.asyncio import AsyncioEngine
from parallel_agents.events import ASYNCIO_AGENT_LEFT, PARALLEL_AGENT_RETRY
from parallel_agents.testing import cancel_at_every_checkpoint

pytestmark = pytest.mark.anyio

Agent = Callable[[AgentAssignment], Awaitable[Any]]


class Notes(Observer):
    def __init__(self) -> None:
        self.events: list[ParallelEvent] = []

    def on_event(self, event: ParallelEvent) -> None:
        self.events.append(event)


async def outcome_of(
    agent: Agent, *, group: Any = None, cleanup_seconds: float = 5.0, **options: Any
) -> AgentOutcome[Any]:
    engine = AsyncioEngine(agent, cleanup_seconds=cleanup_seconds)
    with anyio.fail_after(60):
        result = await ParallelExecutor(engine=engine, **options).execute_group(group or group_of(1))
    return result.outcomes[0]


async def cancelled_outcome(agent: Agent, started: threading.Event, **options: Any) -> AgentOutcome[Any]:
    """Return the outcome of an agent that is cancelled when it has set *started*."""
    engine = AsyncioEngine(agent, **options)
    with anyio.fail_after(60):
        async with ParallelExecutor(engine=engine).open_group(group_of(1)) as run:
            await anyio.to_thread.run_sync(started.wait)
            run.cancel()
    assert run.result is not None
    return run.result.outcomes[0]


async def test_an_agent_runs_in_an_asyncio_task_of_its_own() -> None:
    async def agent(assignment: AgentAssignment) -> str:
        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            children = [tasks.create_task(asyncio.sleep(0, n)) for n in (1, 2)]
        await anyio.lowlevel.checkpoint()  # anyio's own code finds asyncio here, too
        tasks_of_agents.append(asyncio.current_task())
        return f"{assignment.task_id}: {sum(child.result() for child in children)}"

    tasks_of_agents: list[object] = []
    result = await ParallelExecutor(engine=AsyncioEngine(agent)).execute_group(group_of(2, max_concurrency=1))
    assert [outcome.output for outcome in result.outcomes] == ["t0: 3", "t1: 3"]
    assert len(set(tasks_of_agents)) == 2


async def test_a_result_of_its_own_has_the_last_word() -> None:
    async def agent(assignment: AgentAssignment) -> AgentRunResult[str]:
        return AgentRunResult(
            task_id=assignment.task_id,
            agent_id=assignment.agent_id,
            termination_reason=TerminationReason.MAX_TURNS,
            output="so far",
        )

    outcome = await outcome_of(agent)
    assert outcome.status is OutcomeStatus.FAILED
    assert outcome.output == "so far"


@pytest.mark.proves("X2")
async def test_what_an_agent_raises_is_its_outcome() -> None:
    async def agent(assignment: AgentAssignment) -> None:
        await asyncio.sleep(0)
        raise OSError("disk gone")

    outcome = await outcome_of(agent)
    assert outcome.error == "OSError: disk gone"
    assert outcome.exception is not None
    names = []
    traceback = outcome.exception.__traceback__
    while traceback is not None:
        names.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    assert names[-1] == "agent"


@pytest.mark.proves("X6")
async def test_a_fatal_error_is_one() -> None:
    async def agent(assignment: AgentAssignment) -> None:
        raise MemoryError("all of it")

    with pytest.raises(ParallelExecutionError) as caught:
        await outcome_of(agent)
    assert caught.value.result.outcomes[0].error == "Fatal: MemoryError: all of it"


@pytest.mark.proves("X7")
@pytest.mark.parametrize("order", [KeyboardInterrupt, SystemExit])
async def test_an_order_to_end_the_program_leaves_bare(order: type[BaseException]) -> None:
    async def agent(assignment: AgentAssignment) -> None:
        await asyncio.sleep(0)
        raise order

    with pytest.raises(order):
        await outcome_of(agent)


# Cancelling


async def test_cleanup_that_awaits_is_not_cut_off() -> None:
    started = threading.Event()
    steps: list[str] = []

    async def agent(assignment: AgentAssignment) -> None:
        try:
            started.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            steps.append("cancelled")
            for _ in range(20):
                await asyncio.sleep(0)
            task = asyncio.current_task()
            assert task is not None
            steps.append(f"cleaned up after {task.cancelling()}")
            raise

    outcome = await cancelled_outcome(agent, started)
    assert outcome.status is OutcomeStatus.CANCELLED
    assert steps == ["cancelled", "cleaned up after 1"]


@pytest.mark.proves("X9")
async def test_what_an_agent_returns_all_the_same_is_its_result() -> None:
    started = threading.Event()

    async def agent(assignment: AgentAssignment) -> str:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.sleep(0)
        return "saved"

    outcome = await cancelled_outcome(agent, started)
    assert outcome.status is OutcomeStatus.SUCCEEDED
    assert outcome.output == "saved"


async def test_what_cleanup_raises_is_the_outcome() -> None:
    started = threading.Event()

    async def agent(assignment: AgentAssignment) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError("not closed")

    outcome = await cancelled_outcome(agent, started)
    assert outcome.error == "OSError: not closed"


async def test_an_agent_that_does_not_end_is_left_to_itself_and_told_about() -> None:
    started, notes = threading.Event(), Notes()
    ended: list[int] = []

    async def agent(assignment: AgentAssignment) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(1)

    engine = AsyncioEngine(agent, cleanup_seconds=0.01)
    with anyio.fail_after(60):
        async with ParallelExecutor(engine=engine, observers=[notes]).open_group(group_of(1)) as run:
            await anyio.to_thread.run_sync(started.wait)
            run.cancel()
    assert run.result is not None
    assert run.result.outcomes[0].status is OutcomeStatus.CANCELLED
    (left,) = [event for event in notes.events if event.name == ASYNCIO_AGENT_LEFT]
    assert (left.task_id, left.fields["cleanup_seconds"]) == ("t0", 0.01)
    assert ended == []


async def test_what_an_agent_raises_after_it_was_left_is_no_news(caplog: pytest.LogCaptureFixture) -> None:
    started, go, ended = threading.Event(), threading.Event(), threading.Event()

    async def agent(assignment: AgentAssignment) -> None:
        started.set()
        while not go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(ended.set)
        raise OSError("too late")

    status = (await cancelled_outcome(agent, started, cleanup_seconds=0.01)).status  # its exception knows the task
    assert status is OutcomeStatus.CANCELLED
    go.set()
    with anyio.fail_after(60):
        await anyio.to_thread.run_sync(ended.wait)
    for _ in range(3):
        await anyio.lowlevel.checkpoint()
        gc.collect()
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.proves("X9")
async def test_an_agent_that_cancels_itself_harms_nobody() -> None:
    async def agent(assignment: AgentAssignment) -> str:
        if assignment.task_id == "t1":
            return "fine"
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)
        return ""

    with anyio.fail_after(60):
        result = await ParallelExecutor(engine=AsyncioEngine(agent)).execute_group(group_of(2))
    assert [outcome.status for outcome in result.outcomes] == [OutcomeStatus.CANCELLED, OutcomeStatus.SUCCEEDED]
    assert result.outcomes[0].error == "Cancelled by itself: the agent raised the backend's cancelled exception"


@pytest.mark.proves("X10")
async def test_a_late_agent_is_cancelled_and_waited_for() -> None:
    ended: list[int] = []

    async def agent(assignment: AgentAssignment) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(1)

    outcome = await outcome_of(agent, group=group_of(1, each={"timeout_seconds": 0.01}))
    assert outcome.status is OutcomeStatus.TIMED_OUT
    assert ended == [1]


@pytest.mark.proves("X4")
async def test_the_first_failure_cancels_all() -> None:
    waiting: list[str] = []
    ended: list[str] = []
    all_wait = threading.Event()

    async def agent(assignment: AgentAssignment) -> None:
        if assignment.task_id == "t49":
            while not all_wait.is_set():
                await asyncio.sleep(0)
            raise OSError("first")
        try:
            waiting.append(assignment.task_id)
            if len(waiting) == 49:
                all_wait.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(assignment.task_id)

    with anyio.fail_after(60):
        result = await ParallelExecutor(engine=AsyncioEngine(agent)).execute_group(group_of(50, fail_fast=True))
    statuses = [outcome.status for outcome in result.outcomes]
    assert statuses == [OutcomeStatus.CANCELLED] * 49 + [OutcomeStatus.FAILED]
    assert sorted(ended) == sorted(waiting)


@pytest.mark.proves("X8")
async def test_a_cancelled_caller_waits_for_its_agents() -> None:
    started = threading.Event()
    ended: list[int] = []

    async def agent(assignment: AgentAssignment) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(1)

    with anyio.fail_after(60), anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ParallelExecutor(engine=AsyncioEngine(agent)).execute_group, group_of(1))
            await anyio.to_thread.run_sync(started.wait)
            scope.cancel()
    assert scope.cancelled_caught
    assert ended == [1]


async def test_3000_instant_calls_at_once() -> None:
    async def agent(assignment: AgentAssignment) -> str:
        return assignment.task_id

    with anyio.fail_after(60):
        result = await ParallelExecutor(engine=AsyncioEngine(agent)).execute_group(group_of(3_000))
    assert [outcome.output for outcome in result.outcomes] == [f"t{number}" for number in range(3_000)]


# What agents see of their run

request_id: ContextVar[str] = ContextVar("request_id")


@pytest.mark.proves("X13")
async def test_context_variables_are_those_of_the_call_and_changes_stay_inside() -> None:
    async def agent(assignment: AgentAssignment) -> str:
        seen = request_id.get()
        request_id.set("changed")
        return seen

    request_id.set("r-1")
    assert (await outcome_of(agent)).output == "r-1"
    assert request_id.get() == "r-1"


async def test_the_run_can_be_asked_and_told() -> None:
    notes, started = Notes(), threading.Event()
    manager = ShutdownManager(CooperativeTimeout(grace_seconds=60))

    async def agent(assignment: AgentAssignment) -> list[Any]:
        run = current_run()
        before = (run.group_id, run.attempt, run.shutdown_requested, run.budget_exhausted, dict(run.upstream))
        watched: list[Usage] = []
        with run.watching_usage(watched.append), run.not_charged():
            run.record_usage(Usage(input_tokens=10))
        run.emit(PARALLEL_AGENT_RETRY, attempt=1, wait_seconds=0.0, error="again")
        started.set()
        while not run.shutdown_requested:
            await asyncio.sleep(0)
        return [before, watched, run.usage]

    executor = ParallelExecutor(engine=AsyncioEngine(agent), observers=[notes], shutdown_manager=manager)
    with anyio.fail_after(60):
        async with executor.open_group(group_of(1)) as group:
            await anyio.to_thread.run_sync(started.wait)
            manager.request_shutdown()
    assert group.result is not None
    (outcome,) = group.result.outcomes
    spent = Usage(input_tokens=10)
    assert outcome.output == [("g", 1, False, False, {}), [spent], spent]
    assert outcome.usage == Usage(input_tokens=10)
    assert [event.task_id for event in notes.events if event.name == PARALLEL_AGENT_RETRY] == ["t0"]


@pytest.mark.proves("X14")
async def test_usage_counts_towards_the_budget_while_an_agent_runs() -> None:
    async def agent(assignment: AgentAssignment) -> bool:
        run = current_run()
        run.record_usage(Usage(input_tokens=10))
        while not run.budget_exhausted:
            await asyncio.sleep(0)
        return True

    outcome = await outcome_of(agent, group=group_of(1, budget=Budget(max_tokens=10)))
    assert outcome.output is True


async def test_usage_is_kept_when_an_agent_is_cancelled() -> None:
    started = threading.Event()

    async def agent(assignment: AgentAssignment) -> None:
        current_run().record_usage(Usage(cost=1.0))
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            current_run().record_usage(Usage(cost=2.0))

    outcome = await cancelled_outcome(agent, started)
    assert outcome.usage == Usage(cost=3.0)


async def test_time_that_is_not_charged_does_not_count() -> None:
    async def agent(assignment: AgentAssignment) -> str:
        with current_run().not_charged():
            await asyncio.sleep(0.05)
        return "in time"

    outcome = await outcome_of(agent, group=group_of(1, each={"timeout_seconds": 0.03}))
    assert outcome.output == "in time"


# Threads and loops


@pytest.mark.proves("X16")
def test_one_engine_serves_one_event_loop_after_another_and_leaves_no_thread() -> None:
    pytest.importorskip("trio")
    loops: list[asyncio.AbstractEventLoop] = []

    async def agent(assignment: AgentAssignment) -> int:
        loops.append(asyncio.get_running_loop())
        return threading.get_ident()

    executor = ParallelExecutor(engine=AsyncioEngine(agent))
    before = set(threading.enumerate())

    async def twice() -> list[Any]:
        return [(await executor.execute_group(group_of(3))).outcomes[-1].output for _ in range(2)]

    here = threading.get_ident()
    assert anyio.run(twice, backend="asyncio") == [here, here]
    first, second = anyio.run(twice, backend="trio")
    assert first == second != here
    assert anyio.run(twice, backend="asyncio") == [here, here]
    assert set(threading.enumerate()) == before
    assert [len({id(loop) for loop in loops[start : start + 6]}) for start in (0, 6, 12)] == [1, 1, 1]
    assert all(loop.is_closed() for loop in loops)


def test_what_agents_leave_behind_ends_with_the_run_of_trio() -> None:
    pytest.importorskip("trio")
    ended: list[str] = []
    left: list[Any] = []

    async def lingers() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(2_000):
                await asyncio.sleep(0)
            ended.append("task")

    async def agent(assignment: AgentAssignment) -> None:
        left.append(asyncio.create_task(lingers()))
        await asyncio.sleep(0)

    anyio.run(ParallelExecutor(engine=AsyncioEngine(agent)).execute_group, group_of(1), backend="trio")
    assert ended == ["task"]


BLOCKS = """
import threading
import anyio
from loguru import logger
from parallel_agents import AgentIdentity, ParallelExecutionGroup, ParallelExecutor, Task
from parallel_agents.engines import _asyncio_thread
from parallel_agents.engines.asyncio import AsyncioEngine

async def agent(assignment):
    started.set()
    threading.Event().wait()

async def main():
    group = ParallelExecutionGroup.map("g", AgentIdentity(id="a"), [Task(id="t")])
    engine = AsyncioEngine(agent, cleanup_seconds=0.01)
    async with ParallelExecutor(engine=engine).open_group(group) as run:
        await anyio.to_thread.run_sync(started.wait)
        run.cancel()
    print(run.result.outcomes[0].status)

started = threading.Event()
_asyncio_thread.CLOSE_SECONDS = 0.01
logger.remove()
logger.add(lambda line: print(line.record["message"], line.record["extra"].get("task_id")), level="WARNING")
logger.enable("parallel_agents")
anyio.run(main, backend="trio")
"""


def test_an_agent_that_blocks_the_thread_for_ever_does_not_block_the_end_of_the_program() -> None:
    pytest.importorskip("trio")
    command = [sys.executable, "-c", BLOCKS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        f"{ASYNCIO_AGENT_LEFT} t",
        "execution.parallel.agent_cancelled t",
        "cancelled",
        f"{ASYNCIO_AGENT_LEFT} None",
    ]


# What is refused


def test_what_is_no_engine_is_refused() -> None:
    with pytest.raises(TypeError, match="function must be an async function of an assignment, got 1"):
        AsyncioEngine(1)  # type: ignore[arg-type]
    for seconds in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="cleanup_seconds must be >= 0"):
            AsyncioEngine(test_what_is_no_engine_is_refused, cleanup_seconds=seconds)  # type: ignore[arg-type]


async def test_outside_of_a_run_there_is_none() -> None:
    engine = AsyncioEngine(outcome_of)  # type: ignore[arg-type]
    assert repr(engine) == "AsyncioEngine(outcome_of)"
    with pytest.raises(LookupError):
        await engine.run(group_of(1).assignments[0])


def test_cancelled_at_every_step_no_agent_is_left_over() -> None:
    running = 0
    executor = ParallelExecutor(engine=AsyncioEngine(lambda assignment: agent(assignment)))

    async def agent(assignment: AgentAssignment) -> None:
        nonlocal running
        running += 1
        try:
            await asyncio.sleep(0)
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            for _ in range(3):
                await asyncio.sleep(0)  # a second cancellation would cut this off
            cleaned_up.append(assignment.task_id)
            raise
        finally:
            running -= 1
            ended.append(assignment.task_id)

    async def program() -> None:
        await executor.execute_group(group_of(3, max_concurrency=2))

    def nobody_runs() -> None:
        assert running == 0
        steps.append((len(ended), len(cleaned_up)))
        ended.clear()
        cleaned_up.clear()

    ended: list[str] = []
    cleaned_up: list[str] = []
    steps: list[tuple[int, int]] = []
    assert cancel_at_every_checkpoint(program, check=nobody_runs, backend="asyncio") > 10
    assert running == 0
    assert (2, 2) in steps  # both that ran were cancelled and cleaned up
    assert all(cleaned <= over for over, cleaned in steps)
