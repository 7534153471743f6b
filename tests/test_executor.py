"""What comes of a group: outcomes, failures, limits, and order."""

import gc
import threading
from contextvars import ContextVar, copy_context
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from attrs import evolve, fields
from groups import group_of

from parallel_agents import (
    AgentAssignment,
    AgentRunResult,
    FunctionEngine,
    OutcomeStatus,
    ParallelExecutionError,
    ParallelExecutor,
    TerminationReason,
    Usage,
    current_run,
)
from parallel_agents._admission import Admission
from parallel_agents._context import RunContext
from parallel_agents._drive import drive

pytestmark = pytest.mark.anyio


def result_for(task: AgentAssignment, reason: TerminationReason = TerminationReason.COMPLETED, **fields: Any) -> Any:
    return AgentRunResult(task_id=task.task_id, agent_id=task.agent_id, termination_reason=reason, **fields)


async def run(function: Any, group: Any, **options: Any) -> Any:
    with anyio.fail_after(5):
        return await ParallelExecutor(engine=function, **options).execute_group(group)


async def test_the_tests_run_on_the_backend_they_are_named_after(anyio_backend_name: str) -> None:
    assert anyio.get_cancelled_exc_class().__module__.partition(".")[0] == anyio_backend_name


@pytest.mark.proves("X1")
async def test_outcomes_keep_assignment_order_when_the_last_finishes_first() -> None:
    done = [anyio.Event() for _ in range(4)]
    done[-1].set()

    async def agent(task: AgentAssignment) -> str:
        position = int(task.task_id[1:])
        await done[position].wait()
        done[position - 1].set()
        return task.agent_id

    result = await run(agent, group_of(4))
    assert [o.task_id for o in result.outcomes] == ["t0", "t1", "t2", "t3"]
    assert [o.agent_id for o in result.outcomes] == ["a0", "a1", "a2", "a3"]
    assert [o.output for o in result.outcomes] == ["a0", "a1", "a2", "a3"]
    assert result.all_succeeded


@pytest.mark.proves("X2")
async def test_an_exception_becomes_its_agents_outcome_and_touches_nobody_else() -> None:
    failed = anyio.Event()

    async def agent(task: AgentAssignment) -> str:
        if task.task_id == "t0":
            failed.set()
            raise ValueError("{braces} and [markup]")
        await failed.wait()
        await anyio.lowlevel.checkpoint()
        return "fine"

    result = await run(agent, group_of(3))
    first, *others = result.outcomes
    assert (first.status, first.error) == (OutcomeStatus.FAILED, "ValueError: {braces} and [markup]")
    assert isinstance(first.exception, ValueError)
    assert [o.output for o in others] == ["fine", "fine"]


@pytest.mark.proves("X2")
async def test_an_exception_group_of_an_agents_own_tasks_is_one_ordinary_failure() -> None:
    async def agent(task: AgentAssignment) -> None:
        async with anyio.create_task_group():
            raise ValueError("inner")

    result = await run(agent, group_of(2))
    assert [o.status for o in result.outcomes] == [OutcomeStatus.FAILED] * 2
    assert "ExceptionGroup" in (result.outcomes[0].error or "")


async def test_an_exception_that_cannot_be_written_is_an_outcome_all_the_same() -> None:
    class UnspeakableError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    async def agent(task: AgentAssignment) -> None:
        raise UnspeakableError if task.task_id == "t0" else ValueError

    result = await run(agent, group_of(2))
    assert result.outcomes[0].error == "UnspeakableError (its message cannot be read)"
    assert result.outcomes[1].error == "ValueError (no message)"


@pytest.mark.proves("X3", "X4")
async def test_a_returned_failure_counts_as_one_and_trips_fail_fast() -> None:
    async def agent(task: AgentAssignment) -> Any:
        if task.task_id == "t0":
            return result_for(task, TerminationReason.MAX_TURNS)
        return await anyio.sleep_forever()

    result = await run(agent, group_of(3, fail_fast=True, max_concurrency=2))
    assert [o.status for o in result.outcomes] == [OutcomeStatus.FAILED] + [OutcomeStatus.CANCELLED] * 2
    assert result.agents_failed == 3
    assert result.outcomes[0].result is not None


@pytest.mark.proves("X4")
async def test_fail_fast_returns_and_its_cancelled_outcomes_name_the_agent_that_failed() -> None:
    started: list[str] = []

    async def agent(task: AgentAssignment) -> None:
        started.append(task.task_id)
        if task.task_id == "t1":
            raise ValueError("boom")
        await anyio.sleep_forever()

    result = await run(agent, group_of(5, fail_fast=True, max_concurrency=2))
    assert started == ["t0", "t1"]
    failed = result.outcome_of("t1")
    assert failed.error == "ValueError: boom"
    for outcome in result.outcomes:
        if outcome is not failed:
            assert outcome.status is OutcomeStatus.CANCELLED
            assert "cancel" in outcome.error.lower()
            assert "'a1'" in outcome.error
    assert result.outcome_of("t0").started_after_seconds is not None
    assert result.outcome_of("t4").started_after_seconds is None


@pytest.mark.proves("X4")
async def test_without_fail_fast_nothing_is_cancelled_because_of_a_sibling() -> None:
    failed = anyio.Event()

    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t0":
            failed.set()
            raise ValueError
        await failed.wait()
        for _ in range(5):
            await anyio.lowlevel.checkpoint()

    result = await run(agent, group_of(5, max_concurrency=2))
    assert [o.is_success for o in result.outcomes] == [False, True, True, True, True]


@pytest.mark.proves("X5")
@pytest.mark.parametrize(
    ("limit", "tokens", "peak"), [(3, None, 3), (None, 2, 2), (4, 2, 2), (2, 4, 2), (None, None, 9)]
)
async def test_no_more_run_at_once_than_the_group_and_the_limiter_allow(
    limit: int | None, tokens: int | None, peak: int
) -> None:
    limiter = None if tokens is None else anyio.CapacityLimiter(tokens)
    running = highest = 0
    starts: list[str] = []

    async def agent(task: AgentAssignment) -> None:
        nonlocal running, highest
        starts.append(task.task_id)
        running += 1
        highest = max(highest, running)
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        running -= 1

    result = await run(agent, group_of(9, max_concurrency=limit), limiter=limiter)
    assert result.all_succeeded
    assert starts == [f"t{n}" for n in range(9)]
    assert highest == peak
    if limiter is not None:
        assert limiter.borrowed_tokens == 0


@pytest.mark.proves("X5")
async def test_groups_and_executors_that_share_a_limiter_share_its_bound() -> None:
    limiter = anyio.CapacityLimiter(3)
    running = highest = 0

    async def agent(task: AgentAssignment) -> None:
        nonlocal running, highest
        running += 1
        highest = max(highest, running)
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        running -= 1

    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(ParallelExecutor(engine=agent, limiter=limiter).execute_group, group_of(7))
    assert highest == 3
    assert limiter.borrowed_tokens == 0


@pytest.mark.proves("X5")
async def test_a_group_ends_although_a_stranger_waits_for_the_limiter_too_and_then_keeps_it() -> None:
    limiter = anyio.CapacityLimiter(1)

    async with anyio.create_task_group() as tasks:

        async def agent(task: AgentAssignment) -> None:
            if task.task_id == "t0":
                while limiter.statistics().tasks_waiting < 1:  # the group's second worker
                    await anyio.lowlevel.checkpoint()
                tasks.start_soon(limiter.acquire_on_behalf_of, "stranger")
                while limiter.statistics().tasks_waiting < 2:
                    await anyio.lowlevel.checkpoint()

        result = await run(agent, group_of(2), limiter=limiter)
        assert result.all_succeeded
    assert limiter.statistics().borrowers == ("stranger",)


@pytest.mark.proves("X6")
@pytest.mark.parametrize("kind", [MemoryError, RecursionError])
async def test_a_fatal_error_lets_the_siblings_finish_and_is_then_raised_with_the_complete_result(
    kind: type[Exception],
) -> None:
    async def agent(task: AgentAssignment) -> str:
        if task.task_id == "t0":
            raise kind("no more")
        await anyio.lowlevel.checkpoint()
        return "fine"

    with pytest.raises(ParallelExecutionError) as caught:
        await run(agent, group_of(3, max_concurrency=1))
    assert isinstance(caught.value.__cause__, kind)
    outcomes = caught.value.result.outcomes
    assert outcomes[0].error == f"Fatal: {kind.__name__}: no more"
    assert [o.output for o in outcomes] == [None, "fine", "fine"]


@pytest.mark.proves("X2", "X6")
async def test_several_fatal_errors_are_raised_from_a_group_also_when_they_come_in_one() -> None:
    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t0":
            raise ExceptionGroup("tasks", [ValueError(), ExceptionGroup("inner", [MemoryError("deep")])])
        raise RecursionError

    with pytest.raises(ParallelExecutionError) as caught:
        await run(agent, group_of(2))
    assert isinstance(caught.value.__cause__, ExceptionGroup)
    assert [type(e) for e in caught.value.__cause__.exceptions] == [MemoryError, RecursionError]
    assert caught.value.result.outcomes[0].error == "Fatal: MemoryError: deep"


@pytest.mark.proves("X12")
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "NoneType instead of an AgentRunResult"),
        ("done", "str instead of an AgentRunResult"),
        (
            AgentRunResult(
                task_id="t7", agent_id="a0", termination_reason=TerminationReason.COMPLETED, usage=Usage(cost=2.0)
            ),
            "the result of task 't7' and agent 'a0' for task 't0' and agent 'a0'",
        ),
    ],
)
async def test_a_wrong_result_is_a_failure_that_says_so_and_keeps_the_usage(value: Any, text: str) -> None:
    class Engine:
        async def run(self, task: AgentAssignment, /) -> Any:
            current_run().record_usage(Usage(requests=1))
            return value

    (outcome,) = (await run(Engine(), group_of(1))).outcomes
    assert outcome.status is OutcomeStatus.FAILED
    assert text in (outcome.error or "")
    assert outcome.usage == Usage(requests=1, cost=0.0 if isinstance(value, str | None) else 2.0)


async def test_metered_usage_is_kept_also_by_an_agent_that_fails() -> None:
    async def agent(task: AgentAssignment) -> None:
        current_run().record_usage(Usage(requests=1, cost=0.5))
        current_run().record_usage(Usage(requests=1, input_tokens=7))
        raise ValueError

    result = await run(agent, group_of(2))
    assert result.total_usage == Usage(requests=4, cost=1.0, input_tokens=14)


@pytest.mark.proves("X13")
async def test_each_agent_has_its_own_context_variables() -> None:
    variable: ContextVar[str] = ContextVar("variable", default="none")
    variable.set("caller's")
    seen: list[str] = []

    async def agent(task: AgentAssignment) -> str:
        seen.append(variable.get())
        variable.set(task.task_id)
        await anyio.lowlevel.checkpoint()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.lowlevel.checkpoint)
        return variable.get()

    result = await run(agent, group_of(6, max_concurrency=2))
    assert seen == ["caller's"] * 6
    assert [o.output for o in result.outcomes] == [f"t{n}" for n in range(6)]
    assert variable.get() == "caller's"


@pytest.mark.proves("X13")
async def test_a_plain_function_that_returns_an_awaitable_is_called_in_the_agents_context_too() -> None:
    variable: ContextVar[str] = ContextVar("variable", default="none")

    async def later() -> str:
        return variable.get()

    def agent(task: AgentAssignment) -> Any:
        assert current_run().assignment is task
        before = variable.get()
        variable.set(task.task_id)
        return later() if before == "none" else None

    result = await run(agent, group_of(3, max_concurrency=1))
    assert [o.output for o in result.outcomes] == ["t0", "t1", "t2"]


async def test_a_function_engine_with_a_run_of_its_own_is_run_by_that() -> None:
    class Loud(FunctionEngine):
        async def run(self, assignment: AgentAssignment, /) -> Any:
            result = await super().run(assignment)
            return evolve(result, output=f"{result.output}!")

    async def agent(task: AgentAssignment) -> str:
        return task.task_id

    for engine, output in ((FunctionEngine(agent), "t0"), (Loud(agent), "t0!")):
        assert (await run(engine, group_of(1))).outcomes[0].output == output


async def test_an_agent_can_use_what_anyio_offers_a_task() -> None:
    async def agent(task: AgentAssignment) -> str:
        with anyio.move_on_after(0):
            await anyio.sleep_forever()
        thread = await anyio.to_thread.run_sync(threading.get_ident)
        assert thread != threading.get_ident()
        return current_run().assignment.task_id

    result = await run(agent, group_of(3, max_concurrency=1))
    assert [o.output for o in result.outcomes] == ["t0", "t1", "t2"]


async def test_an_engine_call_starts_as_any_other_context_of_a_run_does() -> None:
    async def agent(task: AgentAssignment) -> None:
        call, other = current_run(), RunContext("g", task, bool)
        given = {"group_id", "assignment", "_shutdown_requested"}
        for field in fields(RunContext):
            assert field.name in given or getattr(call, field.name) == getattr(other, field.name)
        assert not [field.name for field in fields(type(call)) if not hasattr(call, field.name)]

    (await run(agent, group_of(1))).raise_for_failures()


async def test_current_run_tells_an_agent_about_its_run_and_nobody_else() -> None:
    async def agent(task: AgentAssignment) -> None:
        context = current_run()
        assert context.group_id == "g"
        assert context.assignment is task
        assert context.attempt == 1
        assert not context.shutdown_requested

    assert (await run(agent, group_of(2))).all_succeeded
    with pytest.raises(LookupError, match="inside an engine call"):
        current_run()


async def test_an_engine_may_return_any_awaitable_or_refuse_at_once() -> None:
    class Later:
        def __await__(self) -> Any:
            yield from anyio.lowlevel.checkpoint().__await__()
            return "later"

    def agent(task: AgentAssignment) -> Any:
        if task.task_id == "t0":
            return Later()
        if task.task_id == "t1":
            raise ValueError("at once")
        return "not awaitable"

    first, second, third = (await run(agent, group_of(3))).outcomes
    assert first.output == "later"
    assert second.error == "ValueError: at once"
    assert "TypeError" in (third.error or "")

    class Engine:
        def run(self, task: AgentAssignment, /) -> Any:
            return agent(task)

    first, second, third = (await run(Engine(), group_of(3))).outcomes
    assert first.error == "The engine returned str instead of an AgentRunResult"
    assert second.error == "ValueError: at once"
    assert "TypeError" in (third.error or "")


def test_a_call_that_is_closed_closes_the_agents_coroutine_in_its_context() -> None:
    variable: ContextVar[str] = ContextVar("variable")
    closed: list[str] = []

    class Suspend:
        def __await__(self) -> Any:
            yield

    async def agent(argument: str) -> None:
        variable.set(argument)
        try:
            await Suspend()
        finally:
            closed.append(variable.get())

    call: Any = drive(copy_context(), agent("inside"))
    assert next(call) is None
    call.close()
    assert closed == ["inside"]


async def test_a_parked_agent_is_neither_a_success_nor_a_failure() -> None:
    class Engine:
        async def run(self, task: AgentAssignment, /) -> Any:
            return result_for(task, TerminationReason.PARKED)

    progress: list[Any] = []
    result = await run(Engine(), group_of(2, fail_fast=True, max_concurrency=1), progress_callback=progress.append)
    assert [o.status for o in result.outcomes] == [OutcomeStatus.PARKED] * 2
    assert (result.agents_parked, result.agents_failed, progress[-1].parked) == (2, 0, 2)


async def test_two_readers_of_an_open_group_both_see_every_outcome() -> None:
    gate = anyio.Event()
    seen: list[str] = []

    async def agent(task: AgentAssignment) -> None:
        await gate.wait()

    async def read(outcomes: Any) -> None:
        seen.extend([outcome.task_id async for outcome in outcomes])

    with anyio.fail_after(5):
        async with (
            ParallelExecutor(engine=agent).open_group(group_of(2)) as run_,
            anyio.create_task_group() as readers,
        ):
            readers.start_soon(read, run_)
            readers.start_soon(read, aiter(run_))
            await anyio.wait_all_tasks_blocked()
            gate.set()
    assert sorted(seen) == ["t0", "t0", "t1", "t1"]


async def test_a_worker_that_is_given_a_slot_when_nothing_is_left_gives_it_back() -> None:
    class Stubborn:
        """Grants its second place in the very moment in which nobody wants it any more."""

        def __init__(self) -> None:
            self.taken: list[object] = []
            self.asked = anyio.Event()
            self.granted = anyio.Event()

        def acquire_on_behalf_of_nowait(self, borrower: object) -> None:
            if self.taken:
                raise anyio.WouldBlock
            self.taken.append(borrower)

        async def acquire_on_behalf_of(self, borrower: object) -> None:
            self.asked.set()
            with anyio.CancelScope(shield=True):
                await self.granted.wait()
            self.taken.append(borrower)

        def release_on_behalf_of(self, borrower: object) -> None:
            self.taken.remove(borrower)

        def statistics(self) -> Any:
            return SimpleNamespace(borrowers=tuple(self.taken))

    limiter: Any = Stubborn()

    async def agent(task: AgentAssignment) -> None:
        await limiter.asked.wait()
        raise ValueError

    with anyio.fail_after(5):
        executor = ParallelExecutor(engine=agent, limiter=limiter)
        async with executor.open_group(group_of(2, fail_fast=True)) as run_:
            while run_.progress.failed < 1:
                await anyio.lowlevel.checkpoint()
            limiter.granted.set()
    assert limiter.taken == []
    assert [o.status for o in run_.result.outcomes] == [OutcomeStatus.FAILED, OutcomeStatus.CANCELLED]


async def test_a_group_leaves_no_circles_behind_for_the_garbage_collector() -> None:
    async def agent(task: AgentAssignment) -> None:
        await anyio.lowlevel.checkpoint()

    await run(agent, group_of(4))
    gc.collect()
    gc.disable()
    try:
        await ParallelExecutor(engine=agent).execute_group(group_of(4, max_concurrency=2))
        assert gc.collect() == 0
    finally:
        gc.enable()


async def test_a_defect_of_the_executor_itself_is_raised_and_not_taken_for_an_agents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Admission, "take", broken)
    with pytest.raises(ExceptionGroup) as caught:
        await run(lambda task: anyio.sleep(0), group_of(2))
    assert {str(error) for error in caught.value.exceptions} == {"a defect"}


async def test_an_engine_can_refuse_assignments_before_anything_starts() -> None:
    class Picky:
        started = 0

        def check(self, task: AgentAssignment, /) -> None:
            if task.task_id == "t1":
                raise ValueError("t1 is too much")

        async def run(self, task: AgentAssignment, /) -> Any:
            self.started += 1

    engine = Picky()
    with pytest.raises(ValueError, match="t1 is too much"):
        await run(engine, group_of(3))
    assert engine.started == 0


@pytest.mark.proves("X1")
async def test_an_open_group_gives_outcomes_in_order_of_completion_and_again_from_the_start() -> None:
    gates = [anyio.Event() for _ in range(3)]

    async def agent(task: AgentAssignment) -> str:
        await gates[int(task.task_id[1:])].wait()
        return task.task_id

    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agent).open_group(group_of(3)) as run_:
            with pytest.raises(RuntimeError, match="after the block"):
                _ = run_.result
            seen = []
            gates[2].set()
            async for outcome in run_:
                seen.append(outcome.task_id)
                gates[{"t2": 0, "t0": 1}.get(outcome.task_id, 1)].set()
            assert seen == ["t2", "t0", "t1"]
            assert run_.progress.completed == 3
        assert [o.task_id async for o in run_] == seen
    assert [o.task_id for o in run_.result.outcomes] == ["t0", "t1", "t2"]
    assert "'g'" in repr(run_)


async def test_leaving_an_open_group_waits_for_the_rest() -> None:
    gate = anyio.Event()

    async def agent(task: AgentAssignment) -> None:
        if task.task_id != "t0":
            await gate.wait()

    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agent).open_group(group_of(3)) as run_:
            async for _ in run_:
                break
            gate.set()
    assert run_.result.all_succeeded


async def test_cancel_stops_an_open_group_and_cancel_task_one_task_of_it() -> None:
    started = anyio.Event()

    async def agent(task: AgentAssignment) -> None:
        started.set()
        await anyio.sleep_forever()

    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agent).open_group(group_of(4, max_concurrency=1)) as run_:
            await started.wait()
            assert run_.cancel_task("t2")
            assert not run_.cancel_task("t2")
            assert run_.cancel_task("t0")
            async for outcome in run_:
                if outcome.task_id == "t0":
                    break
            assert not run_.cancel_task("t0")
            with pytest.raises(KeyError, match="no task 'x'"):
                run_.cancel_task("x")
            run_.cancel()
    errors = [o.error for o in run_.result.outcomes]
    assert errors[0] == "Cancelled: cancel_task() was called"
    assert errors[2] == "Cancelled before it started: cancel_task() was called"
    assert errors[3] == "Cancelled before it started: cancel() was called"
    assert all(o.status is OutcomeStatus.CANCELLED for o in run_.result.outcomes)


async def test_a_cancelled_task_does_not_trip_fail_fast() -> None:
    gate = anyio.Event()

    async def agent(task: AgentAssignment) -> None:
        await gate.wait()

    with anyio.fail_after(5):
        async with ParallelExecutor(engine=agent).open_group(group_of(3, fail_fast=True)) as run_:
            run_.cancel_task("t1")
            gate.set()
    assert [o.is_success for o in run_.result.outcomes] == [True, False, True]


async def test_an_exception_in_the_block_cancels_the_agents_and_leaves_as_it_is() -> None:
    async def agent(task: AgentAssignment) -> None:
        await anyio.sleep_forever()

    error = ValueError("mine")
    runs = []
    with anyio.fail_after(5), pytest.raises(ValueError, match="mine") as caught:
        async with ParallelExecutor(engine=agent).open_group(group_of(2)) as run_:
            runs.append(run_)
            raise error
    assert caught.value is error
    assert [o.status for o in runs[0].result.outcomes] == [OutcomeStatus.CANCELLED] * 2


def test_the_executor_refuses_what_is_no_engine_and_callbacks_nobody_would_await() -> None:
    async def callback(progress: object) -> None: ...

    class Callable:
        async def __call__(self, progress: object) -> None: ...

    with pytest.raises(TypeError, match="engine must have an async method"):
        ParallelExecutor(engine="engine")  # type: ignore[arg-type]
    for wrong in (callback, Callable()):
        with pytest.raises(TypeError, match="progress_callback must be a plain function"):
            ParallelExecutor(engine=callback, progress_callback=wrong)
    with pytest.raises(TypeError, match="function must be"):
        FunctionEngine(7)  # type: ignore[arg-type]
    assert "FunctionEngine" in repr(ParallelExecutor(engine=callback))


@pytest.mark.proves("X5")
async def test_a_group_of_many_makes_as_many_tasks_as_may_run() -> None:
    tasks: set[int] = set()

    async def agent(task: AgentAssignment) -> None:
        tasks.add(anyio.get_current_task().id)
        await anyio.lowlevel.checkpoint()

    result = await run(agent, group_of(2_000, max_concurrency=20))
    assert result.all_succeeded
    assert len(tasks) == 20
