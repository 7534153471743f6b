"""What users test with: cancellation at every step, virtual time, assertions, fixtures. Each must be able to fail."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from clocks import virtual_time as in_virtual_time
from groups import group_of

from parallel_agents import OutcomeStatus, ParallelExecutionGroup, ParallelExecutionResult, ParallelExecutor
from parallel_agents.events import PARALLEL_AGENT_COMPLETE, PARALLEL_AGENT_ERROR, PARALLEL_AGENT_START
from parallel_agents.testing import (
    Act,
    DeadlockError,
    ScriptedEngine,
    assert_all_succeeded,
    assert_outcomes,
    cancel_at_every_checkpoint,
    virtual_time,
)
from parallel_agents.testing.plugin import EventRecorder
from parallel_agents.testing.stepping import Backend, installed_backends, run_in_virtual_time

pytestmark = pytest.mark.anyio

on_each_backend = pytest.mark.parametrize("backend", installed_backends())


# Cancellation at every step


def test_a_program_is_cancelled_at_each_of_its_steps_on_each_backend() -> None:
    cancelled: list[str] = []

    async def program() -> None:
        for place in ("first", "second", "third"):
            try:
                await anyio.lowlevel.checkpoint()
            except anyio.get_cancelled_exc_class():
                cancelled.append(place)
                raise

    times = {backend: cancel_at_every_checkpoint(program, backend=backend) for backend in installed_backends()}
    assert set(cancelled) == {"first", "second", "third"}
    assert cancel_at_every_checkpoint(program) == sum(times.values()) >= 3 * len(times)


@on_each_backend
def test_the_check_runs_in_the_loop_after_each_run_that_was_cancelled(backend: Backend) -> None:
    ended: list[float] = []
    waited: list[float] = []

    async def program() -> None:
        try:
            await anyio.sleep(5)
        finally:
            ended.append(anyio.current_time())

    def check() -> None:
        if ended:
            waited.append(anyio.current_time() - ended.pop())

    steps = cancel_at_every_checkpoint(program, check=check, backend=backend)
    assert 0 < len(waited) <= steps
    assert set(waited) == {10.0}


@on_each_backend
def test_what_a_check_finds_is_raised_with_the_step(backend: Backend) -> None:
    def check() -> None:
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong") as caught:
        cancel_at_every_checkpoint(anyio.lowlevel.checkpoint, check=check, backend=backend)
    assert caught.value.__notes__ == [f"cancelled at step 1 on {backend}"]


@on_each_backend
@pytest.mark.parametrize("cleanup_seconds", [10.0, 30.0])
def test_a_program_that_goes_on_for_too_long_is_found(backend: Backend, cleanup_seconds: float) -> None:
    async def program() -> None:
        try:
            await anyio.sleep(1)
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(20)

    if cleanup_seconds > 20:
        assert cancel_at_every_checkpoint(program, backend=backend, cleanup_seconds=cleanup_seconds) > 1
    else:
        with pytest.raises(AssertionError, match="it went on for 20 s after it was cancelled"):
            cancel_at_every_checkpoint(program, backend=backend, cleanup_seconds=cleanup_seconds)


@on_each_backend
def test_a_program_that_hangs_is_found(backend: Backend) -> None:
    async def program() -> None:
        try:
            await anyio.sleep(1)
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await anyio.sleep_forever()

    with pytest.raises(AssertionError, match="it hangs after it was cancelled"):
        cancel_at_every_checkpoint(program, backend=backend)


def test_a_program_that_leaves_a_task_behind_is_found() -> None:
    left: list[asyncio.Task[None]] = []

    async def program() -> None:
        left.append(asyncio.create_task(asyncio.sleep(60), name="left over"))
        await anyio.lowlevel.checkpoint()

    with pytest.raises(AssertionError, match="it left tasks behind: left over"):
        cancel_at_every_checkpoint(program, backend="asyncio")


@on_each_backend
def test_an_error_instead_of_the_cancellation_is_found(backend: Backend) -> None:
    async def program() -> None:
        try:
            await anyio.lowlevel.checkpoint()
        except anyio.get_cancelled_exc_class():
            raise OSError("closed") from None

    with pytest.raises(OSError, match="closed"):
        cancel_at_every_checkpoint(program, backend=backend)


@on_each_backend
def test_a_seed_decides_the_order(backend: Backend) -> None:
    def order(seed: int) -> list[int]:
        seen: list[int] = []

        async def step(number: int) -> None:
            await anyio.lowlevel.checkpoint()
            seen.append(number)

        async def program() -> None:
            async with anyio.create_task_group() as tasks:
                for number in range(5):
                    tasks.start_soon(step, number)

        run_in_virtual_time(program, backend, seed=seed)
        return seen

    assert order(1) == order(1)
    assert len({tuple(order(seed)) for seed in range(10)}) > 1
    assert cancel_at_every_checkpoint(anyio.lowlevel.checkpoint, backend=backend, seed=1) >= 1


# Virtual time


@in_virtual_time
async def test_sleeping_takes_no_time() -> None:
    before = anyio.current_time()
    await anyio.sleep(3_600)
    assert anyio.current_time() - before == 3_600


def test_nothing_can_make_a_deadlock_go_on_and_so_it_is_an_error() -> None:
    backend, options = virtual_time("asyncio")
    with pytest.raises(DeadlockError):
        anyio.run(anyio.Event().wait, backend=backend, backend_options=options)


# Assertions


async def result_of(script: dict[str, Act], group: ParallelExecutionGroup) -> ParallelExecutionResult[Any]:
    return await ParallelExecutor(engine=ScriptedEngine(script)).execute_group(group)


async def test_outcomes_that_are_as_expected_pass() -> None:
    result = await result_of({"t1": Act(error=OSError())}, group_of(2))
    assert_outcomes(result, {"t1": "failed", "t0": OutcomeStatus.SUCCEEDED})
    assert_all_succeeded(await result_of({}, group_of(2)))


async def test_a_failure_shows_each_task_that_is_different_and_why() -> None:
    result = await result_of({"t1": Act(error=OSError("no\x1b[31m disk"))}, group_of(4))
    with pytest.raises(AssertionError) as caught:
        assert_outcomes(result, {"t0": "succeeded", "t1": "timed_out", "t2": "failed", "missing": "skipped"})
    assert str(caught.value).splitlines() == [
        "4 of 5 outcomes of group 'g' not as expected:",
        "  - t1       expected timed_out",
        "  + t1       failed: OSError: no\\x1b[31m disk",
        "  - t2       expected failed",
        "  + t2       succeeded",
        "  - missing  expected skipped",
        "  + missing  not in the group",
        "  - t3       not expected",
        "  + t3       succeeded",
    ]
    with pytest.raises(AssertionError, match=re.escape("1 of 4 outcomes of group 'g' not as expected:")):
        assert_all_succeeded(result)


async def test_a_status_that_does_not_exist_is_no_expectation() -> None:
    with pytest.raises(ValueError, match="'succeded' is not a valid OutcomeStatus"):
        assert_outcomes(await result_of({}, group_of(1)), {"t0": "succeded"})


# Fixtures


async def test_the_fixtures_make_engines_groups_and_a_record_of_events(
    scripted_engine: Callable[..., ScriptedEngine],
    agent_group: Callable[..., ParallelExecutionGroup],
    recorded_events: EventRecorder,
) -> None:
    engine = scripted_engine({"b": Act(error=OSError())})
    executor = ParallelExecutor(engine=engine, observers=[recorded_events])
    result = await executor.execute_group(agent_group("a", "b", max_concurrency=1))
    assert_outcomes(result, {"a": "succeeded", "b": "failed"})
    assert result.group_id == "test"
    assert len({outcome.agent_id for outcome in result.outcomes}) == 2
    assert recorded_events.names("a") == [PARALLEL_AGENT_START, PARALLEL_AGENT_COMPLETE]
    assert recorded_events.names("b") == [PARALLEL_AGENT_START, PARALLEL_AGENT_ERROR]
    assert len(recorded_events.names()) > 4
    assert_all_succeeded(await ParallelExecutor(engine=scripted_engine()).execute_group(agent_group("c")))


def test_an_agent_that_outlives_its_test_fails_it(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import asyncio
        from parallel_agents import ParallelExecutor
        from parallel_agents.testing import Act

        def test_leaves_one(scripted_engine, agent_group):
            async def main():
                executor = ParallelExecutor(engine=scripted_engine({"a": Act(hangs=True)}))
                left.append(asyncio.create_task(executor.execute_group(agent_group("a"))))
                for _ in range(20):
                    await asyncio.sleep(0)

            loop.run_until_complete(main())

        left, loop = [], asyncio.new_event_loop()

        def test_cleans_up():
            left[0].cancel()
            loop.run_until_complete(asyncio.wait(left))
            loop.close()
        """
    )
    run = pytester.runpytest_inprocess("-q")
    run.assert_outcomes(passed=2, errors=1)
    run.stdout.fnmatch_lines(["E *agents outlived the test: a"])
