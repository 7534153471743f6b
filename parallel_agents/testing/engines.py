"""What every engine must do, as a test class: subclass it for your engine, with three fixtures."""

from typing import Any

import anyio
import anyio.lowlevel
import pytest
from attrs import evolve

from .._executor import ParallelExecutor
from .._models import AgentAssignment, ParallelExecutionGroup
from .._outcomes import OutcomeStatus
from ..engines._protocol import AgentEngine
from .outcomes import assert_all_succeeded

SECONDS = 30.0
"""How long each part of a test may take; an engine that has not answered by then hangs."""


def _group(assignment: AgentAssignment, count: int = 1, **fields: Any) -> ParallelExecutionGroup:
    """Return a group of assignments that differ in their ids alone; *fields* are those of each."""
    return ParallelExecutionGroup(
        group_id="contract",
        assignments=[
            evolve(
                assignment,
                identity=evolve(assignment.identity, id=f"{assignment.agent_id}-{number}"),
                task=evolve(assignment.task, id=f"{assignment.task_id}-{number}"),
                **fields,
            )
            for number in range(count)
        ],
    )


def _started_since(before: set[int]) -> list[str | None]:
    """Return the names of the tasks that are there and were not there before."""
    return [task.name for task in anyio.get_running_tasks() if task.id not in before]


@pytest.mark.anyio
class AgentEngineContract:
    """An engine on its own and in a group. Fixtures: ``engine``, ``assignment``, ``long_assignment``.

    Each test runs on the backends that the fixture ``anyio_backend`` of your tests names.
    """

    @pytest.fixture
    def engine(self) -> AgentEngine:
        """Return a fresh engine."""
        raise NotImplementedError("give your subclass a fixture 'engine'")

    @pytest.fixture
    def assignment(self) -> AgentAssignment:
        """Return an assignment that the engine completes soon."""
        raise NotImplementedError("give your subclass a fixture 'assignment'")

    @pytest.fixture
    def long_assignment(self) -> AgentAssignment:
        """Return an assignment with which the engine is busy for a minute and more."""
        raise NotImplementedError("give your subclass a fixture 'long_assignment'")

    def test_it_has_the_method_of_the_protocol(self, engine: AgentEngine) -> None:
        """It is what ``ParallelExecutor`` takes."""
        assert isinstance(engine, AgentEngine)

    async def test_it_completes_an_assignment(self, engine: AgentEngine, assignment: AgentAssignment) -> None:
        """Its result is of the right type and has the ids of its assignment: the executor checks that."""
        with anyio.fail_after(SECONDS):
            result = await ParallelExecutor(engine=engine).execute_group(_group(assignment))
        assert_all_succeeded(result)

    async def test_it_runs_several_at_once_and_again_afterwards(
        self, engine: AgentEngine, assignment: AgentAssignment
    ) -> None:
        """Nothing that belongs to one call is kept in the engine."""
        executor = ParallelExecutor(engine=engine)
        with anyio.fail_after(SECONDS):
            for _ in range(2):
                result = await executor.execute_group(_group(assignment, 3))
                assert_all_succeeded(result)

    async def test_a_call_that_is_late_ends_as_timed_out(
        self, engine: AgentEngine, long_assignment: AgentAssignment
    ) -> None:
        """It neither swallows the cancellation nor hides it in an error of its own."""
        with anyio.fail_after(SECONDS):
            result = await ParallelExecutor(engine=engine).execute_group(_group(long_assignment, timeout_seconds=0.2))
        assert result.outcomes[0].status is OutcomeStatus.TIMED_OUT

    async def test_a_cancelled_call_ends_soon_and_the_engine_goes_on(
        self, engine: AgentEngine, assignment: AgentAssignment, long_assignment: AgentAssignment
    ) -> None:
        """Whoever cancels waits for the cleanup; the next call finds the engine as it was."""
        executor = ParallelExecutor(engine=engine)
        with anyio.fail_after(SECONDS):
            async with executor.open_group(_group(long_assignment, 3)) as run:
                while run.progress.pending:  # noqa: ASYNC110 - as soon as all have started
                    await anyio.lowlevel.checkpoint()
                run.cancel()
            assert {outcome.status for outcome in run.result.outcomes} == {OutcomeStatus.CANCELLED}
            assert_all_succeeded(await executor.execute_group(_group(assignment)))

    async def test_it_leaves_no_task_behind(self, engine: AgentEngine, assignment: AgentAssignment) -> None:
        """What a call started has ended with it; only what serves all calls of the event loop may go on."""
        executor = ParallelExecutor(engine=engine)
        with anyio.fail_after(SECONDS):
            await executor.execute_group(_group(assignment))
            before = {task.id for task in anyio.get_running_tasks()}
            await executor.execute_group(_group(assignment, 3))
        with anyio.move_on_after(SECONDS):  # for a test's own server, say, to see that its clients have gone
            while _started_since(before):  # noqa: ASYNC110 - no event tells that a task of others has ended
                await anyio.sleep(0.01)
        assert not _started_since(before)
