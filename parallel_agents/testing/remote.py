"""What every engine must do that runs agents somewhere else, as a test class: subclass it for yours.

It needs workers that run ``parallel_agents.testing.remote_agents:agent`` on this machine. The rule that it holds them
to: an agent's execution is at least once, its commit at most once.
"""

import os
import secrets
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import anyio
import pytest

from .._context import current_run
from .._executor import ParallelExecutor
from .._models import AgentAssignment, ParallelExecutionGroup, Usage
from .._outcomes import AgentOutcome, AgentRunResult, OutcomeStatus
from .._shutdown import ShutdownManager
from ..engines import _remote
from ..engines._protocol import AgentEngine
from ..events import CHAT_REQUEST_RETRY
from .plugin import EventRecorder
from .remote_agents import Diary, assignment

SECONDS = 60.0
"""How long a test may take; a worker that has not answered by then hangs. Starting one takes seconds."""


class MakeEngine(Protocol):
    """An async function of a module, also for another process, that makes an engine as a new driver would."""

    __module__: str
    __qualname__: str

    async def __call__(self, execution: str, *, cancel_seconds: float = 10.0) -> AgentEngine:
        """Return an engine whose inner one is ``parallel_agents.testing.remote_agents:agent``.

        Args:
            execution: All drivers that are given the same name mean the same agents.
            cancel_seconds: How long a cancelled agent is waited for.
        """
        ...


class Watched:
    """An engine around another, which shows what is reported while its agents run.

    Args:
        inner: The other.

    Attributes:
        metered: What has arrived, by task.
    """

    def __init__(self, inner: AgentEngine) -> None:
        self._inner = inner
        self.metered: dict[str, Usage] = {}
        self._news = anyio.Event()

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        """Run the inner engine."""
        run = current_run()

        def note(_: Usage) -> None:
            self.metered[assignment.task_id] = run.usage
            self._news.set()
            self._news = anyio.Event()

        with run.watching_usage(note):
            return await self._inner.run(assignment)

    async def wait_for(self, task_id: str) -> Usage:
        """Wait until an agent has spent something, and return how much."""
        while task_id not in self.metered:
            await self._news.wait()
        return self.metered[task_id]


@pytest.mark.anyio
class RemoteEngineContract:
    """A subclass has a fixture ``make_engine``, and another ``kill_worker`` where a killed one does not come back."""

    @pytest.fixture
    def make_engine(self) -> MakeEngine:
        """Return an async function, of a module that can be imported, that makes an engine."""
        raise NotImplementedError("give your subclass a fixture 'make_engine'")

    @pytest.fixture
    def kill_worker(self) -> Callable[[int], object]:
        """Return a function that kills the process of a worker, as nothing but SIGKILL can, and has it replaced."""
        return lambda pid: os.kill(pid, signal.SIGKILL)

    @pytest.fixture
    def diary(self, tmp_path: Path) -> Diary:
        """What the agents of a test note."""
        return Diary(tmp_path / "diary")

    @pytest.fixture
    def execution(self) -> str:
        """A name that no other test has."""
        return f"contract-{secrets.token_hex(6)}"

    async def test_results_come_back_as_they_are(self, make_engine: MakeEngine, diary: Diary, execution: str) -> None:
        """In order, with their own ids, whatever JSON the agents return."""
        outputs = ["text {0} <b> \x1b[31m é 😀", 7, 0.5, True, None, [1, [2]], {"a": {"b": []}}]
        work = [assignment("return", diary, n, output=output) for n, output in enumerate(outputs)]
        outcomes = await _run(await make_engine(execution), work)
        assert [outcome.output for outcome in outcomes] == outputs, [outcome.error for outcome in outcomes]
        assert {outcome.status for outcome in outcomes} == {OutcomeStatus.SUCCEEDED}
        assert len(diary.lines("started")) == len(outputs)

    async def test_an_output_that_is_no_json_is_a_failure(
        self, make_engine: MakeEngine, diary: Diary, execution: str
    ) -> None:
        """It says what to do."""
        (outcome,) = await _run(await make_engine(execution), [assignment("return no json", diary)])
        assert outcome.status is OutcomeStatus.FAILED
        assert outcome.error is not None
        assert "return plain JSON" in outcome.error

    async def test_an_error_is_that_agents_outcome(self, make_engine: MakeEngine, diary: Diary, execution: str) -> None:
        """With the name of its class and its message; what was spent is kept, and others are not touched."""
        work = [assignment("fail", diary, 1), assignment("return", diary, 2, output="fine")]
        failed, other = await _run(await make_engine(execution), work)
        assert failed.status is OutcomeStatus.FAILED
        assert failed.error == "RemoteAgentError: ValueError: it does not work"
        assert failed.usage == Usage(requests=3)
        assert other.output == "fine"

    async def test_an_agent_that_cancels_itself_harms_nobody(
        self, make_engine: MakeEngine, diary: Diary, execution: str
    ) -> None:
        """It is cancelled, nobody else is."""
        work = [assignment("cancel itself", diary, 1), assignment("return", diary, 2, output="fine")]
        cancelled, other = await _run(await make_engine(execution), work)
        assert cancelled.status is OutcomeStatus.CANCELLED
        assert other.output == "fine"

    async def test_usage_arrives_while_an_agent_runs(
        self, make_engine: MakeEngine, diary: Diary, execution: str
    ) -> None:
        """And stays when it is cancelled; the agent has stopped when the call returns."""
        engine = Watched(await make_engine(execution))
        with anyio.fail_after(SECONDS):
            async with _opened(engine, [assignment("spend and wait", diary)]) as run:
                assert await engine.wait_for("t1") == Usage(requests=1, cost=0.5)
                run.cancel_task("t1")
        (outcome,) = run.result.outcomes
        assert outcome.status is OutcomeStatus.CANCELLED
        assert outcome.error == "Cancelled: cancel_task() was called"
        assert outcome.usage == Usage(requests=1, cost=0.5)
        assert len(diary.lines("cancelled", "t1")) == 1

    async def test_events_of_an_agent_reach_the_observers(
        self, make_engine: MakeEngine, diary: Diary, execution: str, recorded_events: EventRecorder
    ) -> None:
        """As they were sent."""
        executor = ParallelExecutor(engine=await make_engine(execution), observers=[recorded_events])
        with anyio.fail_after(SECONDS):
            await executor.execute_group(_group([assignment("emit", diary)]))
        (event,) = (event for event in recorded_events.events if event.name == CHAT_REQUEST_RETRY)
        assert (event.group_id, event.task_id, event.agent_id) == ("contract", "t1", "a1")
        assert event.fields == {"attempt": 1, "wait_seconds": 0.0, "error": "busy {0} <red>"}

    async def test_an_agent_can_ask_about_its_run(self, make_engine: MakeEngine, diary: Diary, execution: str) -> None:
        """Its group, its attempt, what it depends on; and it learns of a shutdown."""
        manager = ShutdownManager()
        executor = ParallelExecutor(engine=await make_engine(execution), shutdown_manager=manager)
        work = [
            assignment("return", diary, 1, output=[1, 2]),
            assignment("tell the context", diary, 2, depends_on=("t1",)),
        ]
        with anyio.fail_after(SECONDS):
            async with executor.open_group(_group(work)) as run:
                await diary.wait_for("waits", "t2")
                manager.request_shutdown()
        assert run.result.outcome_of("t2").output == {
            "group_id": "contract",
            "attempt": 1,
            "upstream": {"t1": [1, 2]},
        }

    async def test_one_that_takes_too_long_is_stopped(
        self, make_engine: MakeEngine, diary: Diary, execution: str
    ) -> None:
        """And has stopped when the outcome says so."""
        engine = await make_engine(execution)
        await _run(engine, [assignment("return", diary, 1)])  # a worker that starts takes its time
        (outcome,) = await _run(engine, [assignment("spend and wait", diary, 2, timeout_seconds=2.0)])
        assert (outcome.status, outcome.error) == (OutcomeStatus.TIMED_OUT, "Timed out after 2 s")
        assert len(diary.lines("cancelled", "t2")) == len(diary.lines("started", "t2")) == 1

    async def test_the_first_failure_stops_fifty(self, make_engine: MakeEngine, diary: Diary, execution: str) -> None:
        """All of them have stopped when the call returns."""
        work = [assignment("spend and wait", diary, n) for n in range(1, 50)]
        work.append(assignment("fail when all started", diary, 50, count=50))
        *others, failed = await _run(await make_engine(execution), work, fail_fast=True)
        assert failed.status is OutcomeStatus.FAILED
        assert {(o.status, o.error) for o in others} == {(OutcomeStatus.CANCELLED, "Cancelled: agent 'a50' failed")}
        assert len(diary.lines("cancelled")) == 49

    async def test_an_agent_of_a_killed_worker_runs_again(
        self, make_engine: MakeEngine, diary: Diary, execution: str, kill_worker: Callable[[int], object]
    ) -> None:
        """What the first start had reported stays counted."""
        engine = Watched(await make_engine(execution))
        with anyio.fail_after(SECONDS):
            async with _opened(engine, [assignment("wait the first time", diary)]) as run:
                await engine.wait_for("t1")
                ((*_, pid),) = diary.lines("started", "t1")
                kill_worker(int(pid))
        (outcome,) = run.result.outcomes
        assert outcome.output == "the second time"
        assert outcome.usage == Usage(requests=2)
        assert len(diary.lines("started", "t1")) == 2

    async def test_a_driver_that_comes_back_finds_its_agents_running(
        self, make_engine: MakeEngine, diary: Diary, execution: str
    ) -> None:
        """They do not start again."""
        name = f"{make_engine.__module__}:{make_engine.__qualname__}"
        command = [sys.executable, "-m", "parallel_agents.testing.remote_agents", name, execution, str(diary.path)]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with anyio.fail_after(SECONDS):
            async with await anyio.open_process(command, env=env, stdout=None, stderr=None) as driver:
                try:
                    await diary.wait_for("started", "t1")
                finally:
                    driver.kill()
        work = [assignment("wait until told", diary)]
        engine = Watched(await make_engine(execution))
        with anyio.fail_after(SECONDS):
            async with _opened(engine, work) as run:
                assert await engine.wait_for("t1") == Usage(requests=1)
                diary.note("go")
        (outcome,) = run.result.outcomes
        assert outcome.status is OutcomeStatus.SUCCEEDED, outcome.error
        assert outcome.usage == Usage(requests=1)
        assert len(diary.lines("started", "t1")) == 1

    async def test_what_an_agent_returns_when_it_is_cancelled_is_its_result(
        self, make_engine: MakeEngine, diary: Diary, execution: str
    ) -> None:
        """As it is for an engine in this process."""
        engine = Watched(await make_engine(execution))
        with anyio.fail_after(SECONDS):
            async with _opened(engine, [assignment("return when cancelled", diary)]) as run:
                await engine.wait_for("t1")
                run.cancel()
        (outcome,) = run.result.outcomes
        assert (outcome.status, outcome.output) == (OutcomeStatus.SUCCEEDED, "returned all the same")
        assert outcome.usage == Usage(requests=1)

    async def test_an_agent_that_does_not_stop_is_told_to_be_unconfirmed(
        self, make_engine: MakeEngine, diary: Diary, execution: str
    ) -> None:
        """The call returns all the same, after its time."""
        engine = await make_engine(execution, cancel_seconds=0.5)
        try:
            with anyio.fail_after(SECONDS):
                async with _opened(engine, [assignment("go on when cancelled", diary)]) as run:
                    await diary.wait_for("started", "t1")
                    run.cancel()
            (outcome,) = run.result.outcomes
            assert outcome.status is OutcomeStatus.CANCELLED
            assert outcome.error == f"Cancelled: cancel() was called. {_remote.unconfirmed(0.5)}"
            assert diary.lines("ended") == []
        finally:
            diary.note("enough")
        with anyio.fail_after(SECONDS):
            await diary.wait_for("ended")

    async def test_an_assignment_that_is_started_twice_has_one_result(
        self, make_engine: MakeEngine, diary: Diary, execution: str
    ) -> None:
        """Two drivers that have it are told the same, though the agents' results are as different as their starts."""
        first, second = Watched(await make_engine(execution)), Watched(await make_engine(execution))
        work = [assignment("wait until told", diary)]
        with anyio.fail_after(SECONDS):
            async with _opened(first, work) as one, _opened(second, work) as other:
                await first.wait_for("t1")
                await second.wait_for("t1")
                diary.note("go")
        outputs = [run.result.outcomes[0].output for run in (one, other)]
        assert None not in outputs
        assert outputs[0] == outputs[1]

    async def test_another_version_of_the_library_is_refused(
        self, make_engine: MakeEngine, diary: Diary, execution: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The outcome names both versions, and nothing ran."""
        engine = await make_engine(execution)
        ours = _remote.VERSION
        monkeypatch.setattr(_remote, "VERSION", "0.0.0")
        (outcome,) = await _run(engine, [assignment("return", diary)])
        assert outcome.status is OutcomeStatus.FAILED
        assert outcome.error is not None
        assert outcome.error.startswith("VersionMismatchError: ")
        assert "0.0.0 " in outcome.error
        assert f"{ours} " in outcome.error
        assert diary.lines() == []


def _group(work: list[AgentAssignment], **options: Any) -> ParallelExecutionGroup:
    return ParallelExecutionGroup(group_id="contract", assignments=work, **options)


def _opened(engine: AgentEngine, work: list[AgentAssignment]) -> Any:
    return ParallelExecutor(engine=engine).open_group(_group(work))


async def _run(engine: AgentEngine, work: list[AgentAssignment], **options: Any) -> tuple[AgentOutcome[Any], ...]:
    with anyio.fail_after(SECONDS):
        return (await ParallelExecutor(engine=engine).execute_group(_group(work, **options))).outcomes
