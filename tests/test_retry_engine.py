"""RetryEngine: which failures get another attempt, when, and what is told and kept of all of them."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import stamina
from attrs import define, field
from clocks import virtual_time
from groups import group_of
from hypothesis import given
from hypothesis import strategies as st
from loguru import logger

from parallel_agents import (
    AgentAssignment,
    AgentOutcome,
    AgentRunResult,
    CooperativeTimeout,
    FunctionEngine,
    OutcomeStatus,
    ParallelEvent,
    ParallelExecutionError,
    ParallelExecutor,
    RunContext,
    ShutdownManager,
    TerminationReason,
    Usage,
    current_run,
)
from parallel_agents.engines import _retry_after
from parallel_agents.engines._retry_after import retry_after_seconds
from parallel_agents.engines.retry import RetryEngine, RetryPolicy
from parallel_agents.events import PARALLEL_AGENT_RETRY
from parallel_agents.testing import cancel_at_every_checkpoint

pytestmark = pytest.mark.anyio


Agent = Callable[[AgentAssignment], Awaitable[Any]]


class TooManyRequestsError(Exception):
    """As a client raises it for status 429."""

    def __init__(self, seconds: Any) -> None:
        super().__init__("429")
        self.retry_after_seconds = seconds


class HTTPStatusError(Exception):
    """As httpx raises it."""

    def __init__(self, **headers: str) -> None:
        super().__init__("429 Too Many Requests")
        self.response = SimpleNamespace(headers={name.replace("_", "-"): value for name, value in headers.items()})


def at_once(**fields: Any) -> RetryPolicy:
    """Return a policy that waits only if a test says so."""
    defaults: dict[str, Any] = {"retry_on": ValueError, "initial_wait_seconds": 0.0, "jitter_seconds": 0.0}
    return RetryPolicy(**(defaults | fields))


async def outcome_of(agent: Agent, policy: RetryPolicy, each: Any = None, **options: Any) -> AgentOutcome[Any]:
    engine = RetryEngine(FunctionEngine(agent), policy)
    with anyio.fail_after(500):
        result = await ParallelExecutor(engine=engine, **options).execute_group(group_of(1, each=each))
    return result.outcomes[0]


@define
class Script:
    """An agent that does the next thing of a list in each attempt: raises what can be raised, and returns the rest."""

    steps: Iterable[object]
    started: list[float] = field(factory=list)
    attempts: list[int] = field(factory=list)
    _left: Iterator[object] = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._left = iter(self.steps)

    async def __call__(self, task: AgentAssignment) -> Any:
        self.started.append(anyio.current_time())
        self.attempts.append(current_run().attempt)
        await anyio.lowlevel.checkpoint()
        step = next(self._left)
        if isinstance(step, BaseException):
            raise step
        return step

    @property
    def waits(self) -> list[float]:
        return [later - earlier for earlier, later in zip(self.started, self.started[1:], strict=False)]


def result_of(reason: TerminationReason, **fields: Any) -> AgentRunResult[Any]:
    return AgentRunResult(task_id="t0", agent_id="a0", termination_reason=reason, **fields)


# Attempts


async def test_an_agent_that_fails_is_started_again_until_it_succeeds() -> None:
    agent = Script([ValueError("one"), ValueError("two"), "three"])
    outcome = await outcome_of(agent, at_once())
    assert (outcome.status, outcome.output, outcome.attempts) == (OutcomeStatus.SUCCEEDED, "three", 3)
    assert agent.attempts == [1, 2, 3]


async def test_an_agent_that_succeeds_is_started_once() -> None:
    agent = Script(["one"])
    outcome = await outcome_of(agent, at_once())
    assert (outcome.output, outcome.attempts) == ("one", 1)


async def test_the_last_error_is_kept_as_it_is_with_the_earlier_ones_as_notes() -> None:
    last = ValueError("three")
    outcome = await outcome_of(Script([ValueError("one"), OSError(), last]), at_once(retry_on=(ValueError, OSError)))
    assert outcome.exception is last
    assert outcome.error == "ValueError: three"
    assert last.__notes__ == ["Attempt 1: ValueError: one", "Attempt 2: OSError (no message)"]
    assert outcome.attempts == 3


async def test_an_error_that_nobody_retries_ends_it_and_keeps_the_earlier_ones_as_notes() -> None:
    final = KeyError("two")
    outcome = await outcome_of(Script([ValueError("one"), final]), at_once())
    assert outcome.exception is final
    assert final.__notes__ == ["Attempt 1: ValueError: one"]


async def test_one_attempt_is_no_retry() -> None:
    error = ValueError("one")
    outcome = await outcome_of(Script([error]), at_once(attempts=1))
    assert outcome.attempts == 1
    assert not hasattr(error, "__notes__")


async def test_a_function_may_say_which_errors_are_retried() -> None:
    asked: list[Exception] = []

    def ask(error: Exception) -> bool:
        asked.append(error)
        return "again" in str(error)

    first, second = ValueError("again"), ValueError("no more")
    outcome = await outcome_of(Script([first, second]), at_once(retry_on=ask))
    assert asked == [first, second]
    assert outcome.exception is second


@pytest.mark.parametrize(
    ("errors", "attempts"),
    [([ValueError(), ValueError()], 2), ([ValueError(), KeyError()], 1)],
    ids=["all", "some"],
)
async def test_a_group_of_errors_is_retried_if_all_of_them_are(errors: list[Exception], attempts: int) -> None:
    outcome = await outcome_of(Script([ExceptionGroup("both", errors), "two"]), at_once())
    assert outcome.attempts == attempts


async def test_each_agent_of_a_group_has_attempts_of_its_own() -> None:
    attempts: dict[str, list[int]] = {}

    async def agent(task: AgentAssignment) -> None:
        attempts.setdefault(task.task_id, []).append(current_run().attempt)
        await anyio.lowlevel.checkpoint()
        if len(attempts[task.task_id]) <= int(task.task_id[1:]):
            raise ValueError

    with anyio.fail_after(5):
        executor = ParallelExecutor(engine=RetryEngine(FunctionEngine(agent), at_once(attempts=9)))
        result = await executor.execute_group(group_of(4))
    assert result.all_succeeded
    assert [outcome.attempts for outcome in result.outcomes] == [1, 2, 3, 4]
    assert attempts == {f"t{n}": list(range(1, n + 2)) for n in range(4)}


# What is final


@pytest.mark.parametrize("kind", [MemoryError, RecursionError])
@pytest.mark.parametrize("is_grouped", [False, True])
async def test_a_fatal_error_is_never_retried(kind: type[Exception], is_grouped: bool) -> None:
    error = ExceptionGroup("tasks", [ValueError(), ExceptionGroup("inner", [kind()])]) if is_grouped else kind()
    agent = Script([error, "two"])
    with pytest.raises(ParallelExecutionError):
        await outcome_of(agent, at_once(retry_on=Exception))
    assert agent.attempts == [1]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
async def test_an_order_to_end_the_program_is_never_retried(kind: type[BaseException]) -> None:
    agent = Script([kind(), "two"])
    with pytest.raises(kind):
        await outcome_of(agent, at_once(retry_on=Exception))
    assert agent.attempts == [1]


async def test_a_spent_budget_is_never_retried() -> None:
    agent = Script([result_of(TerminationReason.BUDGET_EXHAUSTED), "two"])
    outcome = await outcome_of(agent, at_once(retry_results=lambda result: True))
    assert agent.attempts == [1]
    assert outcome.status is OutcomeStatus.FAILED


async def test_cancellation_is_never_retried() -> None:
    started: list[str] = []

    async def agent(task: AgentAssignment) -> None:
        started.append(task.task_id)
        await anyio.sleep_forever()

    with anyio.fail_after(5):
        executor = ParallelExecutor(engine=RetryEngine(FunctionEngine(agent), at_once(retry_on=Exception)))
        async with executor.open_group(group_of(1)) as run:
            await anyio.wait_all_tasks_blocked()
            run.cancel_task("t0")
    assert started == ["t0"]
    assert run.result.outcomes[0].status is OutcomeStatus.CANCELLED


async def test_what_an_agent_raises_when_it_is_cancelled_is_not_retried() -> None:
    started: list[str] = []
    recorder = Recorder()

    async def agent(task: AgentAssignment) -> None:
        started.append(task.task_id)
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            raise ValueError("half done") from None

    with anyio.fail_after(5):
        engine = RetryEngine(FunctionEngine(agent), at_once())
        async with ParallelExecutor(engine=engine, observers=[recorder]).open_group(group_of(1)) as run:
            await anyio.wait_all_tasks_blocked()
            run.cancel_task("t0")
    assert started == ["t0"]
    assert recorder.retries == []


async def test_nothing_is_retried_once_the_program_shuts_down() -> None:
    manager = ShutdownManager(CooperativeTimeout(grace_seconds=30))

    async def agent(task: AgentAssignment) -> None:
        manager.request_shutdown()
        raise ValueError(current_run().attempt)

    outcome = await outcome_of(agent, at_once(), shutdown_manager=manager)
    assert outcome.error == "ValueError: 1"


# Results


@pytest.mark.parametrize(
    "retry_results",
    [{TerminationReason.ERROR}, lambda result: result.termination_reason is TerminationReason.ERROR],
    ids=["reasons", "function"],
)
async def test_a_result_that_the_policy_refuses_is_retried(retry_results: Any) -> None:
    agent = Script([result_of(TerminationReason.ERROR, error_message="overloaded"), "two"])
    outcome = await outcome_of(agent, at_once(retry_results=retry_results))
    assert (outcome.output, outcome.attempts) == ("two", 2)


async def test_results_are_not_retried_unless_the_policy_says_so() -> None:
    outcome = await outcome_of(Script([result_of(TerminationReason.MAX_TURNS), "two"]), at_once(retry_on=Exception))
    assert outcome.attempts == 1


async def test_a_refused_result_of_the_last_attempt_is_returned() -> None:
    results = [result_of(TerminationReason.ERROR, error_message=text) for text in ("one", "two", "three")]
    outcome = await outcome_of(Script(results), at_once(retry_results={TerminationReason.ERROR}))
    assert outcome.result == results[-1]
    assert outcome.attempts == 3


async def test_a_refused_result_before_an_error_is_in_its_notes() -> None:
    error = KeyError("three")
    overloaded = result_of(TerminationReason.ERROR, error_message="overloaded")
    refused = {TerminationReason.ERROR, TerminationReason.STAGNATION}
    await outcome_of(
        Script([overloaded, result_of(TerminationReason.STAGNATION), error]), at_once(retry_results=refused)
    )
    assert error.__notes__ == ["Attempt 1: ended with error: overloaded", "Attempt 2: ended with stagnation"]


async def test_what_is_no_result_is_left_to_the_executor() -> None:
    class Wrong:
        async def run(self, task: AgentAssignment, /) -> Any:
            if current_run().attempt == 1:
                raise ValueError
            return "no result"

    with anyio.fail_after(5):
        engine = RetryEngine(Wrong(), at_once(retry_results=lambda result: True))
        (outcome,) = (await ParallelExecutor(engine=engine).execute_group(group_of(1))).outcomes
    assert outcome.error == "The engine returned str instead of an AgentRunResult"
    assert outcome.attempts == 2


# Waiting


@virtual_time
async def test_waits_double_up_to_the_cap_on_the_clock_of_the_event_loop() -> None:
    agent = Script([ValueError()] * 6)
    await outcome_of(agent, at_once(attempts=6, initial_wait_seconds=1, max_wait_seconds=5))
    assert agent.waits == [1, 2, 4, 5, 5]


@virtual_time
async def test_a_random_part_of_the_jitter_is_added_and_stays_below_the_cap() -> None:
    agent = Script([ValueError()] * 200)
    policy = at_once(attempts=200, jitter_seconds=2, max_wait_seconds=1, total_seconds=None)
    await outcome_of(agent, policy)
    assert all(0 <= wait < 1.001 for wait in agent.waits)
    assert len({round(wait, 6) for wait in agent.waits if wait < 0.99}) > 20  # about half of them are at the cap


@virtual_time
async def test_two_thousand_attempts_do_not_overflow_the_wait() -> None:
    agent = Script([ValueError()] * 2_000)
    await outcome_of(
        agent, at_once(attempts=2_000, initial_wait_seconds=0.001, max_wait_seconds=0.002, total_seconds=None)
    )
    assert len(agent.attempts) == 2_000


@virtual_time
@pytest.mark.parametrize(
    "error",
    [
        TooManyRequestsError(20),
        TooManyRequestsError(20.0),
        HTTPStatusError(retry_after="20"),
        ExceptionGroup("tasks", [TooManyRequestsError(3), HTTPStatusError(retry_after="20")]),
    ],
    ids=["int", "float", "header", "group"],
)
async def test_a_server_that_says_when_is_asked_again_then_and_no_sooner(error: Exception) -> None:
    agent = Script([error, "two"])
    policy = at_once(retry_on=(TooManyRequestsError, HTTPStatusError), initial_wait_seconds=1, max_wait_seconds=5)
    outcome = await outcome_of(agent, policy)
    assert (agent.waits, outcome.output) == ([20], "two")


@virtual_time
async def test_agents_that_a_server_sent_away_together_do_not_come_back_together() -> None:
    waits = []
    for _ in range(20):
        agent = Script([TooManyRequestsError(20), "two"])
        await outcome_of(agent, at_once(retry_on=TooManyRequestsError, jitter_seconds=1))
        waits += agent.waits
    assert all(19.999 < wait < 21.001 for wait in waits)
    assert len(set(waits)) > 10


@virtual_time
async def test_an_attempt_beyond_the_total_time_is_not_waited_for() -> None:
    agent = Script([ValueError(f"{n}") for n in range(9)])
    before = anyio.current_time()
    outcome = await outcome_of(agent, at_once(attempts=9, initial_wait_seconds=1, total_seconds=8))
    assert agent.waits == [1, 2, 4]
    assert anyio.current_time() - before == 7
    assert outcome.error == "ValueError: 3"
    assert outcome.exception is not None
    assert len(outcome.exception.__notes__) == 3


@virtual_time
async def test_a_server_that_asks_for_more_than_the_total_time_is_not_waited_for() -> None:
    before = anyio.current_time()
    outcome = await outcome_of(Script([TooManyRequestsError(3_600), "two"]), at_once(retry_on=TooManyRequestsError))
    assert outcome.attempts == 1
    assert anyio.current_time() == before


@virtual_time
async def test_the_total_time_counts_what_attempts_take() -> None:
    async def agent(task: AgentAssignment) -> None:
        await anyio.sleep(6)
        raise ValueError

    outcome = await outcome_of(agent, at_once(attempts=9, total_seconds=10))
    assert outcome.attempts == 2


@virtual_time
async def test_a_timeout_ends_the_wait() -> None:
    before = anyio.current_time()
    outcome = await outcome_of(Script([ValueError()]), at_once(initial_wait_seconds=30), each={"timeout_seconds": 10.0})
    assert (outcome.status, outcome.attempts) == (OutcomeStatus.TIMED_OUT, 1)
    assert anyio.current_time() - before == 10


async def test_a_wait_can_be_cancelled() -> None:
    recorder = Recorder()
    engine = RetryEngine(FunctionEngine(Script([ValueError()])), at_once(initial_wait_seconds=30))
    with anyio.fail_after(5):
        async with ParallelExecutor(engine=engine, observers=[recorder]).open_group(group_of(1)) as run:
            while not recorder.retries:
                await anyio.lowlevel.checkpoint()
            await anyio.wait_all_tasks_blocked()
            run.cancel_task("t0")
    assert run.result.outcomes[0].status is OutcomeStatus.CANCELLED


def test_cancelled_at_any_step_it_stops_and_starts_nothing_afterwards() -> None:
    running = made = 0
    runs: list[Any] = []

    async def agent(task: AgentAssignment) -> None:
        nonlocal running, made
        running, made = running + 1, made + 1
        try:
            await anyio.sleep(1)
            raise ValueError
        finally:
            running -= 1

    async def program() -> None:
        nonlocal made
        made = 0
        executor = ParallelExecutor(engine=RetryEngine(FunctionEngine(agent), at_once(initial_wait_seconds=1)))
        async with executor.open_group(group_of(2)) as run:
            runs.append(run)

    def check() -> None:
        outcomes = runs[-1].result.outcomes
        assert running == 0
        assert sum(outcome.attempts for outcome in outcomes) == made
        assert {outcome.status for outcome in outcomes} <= {OutcomeStatus.CANCELLED, OutcomeStatus.FAILED}

    assert cancel_at_every_checkpoint(program, check=check) > 10
    assert made == 6


# What is told and added up


@define
class Recorder:
    """An observer that keeps the retries."""

    retries: list[ParallelEvent] = field(factory=list)

    def on_event(self, event: ParallelEvent) -> None:
        if event.name == PARALLEL_AGENT_RETRY:
            self.retries.append(event)


@virtual_time
async def test_each_retry_is_one_event() -> None:
    recorder = Recorder()
    steps = [ValueError("{one}"), result_of(TerminationReason.ERROR, error_message="two"), ValueError("three")]
    policy = at_once(initial_wait_seconds=1, retry_results={TerminationReason.ERROR})
    await outcome_of(Script(steps), policy, observers=[recorder])
    assert [(e.group_id, e.task_id, e.agent_id, e.at_seconds) for e in recorder.retries] == [
        ("g", "t0", "a0", 0),
        ("g", "t0", "a0", 1),
    ]
    assert [e.fields for e in recorder.retries] == [
        {"attempt": 1, "wait_seconds": 1, "error": "ValueError: {one}"},
        {"attempt": 2, "wait_seconds": 2, "error": "ended with error: two"},
    ]


def test_retries_write_nothing_to_stderr_where_no_logging_is_set_up() -> None:
    program = """
import anyio
from parallel_agents import AgentIdentity, FunctionEngine, ParallelExecutionGroup, ParallelExecutor, Task
from parallel_agents.engines.retry import RetryEngine, RetryPolicy

async def agent(assignment):
    raise ValueError

policy = RetryPolicy(retry_on=ValueError, initial_wait_seconds=0, jitter_seconds=0)
executor = ParallelExecutor(engine=RetryEngine(FunctionEngine(agent), policy))
group = ParallelExecutionGroup.map("g", AgentIdentity(id="a"), [Task(id="t")])
print(anyio.run(executor.execute_group, group).outcomes[0].attempts)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("3\n", "")


async def test_the_usage_of_all_attempts_is_added_up() -> None:
    async def agent(task: AgentAssignment) -> AgentRunResult[None]:
        current_run().record_usage(Usage(requests=1, input_tokens=10, cost=0.25))
        if current_run().attempt < 3:
            raise ValueError
        return result_of(TerminationReason.COMPLETED, usage=Usage(requests=1, input_tokens=10, output_tokens=7))

    outcome = await outcome_of(agent, at_once())
    assert outcome.usage == Usage(requests=3, input_tokens=30, output_tokens=7, cost=0.75)
    assert outcome.result is not None
    assert outcome.result.usage == outcome.usage


async def test_what_refused_results_report_is_added_up_and_what_was_metered_of_it_not_twice() -> None:
    async def agent(task: AgentAssignment) -> AgentRunResult[None]:
        current_run().record_usage(Usage(requests=2))
        return result_of(TerminationReason.MAX_TURNS, usage=Usage(requests=2, output_tokens=5))

    outcome = await outcome_of(agent, at_once(retry_results={TerminationReason.MAX_TURNS}))
    assert outcome.usage == Usage(requests=6, output_tokens=15)


async def test_what_refused_results_report_is_kept_when_the_last_attempt_fails() -> None:
    refused = result_of(TerminationReason.MAX_TURNS, usage=Usage(requests=2))
    policy = at_once(retry_results={TerminationReason.MAX_TURNS})
    outcome = await outcome_of(Script([refused, refused, ValueError()]), policy)
    assert outcome.usage == Usage(requests=4)


@given(
    st.lists(st.tuples(st.integers(0, 9), st.none() | st.integers(0, 9)), min_size=1, max_size=5).filter(
        lambda spending: spending[-1][1] is not None
    )
)
@pytest.mark.parametrize("is_retried_twice", [False, True])
async def test_usage_is_the_sum_of_what_each_attempt_metered_or_reported(
    is_retried_twice: bool, spending: list[tuple[int, int | None]]
) -> None:
    attempts: list[int] = []

    async def agent(task: AgentAssignment) -> AgentRunResult[None]:
        metered, reported = spending[len(attempts)]
        attempts.append(current_run().attempt)
        current_run().record_usage(Usage(requests=metered))
        if reported is None:
            raise ValueError
        is_last = len(attempts) == len(spending)
        reason = TerminationReason.COMPLETED if is_last else TerminationReason.MAX_TURNS
        return result_of(reason, usage=Usage(requests=reported))

    policy = at_once(attempts=9, retry_results={TerminationReason.MAX_TURNS})
    engine = RetryEngine(FunctionEngine(agent), policy)
    outer = RetryEngine(engine, policy) if is_retried_twice else engine
    with anyio.fail_after(5):
        (outcome,) = (await ParallelExecutor(engine=outer).execute_group(group_of(1))).outcomes
    assert outcome.usage.requests == sum(max(metered, reported or 0) for metered, reported in spending)


async def test_what_stamina_leaves_to_the_garbage_collector_does_not_keep_the_run() -> None:
    async def agent(task: AgentAssignment) -> None:
        if current_run().attempt == 1:
            raise ValueError

    gc.collect()
    gc.disable()
    try:
        engine = RetryEngine(FunctionEngine(agent), at_once())
        with anyio.fail_after(5):
            async with ParallelExecutor(engine=engine).open_group(group_of(1)) as run:
                pass
        assert run.result.outcomes[0].attempts == 2
        is_kept = weakref.ref(run)
        del run
        assert is_kept() is None
    finally:
        gc.enable()


async def test_an_event_of_a_run_without_a_group_goes_to_the_log() -> None:
    (task,) = group_of(1).assignments
    lines: list[dict[str, Any]] = []
    logger.enable("parallel_agents")
    sink = logger.add(lambda message: lines.append(message.record["extra"]))
    try:
        RunContext("g", task, lambda: False).emit(PARALLEL_AGENT_RETRY, attempt=1)
    finally:
        logger.remove(sink)
        logger.disable("parallel_agents")
    assert lines == [{"group_id": "g", "agent_id": "a0", "task_id": "t0", "attempt": 1}]


# Making one


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "retry_on"),
        ({"retry_on": ()}, "retry_on must name at least one exception type"),
        ({"retry_on": BaseException}, "retry_on must be types of Exception"),
        ({"retry_on": (ValueError, "OSError")}, "retry_on must be types of Exception"),
        ({"retry_on": ValueError, "attempts": 0}, "attempts must be >= 1"),
        ({"retry_on": ValueError, "attempts": 2.5}, "attempts must be an integer"),
        ({"retry_on": ValueError, "initial_wait_seconds": -1}, "initial_wait_seconds must be >= 0"),
        ({"retry_on": ValueError, "max_wait_seconds": float("inf")}, "max_wait_seconds must be finite"),
        ({"retry_on": ValueError, "jitter_seconds": float("nan")}, "jitter_seconds must be finite"),
        ({"retry_on": ValueError, "total_seconds": 0}, "total_seconds must be > 0"),
        ({"retry_on": ValueError, "retry_results": {"error"}}, "retry_results must be TerminationReasons"),
        ({"retry_on": ValueError, "retry_results": {TerminationReason.COMPLETED}}, "must not hold COMPLETED"),
        ({"retry_on": ValueError, "retry_results": set(TerminationReason)}, "BUDGET_EXHAUSTED, COMPLETED"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        RetryPolicy(**fields)


def test_a_policy_takes_one_type_several_types_or_a_function() -> None:
    assert RetryPolicy(retry_on=ValueError) == RetryPolicy(retry_on=[ValueError])
    assert RetryPolicy(retry_on=callable).retry_on is callable


def test_an_engine_is_made_of_an_engine_and_a_policy() -> None:
    engine = FunctionEngine(Script([]))
    with pytest.raises(TypeError, match="inner must be an engine"):
        RetryEngine(Script([]), at_once())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="policy must be a RetryPolicy"):
        RetryEngine(engine, 3)  # type: ignore[arg-type]
    assert repr(RetryEngine(engine, at_once())).startswith("RetryEngine(FunctionEngine(")


async def test_an_assignment_that_the_inner_engine_refuses_is_refused_before_anything_starts() -> None:
    class Refuses(FunctionEngine):
        def check(self, task: AgentAssignment) -> None:
            raise ValueError("not this one")

    agent = Script(["one"])
    with pytest.raises(ValueError, match="not this one"):
        await ParallelExecutor(engine=RetryEngine(Refuses(agent), at_once())).execute_group(group_of(1))
    assert agent.attempts == []


async def test_outside_an_executor_it_says_what_is_missing() -> None:
    (task,) = group_of(1).assignments
    with pytest.raises(LookupError, match="inside an engine call"):
        await RetryEngine(FunctionEngine(Script(["one"])), at_once()).run(task)


def test_without_stamina_it_says_what_to_install() -> None:
    program = "import sys; sys.modules['stamina'] = None; import parallel_agents.engines.retry"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: RetryEngine needs stamina: pip install 'parallel-agents[retry]'" in run.stderr


# stamina's switches


async def test_nothing_is_retried_while_stamina_is_switched_off() -> None:
    recorder = Recorder()
    stamina.set_active(False)
    try:
        outcome = await outcome_of(Script([ValueError(), "two"]), at_once(), observers=[recorder])
    finally:
        stamina.set_active(True)
    assert (outcome.attempts, recorder.retries) == (1, [])


@virtual_time
async def test_nothing_is_waited_for_in_the_testing_mode_of_stamina() -> None:
    agent = Script([ValueError("one"), result_of(TerminationReason.MAX_TURNS), "three"])
    policy = at_once(initial_wait_seconds=60, retry_results={TerminationReason.MAX_TURNS})
    with stamina.set_testing(True, attempts=2):
        outcome = await outcome_of(agent, policy)
    assert agent.waits == [0]
    assert outcome.result is not None
    assert outcome.result.termination_reason is TerminationReason.MAX_TURNS


# Retry-After


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (ValueError(), None),
        (TooManyRequestsError(None), None),
        (TooManyRequestsError("20"), None),
        (TooManyRequestsError(-1), 0),
        (TooManyRequestsError(float("nan")), None),
        (TooManyRequestsError(float("inf")), None),
        (TooManyRequestsError(10**400), None),
        (HTTPStatusError(), None),
        (HTTPStatusError(retry_after="0"), 0),
        (HTTPStatusError(retry_after="1.5"), 1.5),
        (HTTPStatusError(retry_after="9" * 400), None),
        (HTTPStatusError(retry_after="nan"), None),
        (HTTPStatusError(retry_after="soon"), None),
        (HTTPStatusError(retry_after=""), None),
        (HTTPStatusError(retry_after="Wed, 21 Oct 2015 07:28:00 GMT"), 0),
        (HTTPStatusError(retry_after="Wed, 99 Oct 2015 07:28:00 GMT"), None),
        (
            ExceptionGroup(
                "g", [ValueError(), TooManyRequestsError(1), ExceptionGroup("h", [TooManyRequestsError(2)])]
            ),
            2,
        ),
    ],
    ids=repr,
)
def test_an_error_says_how_long_to_wait_or_nothing(error: Exception, seconds: float | None) -> None:
    assert retry_after_seconds(error) == seconds


def test_a_date_counts_from_now() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    later = now + timedelta(seconds=90)
    assert _retry_after.parsed(format_datetime(later, usegmt=True), now) == 90
    assert _retry_after.parsed("Thu, 01 Jan 2026 00:01:30 -0000", now) == 90


@given(st.text())
def test_no_header_makes_it_fail(value: str) -> None:
    seconds = _retry_after.parsed(value, datetime.now(UTC))
    assert seconds is None or seconds >= 0
