"""FallbackEngine and IdleTimeoutEngine: what runs instead, and when an agent has been silent for too long."""

from typing import Any

import anyio
import anyio.lowlevel
import pytest
from clocks import virtual_time
from groups import group_of

from parallel_agents import (
    AgentAssignment,
    AgentOutcome,
    AgentRunResult,
    CooperativeTimeout,
    FunctionEngine,
    OutcomeStatus,
    ParallelExecutionError,
    ParallelExecutor,
    ShutdownManager,
    TerminationReason,
    Usage,
    current_run,
)
from parallel_agents.engines.fallback import FallbackEngine
from parallel_agents.engines.idle_timeout import IdleTimeoutEngine
from parallel_agents.testing import cancel_at_every_checkpoint

pytestmark = pytest.mark.anyio


class Says:
    """An engine that ends each agent in one way, and says what it spent in the result."""

    def __init__(self, ending: Exception | TerminationReason) -> None:
        self.ending = ending
        self.calls = 0

    def __repr__(self) -> str:
        return "Says()"

    def check(self, assignment: AgentAssignment) -> None:
        if assignment.max_turns == 7:
            raise ValueError("not that one")

    async def run(self, assignment: AgentAssignment) -> AgentRunResult[Any]:
        self.calls += 1
        if isinstance(self.ending, Exception):
            current_run().record_usage(Usage(cost=1.0))
            raise self.ending
        is_error = self.ending is TerminationReason.ERROR
        return AgentRunResult(
            task_id=assignment.task_id,
            agent_id=assignment.agent_id,
            termination_reason=self.ending,
            error_message="said so" if is_error else None,
            usage=Usage(cost=10.0),
        )


async def outcome_with(engine: Any, **options: Any) -> AgentOutcome[Any]:
    with anyio.fail_after(60):
        result = await ParallelExecutor(engine=engine, **options).execute_group(group_of(1))
    return result.outcomes[0]


async def test_the_next_engine_runs_what_the_first_one_failed_at_and_all_usage_is_kept() -> None:
    engines = [Says(OSError("down")), Says(TerminationReason.ERROR), Says(TerminationReason.COMPLETED)]
    unused = Says(TerminationReason.COMPLETED)
    outcome = await outcome_with(FallbackEngine(*engines, unused))
    assert outcome.status is OutcomeStatus.SUCCEEDED
    assert outcome.usage == Usage(cost=21.0)
    assert outcome.result is not None
    assert outcome.result.usage == outcome.usage
    assert [engine.calls for engine in (*engines, unused)] == [1, 1, 1, 0]


@pytest.mark.parametrize("reason", [TerminationReason.COMPLETED, TerminationReason.PARKED])
async def test_what_is_no_failure_needs_no_other_engine(reason: TerminationReason) -> None:
    second = Says(TerminationReason.COMPLETED)
    outcome = await outcome_with(FallbackEngine(Says(reason), second))
    assert outcome.result is not None
    assert outcome.result.termination_reason is reason
    assert outcome.usage == Usage(cost=10.0)
    assert second.calls == 0


async def test_the_last_error_is_kept_with_the_earlier_failures_as_its_notes() -> None:
    same = Says(OSError("down"))
    outcome = await outcome_with(FallbackEngine(same, Says(TerminationReason.MAX_TURNS), Says(ValueError("last"))))
    assert outcome.error == "ValueError: last"
    assert outcome.exception is not None
    assert outcome.exception.__notes__ == ["Says(): OSError: down", "Says(): ended with max_turns"]
    twice = await outcome_with(FallbackEngine(same, same))
    assert twice.error == "OSError: down"
    assert same.calls == 3
    last = await outcome_with(FallbackEngine(same, Says(TerminationReason.ERROR)))
    assert last.result is not None
    assert last.result.error_message == "said so"
    assert last.usage == Usage(cost=11.0)


async def test_there_is_no_other_engine_for_what_is_final() -> None:
    second = Says(TerminationReason.COMPLETED)
    outcome = await outcome_with(FallbackEngine(Says(TerminationReason.BUDGET_EXHAUSTED), second))
    assert outcome.status is OutcomeStatus.FAILED
    with pytest.raises(ParallelExecutionError, match="MemoryError"):
        await outcome_with(FallbackEngine(Says(MemoryError()), second))
    assert second.calls == 0


@pytest.mark.parametrize("raises", [True, False])
async def test_there_is_no_other_engine_while_the_program_shuts_down(raises: bool) -> None:
    manager = ShutdownManager(CooperativeTimeout(grace_seconds=60))

    class Fails(Says):
        async def run(self, assignment: AgentAssignment) -> AgentRunResult[Any]:
            manager.request_shutdown()
            return await super().run(assignment)

    first = Fails(OSError("down") if raises else TerminationReason.ERROR)
    second = Says(TerminationReason.COMPLETED)
    outcome = await outcome_with(FallbackEngine(first, second), shutdown_manager=manager)
    assert outcome.status is OutcomeStatus.FAILED
    assert second.calls == 0


async def test_what_is_no_result_is_passed_on_for_the_executor_to_refuse() -> None:
    class Wrong(Says):
        async def run(self, assignment: AgentAssignment) -> AgentRunResult[Any]:
            return None  # type: ignore[return-value]

    outcome = await outcome_with(FallbackEngine(Wrong(OSError()), Says(OSError())))
    assert outcome.error == "The engine returned NoneType instead of an AgentRunResult"


async def test_engines_refuse_what_any_of_theirs_refuses() -> None:
    says = Says(OSError())
    for engine in (FallbackEngine(Says(OSError()), says), IdleTimeoutEngine(says, 1.0)):
        with pytest.raises(ValueError, match="not that one"):
            await ParallelExecutor(engine=engine).execute_group(group_of(1, each={"max_turns": 7}))
    with pytest.raises(TypeError, match="must be an engine"):
        FallbackEngine(says, anyio.sleep)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="idle_seconds"):
        IdleTimeoutEngine(says, 0)
    with pytest.raises(TypeError, match="inner"):
        IdleTimeoutEngine(anyio.sleep, 1)  # type: ignore[arg-type]
    assert repr(FallbackEngine(says, says)) == "FallbackEngine(Says(), Says())"


def test_a_cancelled_agent_gets_no_other_engine_whenever_it_is_cancelled() -> None:
    cancelled: list[str] = []

    async def first(_task: AgentAssignment) -> None:
        try:
            await anyio.lowlevel.checkpoint()
        except BaseException:
            cancelled.append("first")
            raise OSError from None  # swallows it, which must not start the second one
        raise OSError

    async def second(_task: AgentAssignment) -> None:
        assert not cancelled
        await anyio.lowlevel.checkpoint()

    async def program() -> None:
        cancelled.clear()
        engine = IdleTimeoutEngine(FallbackEngine(FunctionEngine(first), FunctionEngine(second)), 60.0)
        result = await ParallelExecutor(engine=engine).execute_group(group_of(1))
        assert result.all_succeeded

    assert cancel_at_every_checkpoint(program) > 3


@virtual_time
async def test_an_agent_that_reports_may_go_on_and_a_silent_one_is_ended() -> None:
    async def agent(_task: AgentAssignment) -> None:
        for _ in range(5):
            await anyio.sleep(9)
            current_run().record_usage(Usage(requests=1))
        await anyio.sleep_forever()

    started = anyio.current_time()
    outcome = await outcome_with(IdleTimeoutEngine(FunctionEngine(agent), 10.0))
    assert outcome.status is OutcomeStatus.FAILED
    assert outcome.error == "TimeoutError: reported nothing for 10 s"
    assert outcome.usage == Usage(requests=5)
    assert anyio.current_time() - started == 55


async def test_nobody_watches_usage_after_the_block_in_which_it_was_watched() -> None:
    seen: list[tuple[str, float]] = []

    async def agent(_task: AgentAssignment) -> None:
        run = current_run()
        with run.watching_usage(lambda usage: seen.append(("outer", usage.cost))):
            with run.watching_usage(lambda usage: seen.append(("inner", usage.cost))):
                run.record_usage(Usage(cost=1.0))
            run.record_usage(Usage(cost=2.0))
        run.record_usage(Usage(cost=3.0))

    outcome = await outcome_with(FunctionEngine(agent))
    assert seen == [("outer", 1.0), ("inner", 1.0), ("outer", 2.0)]
    assert outcome.usage == Usage(cost=6.0)
