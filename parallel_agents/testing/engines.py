"""What every engine must do, as a test class: subclass it for your engine, with two fixtures."""

from typing import Any

import anyio
import anyio.lowlevel
import pytest

from .._executor import ParallelExecutor
from .._models import AgentAssignment, AgentIdentity, ParallelExecutionGroup, Task
from .._outcomes import OutcomeStatus
from ..engines._protocol import AgentEngine

SECONDS = 30.0
"""How long a test may take; an engine that has not answered by then hangs."""


def _group(assignment: AgentAssignment, count: int = 1, **options: Any) -> ParallelExecutionGroup:
    """Return a group of assignments that differ in their ids alone."""
    return ParallelExecutionGroup(
        group_id="contract",
        assignments=[
            AgentAssignment(
                identity=AgentIdentity(
                    id=f"{assignment.agent_id}-{number}",
                    name=assignment.identity.name,
                    role=assignment.identity.role,
                    instructions=assignment.identity.instructions,
                    model=assignment.identity.model,
                    base_url=assignment.identity.base_url,
                ),
                task=Task(
                    id=f"{assignment.task_id}-{number}",
                    title=assignment.task.title,
                    description=assignment.task.description,
                    inputs=assignment.task.inputs,
                ),
                completion_config=assignment.completion_config,
            )
            for number in range(count)
        ],
        **options,
    )


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
        """The result is one, with the ids of its assignment."""
        with anyio.fail_after(SECONDS):
            result = await ParallelExecutor(engine=engine).execute_group(_group(assignment))
        assert result.all_succeeded, result.outcomes[0].error
        agent_result = result.outcomes[0].result
        assert agent_result is not None
        assert (agent_result.task_id, agent_result.agent_id) == (
            f"{assignment.task_id}-0",
            f"{assignment.agent_id}-0",
        )

    async def test_it_runs_several_at_once_and_again_afterwards(
        self, engine: AgentEngine, assignment: AgentAssignment
    ) -> None:
        """Nothing that belongs to one call is kept in the engine."""
        executor = ParallelExecutor(engine=engine)
        with anyio.fail_after(SECONDS):
            for _ in range(2):
                result = await executor.execute_group(_group(assignment, 3))
                assert [outcome.error for outcome in result.outcomes] == [None] * 3
                assert len({outcome.result.task_id for outcome in result.outcomes if outcome.result}) == 3

    async def test_a_call_that_is_late_ends_as_timed_out(
        self, engine: AgentEngine, long_assignment: AgentAssignment
    ) -> None:
        """It neither swallows the cancellation nor hides it in an error of its own."""
        group = _group(long_assignment)
        late = [
            AgentAssignment(
                identity=a.identity, task=a.task, timeout_seconds=0.2, completion_config=a.completion_config
            )
            for a in group.assignments
        ]
        with anyio.fail_after(SECONDS):
            result = await ParallelExecutor(engine=engine).execute_group(
                ParallelExecutionGroup(group_id="contract", assignments=late)
            )
        assert result.outcomes[0].status is OutcomeStatus.TIMED_OUT

    async def test_a_cancelled_call_ends_soon_and_the_engine_goes_on(
        self, engine: AgentEngine, assignment: AgentAssignment, long_assignment: AgentAssignment
    ) -> None:
        """Whoever cancels waits for the cleanup; the next call finds the engine as it was."""
        executor = ParallelExecutor(engine=engine)
        with anyio.fail_after(SECONDS):
            async with executor.open_group(_group(long_assignment, 3)) as run:
                for _ in range(10):
                    await anyio.lowlevel.checkpoint()
                run.cancel()
            assert {outcome.status for outcome in run.result.outcomes} == {OutcomeStatus.CANCELLED}
            assert (await executor.execute_group(_group(assignment))).all_succeeded

    async def test_it_leaves_no_task_behind(self, engine: AgentEngine, assignment: AgentAssignment) -> None:
        """What a call started has ended with it."""
        before = {task.id for task in anyio.get_running_tasks()}
        with anyio.fail_after(SECONDS):
            await ParallelExecutor(engine=engine).execute_group(_group(assignment, 3))
        assert {task.id for task in anyio.get_running_tasks()} <= before
