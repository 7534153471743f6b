"""RateLimitedEngine: who starts when, what it costs, and what waiting does not cost."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from attrs import define, field
from clocks import stall_for, virtual_time
from groups import assignment, group_of
from hypothesis import given
from hypothesis import strategies as st

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    AgentRunResult,
    Budget,
    CooperativeTimeout,
    FunctionEngine,
    OutcomeStatus,
    ParallelExecutionGroup,
    ParallelExecutionResult,
    ParallelExecutor,
    RunContext,
    ShutdownManager,
    Task,
    TerminationReason,
    Usage,
    current_run,
)
from parallel_agents.engines.rate_limit import KEYS_KEPT_AT_LEAST, RateLimit, RateLimitedEngine
from parallel_agents.engines.retry import RetryEngine, RetryPolicy
from parallel_agents.testing import cancel_at_every_checkpoint
from parallel_agents.testing.stepping import Backend, installed_backends, run_in_virtual_time

pytestmark = pytest.mark.anyio

both_backends = pytest.mark.parametrize("backend", installed_backends())

Agent = Callable[[AgentAssignment], Awaitable[Any]]


class TooManyRequestsError(Exception):
    """As a client raises it for status 429."""

    retry_after_seconds = 10.0


@define
class Log:
    """An agent that notes when it starts, and then does what it is given."""

    then: Agent | None = None
    began: float = field(init=False)
    starts: dict[str, float] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.began = anyio.current_time()

    async def __call__(self, task: AgentAssignment) -> Any:
        self.starts[task.task_id] = anyio.current_time() - self.began
        await anyio.lowlevel.checkpoint()
        return None if self.then is None else await self.then(task)

    @property
    def times(self) -> list[float]:
        return [round(start, 6) for start in self.starts.values()]


async def run(agent: Agent, *limits: RateLimit, count: int = 1, **options: Any) -> ParallelExecutionResult[Any]:
    executor = ParallelExecutor(engine=RateLimitedEngine(FunctionEngine(agent), *limits))
    with anyio.fail_after(1_000):
        return await executor.execute_group(group_of(count, **options))


def spends(usage: Usage) -> Agent:
    async def agent(task: AgentAssignment) -> AgentRunResult[None]:
        return AgentRunResult(
            task_id=task.task_id, agent_id=task.agent_id, termination_reason=TerminationReason.COMPLETED, usage=usage
        )

    return agent


# The rate


@virtual_time
async def test_agents_start_at_an_even_pace_in_the_order_of_their_arrival() -> None:
    log = Log()
    await run(log, RateLimit(4, per_seconds=2), count=5)
    assert log.times == [0, 0.5, 1, 1.5, 2]
    assert list(log.starts) == [f"t{n}" for n in range(5)]


@virtual_time
async def test_a_burst_starts_at_once_after_a_pause_and_not_more() -> None:
    log = Log()
    limit = RateLimit(1, per_seconds=1, burst=3)
    await run(log, limit, count=5)
    await anyio.sleep(100)
    await run(lambda task: log(assignment(int(task.task_id[1:]) + 10)), limit, count=4)
    assert log.times == [0, 0, 0, 1, 2, 102, 102, 102, 103]


@both_backends
def test_a_saturated_limit_is_used_within_one_per_cent(backend: Backend) -> None:
    async def program() -> float:
        before = anyio.current_time()
        await run(spends(Usage()), RateLimit(1_000, per_seconds=7), count=2_001)
        return anyio.current_time() - before

    assert run_in_virtual_time(program, backend) == pytest.approx(14, rel=0.01)


def reference(arrivals: list[float], costs: list[int], rate: float, burst: float) -> list[float]:
    """Return when a bucket of tokens lets each start: as soon as it has *burst* less one, and is first in line."""
    level, at, starts = burst, 0.0, [0.0]
    for arrival, cost in zip(arrivals, costs, strict=True):
        start = max(arrival, starts[-1], at + (1 - min(burst, level)) / rate)
        level = min(burst, level + (start - at) * rate) - cost
        at = start
        starts.append(start)
    return starts[1:]


@both_backends
@given(
    pauses=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    costs=st.lists(st.integers(1, 4), min_size=20, max_size=20),
    amount=st.integers(1, 5),
    burst=st.integers(1, 4),
)
def test_never_is_more_granted_than_allowed_nor_later_nor_out_of_order(
    backend: Backend, pauses: list[int], costs: list[int], amount: int, burst: int
) -> None:
    arrivals = [float(sum(pauses[: n + 1])) for n in range(len(pauses))]
    limit = RateLimit(amount, per_seconds=2, burst=burst, reserve=lambda a: costs[int(a.task_id[1:])])
    rate = amount / 2

    async def program() -> Log:
        log = Log()
        executor = ParallelExecutor(engine=RateLimitedEngine(FunctionEngine(log), limit))

        async def one(number: int) -> None:
            await anyio.sleep_until(log.began + arrivals[number] + number * 1e-6)
            await executor.execute_group(ParallelExecutionGroup(group_id="g", assignments=[assignment(number)]))

        async with anyio.create_task_group() as tasks:
            for number in range(len(pauses)):
                tasks.start_soon(one, number)
        return log

    log = run_in_virtual_time(program, backend)
    starts = list(log.starts.values())
    assert list(log.starts) == [f"t{n}" for n in range(len(pauses))]
    for first in range(len(starts)):
        for last in range(first + 1, len(starts)):
            before_the_last = sum(costs[first:last])
            assert before_the_last <= burst - 1 + (starts[last] - starts[first]) * rate + 1e-6
    assert starts == pytest.approx(reference(arrivals, costs[: len(pauses)], rate, burst), abs=1e-3)


@virtual_time
async def test_keys_do_not_wait_for_each_other() -> None:
    log = Log()
    limit = RateLimit(1, per_seconds=1, key=lambda a: a.identity.model)
    tasks = [
        AgentAssignment(identity=AgentIdentity(id=f"{model}-{n}", model=model), task=Task(id=f"{model}-{n}"))
        for n in range(3)
        for model in ("large", "small", None)
    ]
    executor = ParallelExecutor(engine=RateLimitedEngine(FunctionEngine(log), limit))
    await executor.execute_group(ParallelExecutionGroup(group_id="g", assignments=tasks))
    assert log.times == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@virtual_time
async def test_executors_share_the_limits_that_they_are_given() -> None:
    log = Log()
    limit = RateLimit(1, per_seconds=1)
    async with anyio.create_task_group() as tasks:
        for number in range(3):
            executor = ParallelExecutor(engine=RateLimitedEngine(FunctionEngine(log), limit))
            group = ParallelExecutionGroup(group_id="g", assignments=[assignment(number)])
            tasks.start_soon(executor.execute_group, group)
    assert log.times == [0, 1, 2]


def test_a_limit_made_outside_an_event_loop_starts_afresh_on_one_after_another() -> None:
    pytest.importorskip("trio")
    limit = RateLimit(1, per_seconds=60, reserve=60)

    async def program() -> list[float]:
        log = Log()
        await run(log, limit)
        return log.times

    for backend in ("asyncio", "trio", "asyncio"):
        assert run_in_virtual_time(program, backend) == [0]


# What a call costs


@virtual_time
@pytest.mark.parametrize(
    ("limit", "usage", "second_start"),
    [
        (RateLimit(10, per_seconds=10), Usage(requests=5), 5),
        (RateLimit(10, per_seconds=10, reserve=5), Usage(requests=2), 2),
        (RateLimit(10, per_seconds=10, reserve=5), Usage(input_tokens=100), 5),
        (RateLimit(10, per_seconds=10, reserve=5), Usage(requests=5), 5),
        (RateLimit(100, "tokens", per_seconds=10, reserve=50), Usage(input_tokens=20, output_tokens=60), 8),
        (RateLimit(100, "tokens", per_seconds=10, reserve=50), Usage(input_tokens=10, output_tokens=20), 3),
        (RateLimit(100, "tokens", per_seconds=10, reserve=50), Usage(requests=9), 5),
        (RateLimit(10, per_seconds=10, reserve=0), Usage(), 0),
    ],
    ids=["more", "less", "not reported", "the same", "more tokens", "less tokens", "no tokens", "nothing"],
)
async def test_what_was_reserved_is_corrected_by_what_was_spent(limit: Any, usage: Usage, second_start: float) -> None:
    log = Log(spends(usage))
    await run(log, limit, count=2)
    assert log.times == [0, second_start]


@virtual_time
async def test_one_that_waits_already_starts_sooner_when_a_call_turns_out_cheaper() -> None:
    async def agent(task: AgentAssignment) -> None:
        await anyio.sleep(2)
        current_run().record_usage(Usage(requests=3))

    log = Log(agent)
    await run(log, RateLimit(1, per_seconds=1, reserve=10), count=2)
    assert log.times == [0, 3]


@virtual_time
async def test_time_that_has_passed_is_not_given_back() -> None:
    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t0":
            await anyio.sleep(25)
            current_run().record_usage(Usage(requests=1))

    log = Log(agent)
    await run(log, RateLimit(1, per_seconds=1, reserve=10), count=4)
    assert log.times == [0, 10, 20, 30]


@virtual_time
async def test_what_two_calls_give_back_is_not_given_back_twice() -> None:
    spent = {"t0": (1, 1), "t1": (15, 1)}  # when it ends, and what it has cost instead of 10

    async def agent(task: AgentAssignment) -> None:
        if task.task_id in spent:
            ends, requests = spent[task.task_id]
            await anyio.sleep_until(log.began + ends)
            current_run().record_usage(Usage(requests=requests))
        else:
            await anyio.sleep_forever()

    log = Log(agent)
    with anyio.move_on_after(30):
        await run(log, RateLimit(1, per_seconds=1, reserve=10, burst=21), count=6)
    # 10 each: t0 gives 9 back at 1, after which t1's stretch is over at 11, and nothing of it is left at 15
    assert log.times == [0, 0, 0, 1, 11, 21]


@virtual_time
async def test_an_agent_that_fails_has_spent_what_was_metered() -> None:
    async def agent(task: AgentAssignment) -> None:
        current_run().record_usage(Usage(requests=7))
        raise ValueError

    log = Log(agent)
    result = await run(log, RateLimit(1, per_seconds=1), count=2)
    assert log.times == [0, 7]
    assert result.agents_failed == 2


@virtual_time
async def test_what_turns_out_to_be_spent_counts_from_then_on() -> None:
    async def agent(task: AgentAssignment) -> None:
        await anyio.sleep(100)
        current_run().record_usage(Usage(requests=8))

    log = Log(agent)
    limit = RateLimit(1, per_seconds=1)
    await run(log, limit)
    await run(lambda task: log(assignment(1)), limit)
    assert log.times == [0, 107]


@virtual_time
async def test_all_limits_must_let_an_agent_start() -> None:
    log = Log(spends(Usage(requests=1, input_tokens=30)))
    requests, tokens = RateLimit(1, per_seconds=1, burst=3), RateLimit(10, "tokens", per_seconds=1, burst=20)
    await run(log, requests, tokens, count=6, max_concurrency=1)
    # the first pays off 11 of its tokens before the next one starts, whose request has been saved up by then
    assert log.times == [0, 1.1, 4.1, 7.1, 10.1, 13.1]


@virtual_time
@pytest.mark.parametrize("is_slow_first", [False, True])
async def test_who_waits_for_one_limit_lets_nobody_pass_at_another(is_slow_first: bool) -> None:
    log = Log()
    slow = RateLimit(1, per_seconds=10, key=lambda a: a.task_id in ("t0", "t1"))
    for_all = RateLimit(1, per_seconds=1)
    with anyio.fail_after(100):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: run(log, *((slow, for_all) if is_slow_first else (for_all, slow)), count=3))
            await anyio.sleep(5)
            tasks.start_soon(run, lambda task: log(assignment(3)), for_all)
    assert log.starts == {"t0": 0, "t1": 10, "t2": 11, "t3": 12}


@virtual_time
async def test_calls_held_back_by_one_limit_do_not_save_up_another() -> None:
    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t0":
            raise TooManyRequestsError

    log = Log(agent)
    blocked = RateLimit(1_000, per_seconds=1)
    await run(log, RateLimit(1, per_seconds=1), blocked, count=4)
    assert log.times == [0, 10, 11, 12]


# A server that says when


@virtual_time
async def test_a_refusal_makes_all_wait_that_share_the_key() -> None:
    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t1":
            raise TooManyRequestsError

    log = Log(agent)
    limit = RateLimit(1, per_seconds=1, key=lambda a: a.task_id == "t4")
    result = await run(log, limit, count=5)
    assert log.starts == {"t0": 0, "t4": 0, "t1": 1, "t2": 11, "t3": 12}
    assert result.outcomes[1].status is OutcomeStatus.FAILED


@virtual_time
async def test_the_time_that_all_wait_only_grows() -> None:
    asked = {"t0": 20.0, "t1": 2.0, "t2": 10.0}

    async def agent(task: AgentAssignment) -> None:
        if task.task_id in asked:
            await anyio.sleep(1 + int(task.task_id[1:]))
            error = TooManyRequestsError()
            error.retry_after_seconds = asked[task.task_id]
            raise error

    log = Log(agent)
    await run(log, RateLimit(1, per_seconds=5, burst=3), count=4)
    assert log.times == [0, 0, 0, 21]


@virtual_time
async def test_with_retries_outside_each_attempt_waits_its_turn() -> None:
    async def agent(task: AgentAssignment) -> None:
        starts.append((task.task_id, anyio.current_time() - began))
        if task.task_id == "t0" and current_run().attempt == 1:
            raise TooManyRequestsError

    starts: list[tuple[str, float]] = []
    began = anyio.current_time()
    limited = RateLimitedEngine(FunctionEngine(agent), RateLimit(1, per_seconds=1))
    engine = RetryEngine(limited, RetryPolicy(retry_on=TooManyRequestsError, jitter_seconds=0))
    result = await ParallelExecutor(engine=engine).execute_group(group_of(3))
    assert result.all_succeeded
    assert sorted(time for _, time in starts) == [0, 10, 11, 12]
    assert [name for name, _ in starts].count("t0") == 2


# Waiting


@virtual_time
async def test_waiting_does_not_use_up_the_time_that_an_agent_has() -> None:
    async def agent(task: AgentAssignment) -> None:
        await anyio.sleep(0.5 if task.task_id != "t2" else 2)

    log = Log(agent)
    result = await run(log, RateLimit(1, per_seconds=5), count=4, each={"timeout_seconds": 1.0})
    assert log.times == [0, 5, 10, 15]
    statuses = [outcome.status for outcome in result.outcomes]
    assert statuses == [*[OutcomeStatus.SUCCEEDED] * 2, OutcomeStatus.TIMED_OUT, OutcomeStatus.SUCCEEDED]
    assert result.outcomes[2].error == "Timed out after 1 s"
    assert result.outcomes[2].duration_seconds == pytest.approx(11)


@virtual_time
async def test_time_before_and_between_waits_is_charged() -> None:
    async def agent(task: AgentAssignment) -> None:
        run = current_run()
        for _ in range(3):
            await anyio.sleep(1)
            with run.not_charged():
                await anyio.sleep(100)
        await anyio.sleep(1)

    result = await run(agent, RateLimit(1, per_seconds=1), each={"timeout_seconds": 3.5})
    assert result.outcomes[0].status is OutcomeStatus.TIMED_OUT
    assert result.outcomes[0].duration_seconds == pytest.approx(303.5)


@virtual_time
async def test_waits_of_several_tasks_of_an_agent_may_overlap() -> None:
    async def wait(start: float, end: float) -> None:
        run = current_run()
        await anyio.sleep(start)
        with run.not_charged():
            await anyio.sleep(end - start)

    async def agent(task: AgentAssignment) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait, 1, 10)
            tasks.start_soon(wait, 5, 20)
        await anyio.sleep_forever()

    result = await run(agent, RateLimit(1, per_seconds=1), each={"timeout_seconds": 3.0})
    assert result.outcomes[0].status is OutcomeStatus.TIMED_OUT
    assert result.outcomes[0].duration_seconds == pytest.approx(22)


async def test_a_block_that_outlives_its_agent_changes_nothing_for_the_next_one() -> None:
    left_open: list[Any] = []

    async def agent(task: AgentAssignment) -> str:
        await anyio.lowlevel.checkpoint()
        if task.task_id == "t0":
            block = current_run().not_charged()
            block.__enter__()
            left_open.append(block)
            return "left it open"
        before = anyio.current_effective_deadline()
        left_open.pop().__exit__(None, None, None)
        assert anyio.current_effective_deadline() == before
        return "has its own deadline"

    group = ParallelExecutionGroup(
        group_id="g",
        assignments=[assignment(0, timeout_seconds=60.0), assignment(1, timeout_seconds=90.0)],
        max_concurrency=1,
    )
    with anyio.fail_after(600):
        result = await ParallelExecutor(engine=agent).execute_group(group)
    assert [outcome.error for outcome in result.outcomes] == [None, None]


@virtual_time
async def test_a_wait_that_begins_in_the_grace_period_ends_with_it() -> None:
    manager = ShutdownManager(CooperativeTimeout(grace_seconds=3))

    async def agent(task: AgentAssignment) -> None:
        manager.request_shutdown()
        with current_run().not_charged():
            await anyio.sleep_forever()

    with anyio.fail_after(100):
        result = await ParallelExecutor(engine=agent, shutdown_manager=manager).execute_group(group_of(1))
    assert result.outcomes[0].duration_seconds == pytest.approx(3)
    assert result.outcomes[0].status is OutcomeStatus.CANCELLED


@virtual_time
async def test_a_shutdown_ends_the_wait_with_its_grace_period() -> None:
    manager = ShutdownManager(CooperativeTimeout(grace_seconds=3))

    async def agent(task: AgentAssignment) -> None:
        await anyio.sleep(0.5)
        manager.request_shutdown()

    limited = RateLimitedEngine(FunctionEngine(agent), RateLimit(1, per_seconds=100))
    executor = ParallelExecutor(engine=limited, shutdown_manager=manager)
    before = anyio.current_time()
    result = await executor.execute_group(group_of(2, each={"timeout_seconds": 1.0}))
    assert anyio.current_time() - before == pytest.approx(3.5)
    assert [outcome.status for outcome in result.outcomes] == [OutcomeStatus.SUCCEEDED, OutcomeStatus.CANCELLED]
    assert result.outcomes[1].error == "Cancelled: the program is shutting down"


@virtual_time
async def test_a_wait_that_is_cancelled_takes_nothing_and_lets_the_next_move_up() -> None:
    log = Log()
    executor = ParallelExecutor(engine=RateLimitedEngine(FunctionEngine(log), RateLimit(1, per_seconds=10)))
    async with executor.open_group(group_of(4)) as group:
        await anyio.sleep(5)
        assert group.cancel_task("t1")
        await anyio.sleep(10)
        assert group.cancel_task("t3")
    assert log.starts == {"t0": 0, "t2": 10}
    statuses = [outcome.status for outcome in group.result.outcomes]
    assert statuses == [OutcomeStatus.SUCCEEDED, OutcomeStatus.CANCELLED] * 2


async def test_a_call_that_need_not_wait_starts_without_a_checkpoint() -> None:
    (task,) = group_of(1).assignments
    seen: list[str] = []

    async def agent(_task: AgentAssignment) -> None:
        engine = RateLimitedEngine(FunctionEngine(inner), RateLimit(1, per_seconds=1))
        with contextlib.suppress(StopIteration):
            engine.run(task).send(None)

    async def inner(_task: AgentAssignment) -> None:
        seen.append("ran")

    with anyio.fail_after(5):
        await ParallelExecutor(engine=agent).execute_group(group_of(1))
    assert seen == ["ran"]


def test_cancelled_at_any_step_nobody_is_left_in_line_and_no_time_is_lost() -> None:
    limit = RateLimit(1, per_seconds=1)
    starts: list[float] = []

    async def agent(task: AgentAssignment) -> None:
        starts.append(anyio.current_time())
        await anyio.lowlevel.checkpoint()

    async def program() -> None:
        starts.clear()
        await run(agent, limit, count=4, each={"timeout_seconds": 0.5})
        assert starts == pytest.approx([starts[0] + n for n in range(4)])

    def check() -> None:
        cells = limit._cells.get(None)
        for cell in () if cells is None else cells.by_key.values():
            assert not cell.line
            assert cell.users == 0
            assert cell.is_idle(anyio.current_time())
            assert cell.paid_off_at <= (starts[-1] + 1 if starts else 0) + 1e-6

    assert cancel_at_every_checkpoint(program, check=check) > 10


@pytest.mark.parametrize("steps_ahead", range(12))
def test_a_cancellation_in_the_instant_of_the_turn_is_not_lost_on_asyncio(steps_ahead: int) -> None:
    async def program() -> None:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        loop.call_at(loop.time() + 1, lambda: _later(loop, steps_ahead, task.cancel))
        await run(spends(Usage()), RateLimit(1, per_seconds=1), count=3)
        raise AssertionError("the cancellation was lost")

    with pytest.raises(asyncio.CancelledError):
        run_in_virtual_time(program, "asyncio")


def _later(loop: asyncio.AbstractEventLoop, steps: int, then: Callable[[], object]) -> None:
    if steps:
        loop.call_soon(_later, loop, steps - 1, then)
    else:
        then()


# Memory


@virtual_time
async def test_idle_keys_are_forgotten() -> None:
    limit = RateLimit(10, per_seconds=1, key=lambda a: a.task_id)

    async def agent(task: AgentAssignment) -> None:
        await anyio.sleep(1)

    await run(agent, limit, count=2_000, max_concurrency=10)
    assert len(limit._cells.get().by_key) <= 2 * KEYS_KEPT_AT_LEAST + 10


@virtual_time
async def test_keys_that_are_in_use_or_held_back_are_kept() -> None:
    async def agent(task: AgentAssignment) -> None:
        match task.task_id:
            case "t0":
                raise TooManyRequestsError
            case "t1":
                await anyio.sleep(6)
                current_run().record_usage(Usage(requests=20))

    log = Log(agent)
    limit = RateLimit(1, per_seconds=1, key=lambda a: a.task_id)
    with anyio.fail_after(100):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: run(log, limit, count=2))
            await anyio.sleep(5)
            others = ParallelExecutionGroup(group_id="g", assignments=[assignment(n) for n in range(10, 200)])
            engine = RateLimitedEngine(FunctionEngine(spends(Usage())), limit)
            await ParallelExecutor(engine=engine).execute_group(others)
            await anyio.sleep(2)
            await run(lambda task: log(assignment(int(task.task_id[1:]) + 2)), limit, count=2)
    assert log.starts == {"t0": 0, "t1": 0, "t2": 10, "t3": 25}


# Making one


@pytest.mark.parametrize(
    ("arguments", "fields", "message"),
    [
        ((0,), {}, "amount must be > 0"),
        ((-1,), {}, "amount must be > 0"),
        ((float("inf"),), {}, "amount must be finite"),
        ((True,), {}, "amount must be a number"),
        ((1, "words"), {}, "unit must be one of requests, tokens"),
        ((1,), {"per_seconds": 0}, "per_seconds must be > 0"),
        ((1,), {"burst": 0.5}, "burst must be >= 1"),
        ((1,), {"reserve": -1}, "reserve must be >= 0"),
        ((1,), {"reserve": "a lot"}, "reserve must be a number"),
        ((1,), {"key": "model"}, "key must be a function of an assignment"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(arguments: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        RateLimit(*arguments, **({"per_seconds": 1} | fields))


@virtual_time
@pytest.mark.parametrize("reserve", [-1, float("nan"), float("inf"), "a lot", None])
async def test_a_reserve_that_is_no_number_is_that_agents_failure_alone(reserve: Any) -> None:
    log = Log()
    limit = RateLimit(1, per_seconds=1, reserve=lambda a: reserve if a.task_id == "t0" else 1)
    result = await run(log, limit, count=3)
    assert "reserve must give a number >= 0" in (result.outcomes[0].error or "")
    assert log.starts == {"t1": 0, "t2": 1}


def test_an_engine_is_made_of_an_engine_and_limits() -> None:
    engine = FunctionEngine(spends(Usage()))
    with pytest.raises(TypeError, match="inner must be an engine"):
        RateLimitedEngine(spends(Usage()), RateLimit(1, per_seconds=1))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="limits must be RateLimits"):
        RateLimitedEngine(engine, 60)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        RateLimitedEngine(engine)
    assert repr(RateLimitedEngine(engine, RateLimit(1, per_seconds=1))).startswith("RateLimitedEngine(FunctionEngine(")


async def test_an_assignment_that_the_inner_engine_refuses_is_refused_before_anything_starts() -> None:
    class Refuses(FunctionEngine):
        def check(self, task: AgentAssignment) -> None:
            raise ValueError("not this one")

    for inner in (Refuses(spends(Usage())), FunctionEngine(spends(Usage()))):
        executor = ParallelExecutor(engine=RateLimitedEngine(inner, RateLimit(1, per_seconds=1)))
        with anyio.fail_after(5):
            if isinstance(inner, Refuses):
                with pytest.raises(ValueError, match="not this one"):
                    await executor.execute_group(group_of(1))
            else:
                assert (await executor.execute_group(group_of(1))).all_succeeded


async def test_a_run_without_a_group_has_no_timeout_to_charge() -> None:
    (task,) = group_of(1).assignments
    with RunContext("g", task, lambda: False).not_charged():
        await anyio.lowlevel.checkpoint()


@virtual_time
@pytest.mark.parametrize(("stall", "together"), [(0.03, 4), (10.0, 7)])
async def test_a_loop_that_wakes_up_late_catches_up_a_little_and_not_without_end(stall: float, together: int) -> None:
    """The sixth agent blocks the loop: then those that were due meanwhile start at once, as far as that is allowed."""
    starts: list[float] = []

    async def agent(task: AgentAssignment) -> None:
        starts.append(anyio.current_time())
        if len(starts) == 6:
            stall_for(stall)

    engine = RateLimitedEngine(FunctionEngine(agent), RateLimit(100, per_seconds=1))
    began = anyio.current_time()
    assert (await ParallelExecutor(engine=engine).execute_group(group_of(30))).all_succeeded
    at_once = [start for start in starts if start - began == pytest.approx(0.05 + stall, abs=0.001)]
    assert len(at_once) in (together - 1, together)
    if stall < 1:
        assert starts[-1] - began == pytest.approx(0.29)


@virtual_time
async def test_a_spent_budget_ends_retrying() -> None:
    attempts = 0

    async def agent(task: AgentAssignment) -> None:
        nonlocal attempts
        attempts += 1
        current_run().record_usage(Usage(cost=1))
        raise ConnectionError

    policy = RetryPolicy(attempts=10, retry_on=(ConnectionError,))
    group = group_of(1, budget=Budget(max_cost=3))
    result = await ParallelExecutor(engine=RetryEngine(FunctionEngine(agent), policy)).execute_group(group)
    assert (attempts, result.outcomes[0].usage.cost) == (3, 3)
