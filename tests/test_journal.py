"""JournaledEngine and SqliteJournal: what is recorded, when it stands for a run, and which files are refused."""

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from attrs import evolve, frozen
from groups import assignment, group_of

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    AgentRunResult,
    Budget,
    ChatMessage,
    CompletionConfig,
    FunctionEngine,
    OutcomeStatus,
    ParallelEvent,
    ParallelExecutionGroup,
    ParallelExecutionResult,
    ParallelExecutor,
    Task,
    TerminationReason,
    Usage,
    current_run,
)
from parallel_agents.engines.journal import JournaledEngine, fingerprint
from parallel_agents.engines.retry import RetryEngine, RetryPolicy
from parallel_agents.events import PARALLEL_AGENT_RESUMED
from parallel_agents.journals import Ending, Entry, JournalError, Step
from parallel_agents.journals import _sqlite_store as store
from parallel_agents.journals._reading import is_in_use
from parallel_agents.journals.sqlite import SqliteJournal, read_journal
from parallel_agents.testing import cancel_at_every_checkpoint

pytestmark = pytest.mark.anyio

Agent = Callable[[AgentAssignment], Awaitable[Any]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.journal"


class Agents:
    """Agents whose endings can be changed between runs; remembers who ran."""

    def __init__(self, **endings: Any) -> None:
        self.endings = endings
        self.ran: list[str] = []

    async def __call__(self, task: AgentAssignment) -> Any:
        self.ran.append(task.task_id)
        current_run().record_usage(Usage(cost=1.0))
        await anyio.lowlevel.checkpoint()
        ending = self.endings.get(task.task_id, f"output of {task.task_id}")
        if isinstance(ending, Exception):
            raise ending
        return ending


class Run:
    """What came of one run of a group with a journal."""

    def __init__(self) -> None:
        self.events: list[tuple[str | None, str]] = []

    def on_event(self, event: ParallelEvent) -> None:
        if event.name == PARALLEL_AGENT_RESUMED:
            self.events.append((event.task_id, event.fields["reason"]))


async def run_group(
    path: Path, agent: Agent, group: ParallelExecutionGroup | None = None, **options: Any
) -> tuple[ParallelExecutionResult[Any], list[tuple[str | None, str]]]:
    observer = Run()
    with SqliteJournal(path) as journal, anyio.fail_after(60):
        engine = JournaledEngine(FunctionEngine(agent), journal, **options)
        result = await ParallelExecutor(engine=engine, observers=(observer,)).execute_group(group or group_of(3))
    return result, sorted(observer.events, key=str)


async def test_what_succeeded_is_recalled_and_what_failed_runs_again(path: Path) -> None:
    agents = Agents(t1=ValueError("bad luck"), t2={"deep": [1, 2.5, None, True]})
    first, events = await run_group(path, agents)
    assert sorted(agents.ran) == ["t0", "t1", "t2"]
    assert first.outcomes[1].error == "ValueError: bad luck"
    assert events == []
    agents.ran.clear()
    agents.endings["t1"] = "now"
    second, events = await run_group(path, agents)
    assert agents.ran == ["t1"]
    assert [outcome.output for outcome in second.outcomes] == ["output of t0", "now", {"deep": [1, 2.5, None, True]}]
    assert second.outcomes[0].result == first.outcomes[0].result
    assert events == [("t0", "recorded"), ("t1", "failed"), ("t2", "recorded")]
    assert [outcome.usage for outcome in second.outcomes] == [Usage(cost=1.0), Usage(cost=2.0), Usage(cost=1.0)]
    assert second.outcomes[1].result is not None
    assert second.outcomes[1].result.usage == Usage(cost=2.0)


async def test_the_journal_can_be_read_and_tells_what_was_spent(path: Path) -> None:
    await run_group(path, Agents(t1=ValueError("bad luck")), execution="nightly")
    (execution,) = read_journal(path)
    assert (execution.name, execution.group_id, execution.finished) == ("nightly", "g", None)
    attempts = {attempt.task_id: attempt for attempt in execution.attempts}
    assert {name: attempt.status for name, attempt in attempts.items()} == {
        "t0": "succeeded",
        "t1": "failed",
        "t2": "succeeded",
    }
    assert attempts["t1"].content == "ValueError: bad luck"
    assert attempts["t0"].ended is not None
    assert execution.started <= attempts["t0"].started <= attempts["t0"].ended
    assert execution.usage == Usage(cost=3.0)
    assert set(execution.last_attempts) == set(execution.attempts)


class Spender:
    """An engine that meters one part of its usage and reports another."""

    async def run(self, task: AgentAssignment) -> AgentRunResult[Any]:
        current_run().record_usage(Usage(requests=1))
        return AgentRunResult(
            task_id=task.task_id,
            agent_id=task.agent_id,
            termination_reason=TerminationReason.COMPLETED,
            usage=Usage(requests=1, input_tokens=10),
        )


async def test_usage_that_only_the_result_reports_is_recorded_too(path: Path) -> None:
    for _ in range(2):
        with SqliteJournal(path) as journal:
            result = await ParallelExecutor(engine=JournaledEngine(Spender(), journal)).execute_group(group_of(1))
        assert result.total_usage == Usage(requests=1, input_tokens=10)
    assert read_journal(path)[0].usage == Usage(requests=1, input_tokens=10)


async def test_usage_is_in_the_journal_while_the_agent_still_runs(path: Path) -> None:
    async def agent(_task: AgentAssignment) -> None:
        current_run().record_usage(Usage(input_tokens=7))
        with anyio.fail_after(60):
            while read_journal(path)[0].usage != Usage(input_tokens=7):
                await anyio.lowlevel.checkpoint()
        with pytest.raises(JournalError, match="in use by another run"):
            SqliteJournal(path).open()
        assert is_in_use(path)

    result, _ = await run_group(path, agent, group_of(1))
    assert result.all_succeeded
    assert not is_in_use(path)


async def test_a_cancelled_agent_runs_again_and_keeps_what_it_had_spent(path: Path) -> None:
    started = anyio.Event()

    async def agent(_task: AgentAssignment) -> str:
        current_run().record_usage(Usage(cost=1.0))
        if not started.is_set():
            started.set()
            await anyio.sleep_forever()
        return "done"

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_group, path, agent, group_of(1))
        await started.wait()
        tasks.cancel_scope.cancel()
    (attempt,) = read_journal(path)[0].attempts
    assert (attempt.status, attempt.ended, attempt.usage) == ("started", None, Usage(cost=1.0))
    result, events = await run_group(path, agent, group_of(1))
    assert events == [("t0", "interrupted")]
    assert result.outcomes[0].usage == Usage(cost=2.0)
    assert result.outcomes[0].output == "done"


@pytest.mark.parametrize(
    "change",
    [
        lambda group: evolve(group, assignments=[evolve(group.assignments[0], task=Task(id="t0", title="other"))]),
        lambda group: evolve(group, assignments=[evolve(group.assignments[0], max_turns=3)]),
        lambda group: evolve(group, assignments=[evolve(group.assignments[0], identity=AgentIdentity(id="new"))]),
    ],
)
async def test_an_agent_with_other_work_runs_again_and_says_so(
    path: Path, change: Callable[[ParallelExecutionGroup], ParallelExecutionGroup]
) -> None:
    agents = Agents()
    await run_group(path, agents, group_of(1))
    result, events = await run_group(path, agents, change(group_of(1)))
    assert events == [("t0", "changed")]
    assert agents.ran == ["t0", "t0"]
    assert result.total_usage == Usage(cost=2.0)
    _, events = await run_group(path, agents, group_of(1))  # as it was
    assert events == [("t0", "recorded")]


async def test_another_version_is_other_work_and_another_timeout_or_claim_is_not(path: Path) -> None:
    agents = Agents()
    await run_group(path, agents, group_of(1))
    longer = group_of(1, each={"timeout_seconds": 5.0, "resource_claims": ["db"]})
    assert (await run_group(path, agents, longer))[1] == [("t0", "recorded")]
    assert (await run_group(path, agents, version="2"))[1] == [("t0", "changed")]


async def test_a_dependent_runs_again_when_what_it_depends_on_came_out_differently(path: Path) -> None:
    def group(title: str) -> ParallelExecutionGroup:
        first = AgentAssignment(identity=AgentIdentity(id="a"), task=Task(id="first", title=title))
        tasks = [Task(id="second", depends_on=["first"]), Task(id="third")]
        others = [AgentAssignment(identity=AgentIdentity(id=task.id), task=task) for task in tasks]
        return ParallelExecutionGroup(group_id="g", assignments=[first, *others])

    agents = Agents()
    await run_group(path, agents, group("one"))
    _, events = await run_group(path, agents, group("two"))  # with the same output
    assert events == [("first", "changed"), ("second", "recorded"), ("third", "recorded")]
    agents.endings["first"] = "another output"
    _, events = await run_group(path, agents, group("three"))
    assert events == [("first", "changed"), ("second", "changed"), ("third", "recorded")]


async def test_executions_of_other_names_and_groups_know_nothing_of_each_other(path: Path) -> None:
    agents = Agents()
    await run_group(path, agents, group_of(1), execution="monday")
    await run_group(path, agents, group_of(1), execution="tuesday")
    await run_group(path, agents, evolve(group_of(1), group_id="h"), execution="monday")
    assert agents.ran == ["t0"] * 3
    assert [execution.name for execution in read_journal(path)] == ["monday", "tuesday"]


async def test_a_budget_counts_what_earlier_runs_spent(path: Path) -> None:
    agents = Agents()
    await run_group(path, agents, group_of(2))
    group = group_of(3, budget=Budget(max_cost=2.0), max_concurrency=1)
    result, _ = await run_group(path, agents, group)
    assert [outcome.status for outcome in result.outcomes] == [
        OutcomeStatus.SUCCEEDED,
        OutcomeStatus.SUCCEEDED,
        OutcomeStatus.SKIPPED,
    ]
    assert agents.ran == ["t0", "t1"]


async def test_parked_agents_are_recalled_and_other_endings_are_failures(path: Path) -> None:
    class Ends:
        async def run(self, task: AgentAssignment) -> AgentRunResult[Any]:
            reason = [TerminationReason.PARKED, TerminationReason.SHUTDOWN, TerminationReason.ERROR][
                int(task.task_id[1])
            ]
            return AgentRunResult(
                task_id=task.task_id,
                agent_id=task.agent_id,
                termination_reason=reason,
                error_message="said so" if reason is TerminationReason.ERROR else None,
            )

    for _ in range(2):
        with SqliteJournal(path) as journal:
            result = await ParallelExecutor(engine=JournaledEngine(Ends(), journal)).execute_group(group_of(3))
        assert [outcome.status.value for outcome in result.outcomes] == ["parked", "failed", "failed"]
    told = [(attempt.task_id, attempt.status, attempt.content) for attempt in read_journal(path)[0].attempts]
    assert sorted(told[3:]) == [("t1", "failed", "ended with shutdown"), ("t2", "failed", "said so")]


async def test_retries_outside_and_inside_of_the_journal_find_the_success(path: Path) -> None:
    policy = RetryPolicy(retry_on=OSError, attempts=3, initial_wait_seconds=0, jitter_seconds=0)
    tries: list[int] = []

    async def agent(_task: AgentAssignment) -> str:
        tries.append(current_run().attempt)
        current_run().record_usage(Usage(requests=1))
        if current_run().attempt < 3:
            raise OSError
        return "third time"

    for outside in (True, False):
        for _ in range(2):
            with SqliteJournal(path) as journal:
                inner = FunctionEngine(agent)
                name = f"outside={outside}"
                engine: Any = (
                    RetryEngine(JournaledEngine(inner, journal, execution=name), policy)
                    if outside
                    else JournaledEngine(RetryEngine(inner, policy), journal, execution=name)
                )
                result = await ParallelExecutor(engine=engine).execute_group(group_of(1))
            assert result.outcomes[0].output == "third time"
            assert result.total_usage == Usage(requests=3)
    assert tries == [1, 2, 3] * 2
    assert [len(execution.attempts) for execution in read_journal(path)] == [3, 1]


@frozen
class Point:
    x: int
    y: int


async def test_outputs_of_a_type_that_is_told_come_back_as_they_were(path: Path) -> None:
    agents = Agents(t0=Point(1, 2))
    for _ in range(2):
        result, _ = await run_group(path, agents, group_of(1), output_type=Point)
        assert result.outcomes[0].output == Point(1, 2)
    assert agents.ran == ["t0"]
    pair = Agents(t0=(1, 2))
    for _ in range(2):
        result, _ = await run_group(path, pair, group_of(1), output_type=tuple[int, ...], execution="pairs")
        assert result.outcomes[0].output == (1, 2)
    result, _ = await run_group(path, pair, group_of(1), output_type=Point, execution="pairs")
    assert result.outcomes[0].status is OutcomeStatus.FAILED  # recorded as something else


@pytest.mark.parametrize("output", [Point(1, 2), (1, 2), {"deep": [(1,)]}, {1: 2}, float("nan")])
async def test_an_output_that_would_not_come_back_is_a_failure_at_once(path: Path, output: object) -> None:
    result, _ = await run_group(path, Agents(t0=output), group_of(1))
    (outcome,) = result.outcomes
    assert outcome.status is OutcomeStatus.FAILED
    assert outcome.error is not None
    assert "give JournaledEngine an output_type" in outcome.error
    assert outcome.usage == Usage(cost=1.0)


async def test_what_is_no_result_is_recorded_as_a_failure(path: Path) -> None:
    class Wrong:
        async def run(self, _task: AgentAssignment) -> AgentRunResult[Any]:
            current_run().record_usage(Usage(requests=1))
            return 5  # type: ignore[return-value]

    for number in (1, 2):
        with SqliteJournal(path) as journal:
            result = await ParallelExecutor(engine=JournaledEngine(Wrong(), journal)).execute_group(group_of(1))
        assert result.outcomes[0].error == "The engine returned int instead of an AgentRunResult"
        assert result.total_usage == Usage(requests=number)
    assert read_journal(path)[0].attempts[0].content == "returned int instead of an AgentRunResult"


async def test_names_and_errors_that_utf_8_cannot_hold_are_recorded_all_the_same(path: Path) -> None:
    group = ParallelExecutionGroup(
        group_id="g\ud800",
        assignments=[AgentAssignment(identity=AgentIdentity(id="a\ud800"), task=Task(id="t\ud800"))],
    )
    await run_group(path, Agents(**{"t\ud800": ValueError("no\ud800")}), group)
    (attempt,) = read_journal(path)[0].attempts
    assert (attempt.task_id, attempt.content) == ("t\\ud800", "ValueError: no\\ud800")
    agents = Agents(**{"t\ud800": "text\ud800"})
    for _ in range(2):
        result, _ = await run_group(path, agents, group)
        assert result.outcomes[0].output == "text\ud800"
    assert len(agents.ran) == 1


async def test_a_result_that_cannot_be_recorded_is_carried_by_its_error_and_nothing_more_starts(
    path: Path,
) -> None:
    ran = []

    async def agent(task: AgentAssignment) -> str:
        ran.append(task.task_id)
        path.unlink()
        return "paid for"

    with SqliteJournal(path) as journal:
        engine = JournaledEngine(FunctionEngine(agent), journal)
        result = await ParallelExecutor(engine=engine).execute_group(group_of(3, max_concurrency=1))
    assert ran == ["t0"]
    for outcome in result.outcomes:
        assert outcome.status is OutcomeStatus.FAILED
        assert "somebody removed or replaced the file; nothing more starts with it" in str(outcome.error)
    assert len({outcome.error for outcome in result.outcomes}) == 1
    lost = result.outcomes[0].exception
    assert isinstance(lost, JournalError)
    assert lost.result is not None
    assert lost.result.output == "paid for"


async def test_a_journal_that_was_replaced_is_not_written_any_more(path: Path) -> None:
    with SqliteJournal(path) as journal:
        path.rename(path.with_suffix(".old"))
        path.touch()
        engine = JournaledEngine(FunctionEngine(Agents()), journal)
        result = await ParallelExecutor(engine=engine).execute_group(group_of(1))
    assert "replaced the file" in str(result.outcomes[0].error)
    assert path.stat().st_size == 0


async def test_a_cancellation_while_a_result_is_recorded_comes_too_late(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes, go_on = threading.Event(), threading.Event()
    real = store.end

    def slow_end(*arguments: Any, **named: Any) -> None:
        writes.set()
        go_on.wait(60)
        real(*arguments, **named)

    monkeypatch.setattr(store, "end", slow_end)
    with SqliteJournal(path) as journal, anyio.fail_after(60):
        engine = JournaledEngine(FunctionEngine(Agents()), journal)
        async with ParallelExecutor(engine=engine).open_group(group_of(1)) as run:
            await anyio.to_thread.run_sync(writes.wait)
            run.cancel()
            await anyio.lowlevel.checkpoint()
            go_on.set()
    assert run.result.outcomes[0].output == "output of t0"
    assert read_journal(path)[0].attempts[0].status == "succeeded"


async def test_a_disk_that_does_not_answer_does_not_hold_up_a_result_for_ever(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    monkeypatch.setattr("parallel_agents.journals.sqlite.END_SECONDS", 0.01)
    real = store.end
    monkeypatch.setattr(store, "end", lambda *args, **named: (go_on.wait(60), real(*args, **named)))
    with SqliteJournal(path) as journal:
        engine = JournaledEngine(FunctionEngine(Agents()), journal)
        result = await ParallelExecutor(engine=engine).execute_group(group_of(1))
        go_on.set()
    assert "has not been written for 0.01 s" in str(result.outcomes[0].error)


def test_a_cancellation_at_any_step_loses_nothing_that_succeeded() -> None:
    class Memory:
        """A journal whose durability takes one step."""

        def __init__(self) -> None:
            self.endings: list[Ending] = []

        async def start(self, _step: Step) -> Entry:
            await anyio.lowlevel.checkpoint()
            return Entry(attempt=1)

        def spend(self, attempt: int, usage: Usage) -> None:
            raise NotImplementedError

        async def end(self, _attempt: int, ending: Ending) -> None:
            with anyio.CancelScope(shield=True):
                await anyio.lowlevel.checkpoint()
            self.endings.append(ending)

    journals: list[Memory] = []
    succeeded: list[bool] = []

    async def agent(_task: AgentAssignment) -> None:
        await anyio.lowlevel.checkpoint()
        succeeded.append(True)

    async def program() -> None:
        succeeded.clear()
        journals[:] = [Memory()]
        engine = JournaledEngine(FunctionEngine(agent), journals[0])
        await ParallelExecutor(engine=engine).execute_group(group_of(1))

    def check() -> None:
        if journals:
            assert len(journals[0].endings) == len(succeeded)

    assert cancel_at_every_checkpoint(program, check=check) > 3


# Journals of every version, as `sqlite3 FILE .dump` prints them; made by an execution "old" of version "1"


def golden_group() -> ParallelExecutionGroup:
    identity = AgentIdentity(id="a", name="Ada", role="reviewer", instructions="read", model="large")
    rich = AgentAssignment(
        identity=identity,
        task=Task(id="rich", title="Title", description="All of it", inputs={"path": "x", "deep": [1, {"y": None}]}),
        completion_config=CompletionConfig(temperature=0.5),
        max_turns=7,
        memory_messages=[ChatMessage(role="user", content="hello")],
    )
    tasks = [Task(id="after", depends_on=["rich"]), Task(id="fails")]
    others = [AgentAssignment(identity=AgentIdentity(id=task.id), task=task) for task in tasks]
    return ParallelExecutionGroup(group_id="g", assignments=[rich, *others])


async def golden_agent(task: AgentAssignment) -> Any:
    current_run().record_usage(Usage(input_tokens=10, output_tokens=5, requests=1, cost=0.25))
    if task.task_id == "fails":
        raise ValueError("as always")
    return {"task": task.task_id, "text": "é\ud800", "number": 1.5, "list": [None, True]}


@pytest.mark.parametrize("dump", sorted(Path(__file__).with_name("journals").glob("*.sql")), ids=lambda dump: dump.stem)
async def test_a_journal_of_every_version_can_be_resumed(path: Path, dump: Path) -> None:
    made_by(dump.read_text("utf-8"))(path)
    observer = Run()
    with SqliteJournal(path) as journal:
        engine = JournaledEngine(FunctionEngine(golden_agent), journal, execution="old", version="1")
        result = await ParallelExecutor(engine=engine, observers=(observer,)).execute_group(golden_group())
    assert sorted(observer.events, key=str) == [("after", "recorded"), ("fails", "failed"), ("rich", "recorded")]
    assert result.outcomes[0].output == {"task": "rich", "text": "é\ud800", "number": 1.5, "list": [None, True]}
    assert [outcome.usage.cost for outcome in result.outcomes] == [0.25, 0.25, 0.5]


def test_there_is_a_journal_of_each_version() -> None:
    dumps = Path(__file__).with_name("journals").glob("*.sql")
    assert sorted(dump.stem for dump in dumps) == [f"version-{n}" for n in range(1, store.VERSION + 1)]


# The file


def test_the_files_are_for_their_owner_alone(path: Path) -> None:
    old = os.umask(0)
    try:
        with SqliteJournal(path):
            files = list(path.parent.iterdir())
            assert len(files) >= 3
            assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    finally:
        os.umask(old)


def test_a_journal_is_opened_once_and_closed_as_often_as_one_likes(path: Path) -> None:
    journal = SqliteJournal(path)
    with pytest.raises(RuntimeError, match="not open"):
        journal.unfinished("g")
    journal.open()
    with pytest.raises(RuntimeError, match="open already"):
        journal.open()
    assert repr(journal) == f"SqliteJournal({str(path)!r})"
    journal.close()
    journal.close()
    with journal:
        assert journal.unfinished("g") is None


def made_by(statement: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        database = sqlite3.connect(path)
        database.executescript(statement)
        database.close()

    return make


def damaged(path: Path) -> None:
    with SqliteJournal(path):
        pass
    content = bytearray(path.read_bytes())
    content[4096:8192] = b"\xff" * 4096
    path.write_bytes(content)


def linked(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"))


BAD_FILES: list[tuple[Callable[[Path], object], str]] = [
    (made_by("CREATE TABLE mine (x)"), "is no journal of agents but another database"),
    (made_by(f"PRAGMA application_id={store.APPLICATION_ID}; PRAGMA user_version=99"), "has version 99"),
    (lambda path: path.write_text("nothing of the kind, at all"), "file is not a database"),
    (lambda path: path.mkdir(), "Is a directory"),
    (lambda path: os.mkfifo(path), "is no regular file"),
    (linked, "symbolic link"),
    (damaged, "damaged|malformed|disk image"),
]


@pytest.mark.parametrize(("make", "said"), BAD_FILES)
def test_what_is_no_journal_of_this_version_is_refused_and_left_as_it_is(
    path: Path, make: Callable[[Path], object], said: str
) -> None:
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(JournalError, match=said) as caught:
        SqliteJournal(path).open()
    assert caught.value.journal == str(path)
    assert (path.read_bytes() if path.is_file() else None) == before
    assert not is_in_use(path)


def test_a_journal_that_is_not_there_cannot_be_read(path: Path) -> None:
    with pytest.raises(JournalError, match="cannot be read: unable to open"):
        read_journal(path)
    assert not path.exists()
    with pytest.raises(JournalError, match="No such file or directory"):
        SqliteJournal(path / "deeper" / "x").open()
    assert not is_in_use(path / "deeper" / "x")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_that_may_not_be_written_is_told(folder_of_nobody: Path, is_there: bool) -> None:
    path = folder_of_nobody / "run.journal"
    if is_there:
        with SqliteJournal(path):
            pass
    folder_of_nobody.chmod(0o500)
    with pytest.raises(JournalError, match="readonly database" if is_there else "Permission denied"):
        SqliteJournal(path).open()
    folder_of_nobody.chmod(0o700)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE attempts SET requests = -1",
        "UPDATE attempts SET started = 'now'",
        "UPDATE executions SET name = x'00'",
        "DROP TABLE executions",
    ],
)
async def test_a_journal_with_nonsense_in_it_cannot_be_read(path: Path, damage: str) -> None:
    await run_group(path, Agents())
    made_by(damage)(path)
    with pytest.raises(JournalError, match=r"cannot be read: (no such table|requests must|started must|name must)"):
        read_journal(path)


def test_who_looks_whether_a_journal_is_in_use_keeps_no_run_from_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SqliteJournal(path):
        pass
    looks = os.open(store.lock_path(path), os.O_RDONLY)
    assert store.lock_now(looks, shared=True)
    assert not is_in_use(path)  # nor from each other
    monkeypatch.setattr("time.sleep", lambda _seconds: os.close(looks))
    with SqliteJournal(path):
        assert is_in_use(path)
    store.lock_path(path).unlink()
    assert not is_in_use(path)
    assert not store.lock_path(path).exists()


def test_a_file_that_a_crash_left_empty_is_a_new_journal(path: Path) -> None:
    path.touch()
    with SqliteJournal(path):
        pass
    assert read_journal(path) == ()


def test_a_journal_of_somebody_else_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: path.parent.stat().st_uid + 1)
    with pytest.raises(JournalError, match="belongs to another user"):
        SqliteJournal(path).open()


def test_a_journal_is_in_use_until_its_process_has_ended_however_that_does(path: Path) -> None:
    program = f"""
import sys
sys.path[:0] = {[entry for entry in sys.path if entry]!r}
from parallel_agents.journals.sqlite import SqliteJournal
SqliteJournal({str(path)!r}).open()
print("open", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"open\n"
        with pytest.raises(JournalError, match=f"process {process.pid}"):
            SqliteJournal(path).open()
        process.kill()
        process.wait()
        with SqliteJournal(path):
            pass


def test_engines_refuse_what_makes_no_sense() -> None:
    a_journal = SqliteJournal("unused")
    inner = FunctionEngine(Agents())
    with pytest.raises(TypeError, match="inner must be an engine"):
        JournaledEngine(5, a_journal)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="journal must be a Journal"):
        JournaledEngine(inner, "run.journal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="execution must not be blank"):
        JournaledEngine(inner, a_journal, execution=" ")
    assert repr(JournaledEngine(inner, a_journal)).endswith("SqliteJournal('unused'))")

    class Refuses:
        def check(self, _assignment: AgentAssignment) -> None:
            raise ValueError("not that one")

        run = inner.run

    with pytest.raises(ValueError, match="not that one"):
        JournaledEngine(Refuses(), a_journal).check(assignment(1))


def test_a_field_that_is_new_changes_no_old_work() -> None:
    @frozen(kw_only=True)
    class LaterTask(Task):
        mood: str = ""
        tags: tuple[str, ...] = ()

    def of(task: Task, **identity: Any) -> str:
        return fingerprint(AgentAssignment(identity=AgentIdentity(id="a", **identity), task=task), {}, "")

    old = of(Task(id="t"))
    assert of(LaterTask(id="t")) == of(Task(id="t"), name="a") == old
    assert (
        len({old, of(LaterTask(id="t", mood="x")), of(LaterTask(id="t", tags=("",))), of(Task(id="t"), name="b")}) == 4
    )
