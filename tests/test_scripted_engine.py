"""ScriptedEngine: its agents do what they are told, and it remembers who ran when."""

from typing import Any

import anyio
import pytest
from clocks import virtual_time
from groups import group_of

from parallel_agents import (
    AgentAssignment,
    OutcomeStatus,
    ParallelExecutionResult,
    ParallelExecutor,
    TerminationReason,
    Usage,
)
from parallel_agents.engines.retry import RetryEngine, RetryPolicy
from parallel_agents.testing import Act, ScriptedEngine

pytestmark = pytest.mark.anyio


async def result_of(engine: Any, count: int, **options: Any) -> ParallelExecutionResult[Any]:
    with anyio.fail_after(60):
        return await ParallelExecutor(engine=engine).execute_group(group_of(count, **options))


async def test_agents_do_what_the_script_says_and_nothing_else() -> None:
    engine = ScriptedEngine(
        {
            "t0": Act(output=[1], usage=Usage(cost=2.0)),
            "t1": Act(error=OSError("disk")),
            "t2": Act(reason=TerminationReason.ERROR, output="gave up"),
            "t3": Act(reason=TerminationReason.PARKED, output="asks"),
        }
    )
    result = await result_of(engine, 5)
    assert [(outcome.status.value, outcome.output, outcome.error) for outcome in result.outcomes] == [
        ("succeeded", [1], None),
        ("failed", None, "OSError: disk"),
        ("failed", None, None),
        ("parked", "asks", None),
        ("succeeded", None, None),
    ]
    assert result.outcomes[2].result is not None
    assert result.outcomes[2].result.error_message == "gave up"
    assert result.total_cost == 2.0
    assert {call.task_id: call.ending for call in engine.calls} == {
        "t0": "returned",
        "t1": "raised",
        "t2": "returned",
        "t3": "returned",
        "t4": "returned",
    }
    assert engine.in_flight == ()


async def test_the_engine_remembers_how_many_ran_and_in_which_order() -> None:
    gate = anyio.Event()
    engine = ScriptedEngine(lambda _: Act(wait_for=gate))
    with anyio.fail_after(60):
        async with ParallelExecutor(engine=engine).open_group(group_of(5, max_concurrency=2)) as run:
            await engine.until(lambda e: len(e.in_flight) == 2)
            await anyio.wait_all_tasks_blocked()
            assert engine.in_flight == ("t0", "t1")
            gate.set()
    assert run.result is not None
    assert run.result.all_succeeded
    assert engine.peak == 2
    assert engine.order == ("t0", "t1", "t2", "t3", "t4")


async def test_several_tests_can_wait_for_the_same() -> None:
    engine = ScriptedEngine()
    seen: list[tuple[str, ...]] = []

    async def wait() -> None:
        await engine.until(lambda e: len(e.calls) == 2)
        seen.append(engine.order)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            await result_of(engine, 2)
    assert seen == [("t0", "t1")] * 2


@virtual_time
async def test_agents_take_their_time_on_the_clock_of_the_loop() -> None:
    engine = ScriptedEngine({"t0": Act(seconds=3_600), "t1": Act(hangs=True)})
    started = anyio.current_time()
    result = await ParallelExecutor(engine=engine).execute_group(group_of(2, each={"timeout_seconds": 5_000}))
    assert [outcome.status for outcome in result.outcomes] == [OutcomeStatus.SUCCEEDED, OutcomeStatus.TIMED_OUT]
    assert [call.started_at - started for call in engine.calls] == pytest.approx([0.0, 0.0])
    ended = {call.task_id: (call.ended_at or 0.0) - started for call in engine.calls}
    assert ended == pytest.approx({"t0": 3_600.0, "t1": 5_000.0})


async def test_agents_that_hang_are_cancelled_or_swallow_it() -> None:
    engine = ScriptedEngine({"t0": Act(hangs=True), "t1": Act(hangs=True, swallows_cancellation=True, output="saved")})
    with anyio.fail_after(60):
        async with ParallelExecutor(engine=engine).open_group(group_of(2)) as run:
            await engine.until(lambda e: len(e.in_flight) == 2)
            run.cancel()
    assert run.result is not None
    assert [outcome.status.value for outcome in run.result.outcomes] == ["cancelled", "succeeded"]
    assert run.result.outcomes[1].output == "saved"
    assert [call.ending for call in engine.calls] == ["cancelled", "returned"]


async def test_each_attempt_can_have_its_act() -> None:
    engine = ScriptedEngine({"t0": [Act(error=OSError("first")), Act(error=OSError("second")), Act(output="third")]})
    policy = RetryPolicy(retry_on=OSError, attempts=5, initial_wait_seconds=0, jitter_seconds=0)
    result = await result_of(RetryEngine(engine, policy), 1)
    assert result.outcomes[0].output == "third"
    assert [(call.attempt, call.ending) for call in engine.calls] == [(1, "raised"), (2, "raised"), (3, "returned")]
    again = await result_of(engine, 1)
    assert again.outcomes[0].output == "third"  # the last act stands for all that follow


def test_what_is_no_act_is_refused() -> None:
    wrong: tuple[dict[str, Any], ...] = (
        {"error": "text"},
        {"usage": 1},
        {"seconds": "1"},
        {"hangs": 1},
        {"reason": "error"},
    )
    for fields in wrong:
        with pytest.raises(TypeError):
            Act(**fields)
    with pytest.raises(ValueError, match="seconds"):
        Act(seconds=-1)


def test_an_engine_can_be_used_in_one_event_loop_after_another() -> None:
    pytest.importorskip("trio")
    engine = ScriptedEngine()
    executor = ParallelExecutor(engine=engine)
    for backend in ("asyncio", "trio", "asyncio"):
        assert anyio.run(executor.execute_group, group_of(2), backend=backend).all_succeeded
    assert len(engine.calls) == 6
    assert repr(engine) == "ScriptedEngine()"


async def test_a_function_decides_by_the_assignment() -> None:
    def act(assignment: AgentAssignment) -> Act:
        return Act(output=assignment.task_id.upper())

    result = await result_of(ScriptedEngine(act), 2)
    assert [outcome.output for outcome in result.outcomes] == ["T0", "T1"]
