"""Events: a start and an end for everything, on every path; and text from outside that stays text."""

import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from attrs import define, field, fields
from attrs.exceptions import FrozenInstanceError
from groups import assignment, group_of
from loguru import logger

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    InMemoryResourceLock,
    Observer,
    ParallelEvent,
    ParallelExecutionError,
    ParallelExecutionGroup,
    ParallelExecutor,
    ResourceConflictError,
    ShutdownManager,
    Task,
    Usage,
    current_run,
    events,
)

pytestmark = pytest.mark.anyio

HOSTILE = [
    "{braces}",
    "{0.__class__}",
    "{record[message]}",
    "<red>markup</red>",
    "[/]",
    "new\nline",
    "\x1b[31mescape\x1b[0m",
    "%s %d",
    "x" * 10_000,
]


@define
class Recorder:
    """An observer that keeps everything."""

    seen: list[ParallelEvent] = field(factory=list)

    def on_event(self, event: ParallelEvent) -> None:
        self.seen.append(event)

    def names(self) -> list[str]:
        return [event.name for event in self.seen if event.name != events.PARALLEL_PROGRESS_UPDATE]

    def of(self, name: str) -> list[ParallelEvent]:
        return [event for event in self.seen if event.name == name]


@pytest.fixture
def records() -> Iterator[list[dict[str, Any]]]:
    """Every loguru record of the library, as a sink gets it."""
    kept: list[dict[str, Any]] = []
    logger.enable("parallel_agents")
    sink = logger.add(lambda message: kept.append(dict(message.record)), level=0, format="{message}")
    yield kept
    logger.remove(sink)
    logger.disable("parallel_agents")


def check_pairs(seen: list[ParallelEvent], status: str) -> None:
    """Every start has exactly one end."""
    counts = Counter(event.name for event in seen)
    assert counts[events.PARALLEL_GROUP_START] == counts[events.PARALLEL_GROUP_COMPLETE] == 1
    (complete,) = (event for event in seen if event.name == events.PARALLEL_GROUP_COMPLETE)
    assert complete.fields["status"] == status
    assert complete is seen[-1] or seen[-1].name == events.PARALLEL_GROUP_SUPPRESSED
    started = [event.task_id for event in seen if event.name == events.PARALLEL_AGENT_START]
    ends = (events.PARALLEL_AGENT_COMPLETE, events.PARALLEL_AGENT_ERROR, events.PARALLEL_AGENT_CANCELLED)
    ended = [event.task_id for event in seen if event.name in ends]
    assert sorted(map(str, started)) == sorted(map(str, ended))
    assert len(set(started)) == len(started)


async def fine(task: AgentAssignment) -> None:
    await anyio.lowlevel.checkpoint()


def raising(error: type[BaseException]) -> Callable[[AgentAssignment], Any]:
    async def agent(task: AgentAssignment) -> None:
        await anyio.lowlevel.checkpoint()
        if task.task_id == "t1":
            raise error
        await anyio.sleep(0.001)

    return agent


@pytest.mark.proves("V1")
@pytest.mark.parametrize(
    ("agent", "options", "status", "raised"),
    [
        (fine, {}, "completed", None),
        (raising(ValueError), {}, "completed", None),
        (raising(ValueError), {"fail_fast": True}, "failed_fast", None),
        (raising(MemoryError), {}, "fatal", ParallelExecutionError),
        (raising(KeyboardInterrupt), {}, "interrupted", KeyboardInterrupt),
        (raising(SystemExit), {"fail_fast": True}, "interrupted", SystemExit),
    ],
)
async def test_every_start_has_one_end_whatever_agents_do(
    agent: Any, options: dict[str, Any], status: str, raised: type[BaseException] | None
) -> None:
    recorder = Recorder()
    executor = ParallelExecutor(engine=agent, observers=[recorder])
    with anyio.fail_after(5):
        try:
            await executor.execute_group(group_of(4, max_concurrency=2, **options))
        except BaseException as error:
            assert raised is not None
            assert isinstance(error, raised)
        else:
            assert raised is None
    check_pairs(recorder.seen, status)


@pytest.mark.proves("V1")
@pytest.mark.parametrize("way", ["caller", "cancel", "block", "shutdown", "conflict", "overlap", "refused"])
async def test_every_start_has_one_end_whatever_happens_to_the_group(way: str) -> None:
    recorder = Recorder()
    manager = ShutdownManager()
    lock = InMemoryResourceLock()
    assert await lock.acquire("r", "outsider")
    started = anyio.Event()

    class Engine:
        def check(self, task: AgentAssignment, /) -> None:
            if way == "refused":
                raise ValueError("not this one")

        async def run(self, task: AgentAssignment, /) -> Any:
            started.set()
            await anyio.sleep_forever()

    claims = {"conflict": ("r",), "overlap": ("s",)}.get(way, ())
    group = group_of(3, max_concurrency=2, each={"resource_claims": claims})
    executor = ParallelExecutor(engine=Engine(), observers=[recorder], shutdown_manager=manager, resource_lock=lock)
    expected = {"conflict": ResourceConflictError, "overlap": ResourceConflictError, "refused": ValueError}
    caught: BaseException | None = None
    with anyio.fail_after(5), anyio.CancelScope() as scope:
        try:
            async with executor.open_group(group) as run:
                await started.wait()
                if way == "caller":
                    scope.cancel()
                elif way == "cancel":
                    run.cancel()
                elif way == "shutdown":
                    manager.cancel_now()
                else:
                    raise LookupError("mine")
        except (ResourceConflictError, ValueError, LookupError) as error:
            caught = error
    assert (caught is None) == (way in ("caller", "cancel", "shutdown"))
    if way in expected:
        assert isinstance(caught, expected[way])
    statuses = {"caller": "cancelled", "cancel": "cancelled", "block": "error", "shutdown": "shutdown"}
    check_pairs(recorder.seen, statuses.get(way, "refused" if way == "refused" else "conflict"))
    if way in ("overlap", "refused"):
        assert len(recorder.of(events.PARALLEL_VALIDATION_ERROR)) == 1


@pytest.mark.proves("V1")
async def test_several_orders_to_end_are_one_that_is_raised_and_a_count() -> None:
    recorder = Recorder()
    both = anyio.Event()
    waiting = 0

    async def agent(task: AgentAssignment) -> None:
        nonlocal waiting
        waiting += 1
        if waiting == 2:
            both.set()
        try:
            await both.wait()
        finally:
            raise SystemExit(task.task_id)

    with anyio.fail_after(5), pytest.raises(SystemExit):
        await ParallelExecutor(engine=agent, observers=[recorder]).execute_group(group_of(2))
    (suppressed,) = recorder.of(events.PARALLEL_GROUP_SUPPRESSED)
    assert suppressed.fields["exception_count"] == 2


async def test_an_observer_that_names_what_it_wants_is_told_of_nothing_else() -> None:
    class Picky(Recorder):
        event_names = frozenset({events.PARALLEL_AGENT_COMPLETE})

    class Deaf(Recorder):
        event_names: frozenset[str] = frozenset()

    everything, picky, deaf = Recorder(), Picky(), Deaf()
    await ParallelExecutor(engine=fine, observers=[everything, picky, deaf]).execute_group(group_of(2))
    assert [event.name for event in picky.seen] == [events.PARALLEL_AGENT_COMPLETE] * 2
    assert picky.seen == everything.of(events.PARALLEL_AGENT_COMPLETE)
    assert everything.of(events.PARALLEL_PROGRESS_UPDATE)
    assert deaf.seen == []


async def test_what_an_observer_is_told_is_a_value_like_any_other() -> None:
    recorder = Recorder()
    await ParallelExecutor(engine=fine, observers=[recorder]).execute_group(group_of(1))
    for event in recorder.seen:
        made = {a.name: getattr(event, a.name) for a in fields(ParallelEvent)}
        assert pickle.loads(pickle.dumps(event)) == event == ParallelEvent(**made)
        with pytest.raises(FrozenInstanceError):
            event.name = "other"  # type: ignore[misc]


async def test_an_observer_is_told_in_the_context_of_what_it_is_about() -> None:
    what: ContextVar[str] = ContextVar("what", default="the caller's")
    seen: list[str] = []

    class Setter:
        def on_event(self, event: ParallelEvent) -> None:
            if event.name == events.PARALLEL_GROUP_START:
                what.set("the group's")
            elif event.name == events.PARALLEL_AGENT_START:
                assert (what.get(), current_run().assignment.task_id) == ("the group's", event.task_id)
                what.set(f"{event.task_id}'s")
            elif event.name in (events.PARALLEL_AGENT_COMPLETE, events.PARALLEL_GROUP_COMPLETE):
                seen.append(what.get())

    async def agent(task: AgentAssignment) -> None:
        await anyio.lowlevel.checkpoint()
        assert what.get() == f"{task.task_id}'s"

    result = await ParallelExecutor(engine=agent, observers=[Setter()]).execute_group(group_of(2))
    assert result.all_succeeded
    assert sorted(seen[:2]) == ["t0's", "t1's"]
    assert seen[2:] == ["the group's"]
    assert what.get() == "the caller's"


@pytest.mark.proves("V1")
async def test_an_agents_start_is_told_when_its_engine_call_starts_and_its_end_with_what_came_of_it() -> None:
    recorder = Recorder()

    async def agent(task: AgentAssignment) -> None:
        assert recorder.of(events.PARALLEL_AGENT_START)[-1].task_id == task.task_id
        current_run().record_usage(Usage(input_tokens=3, output_tokens=2, cost=0.5))
        if task.task_id == "t1":
            raise ValueError("boom")

    await ParallelExecutor(engine=agent, observers=[recorder]).execute_group(group_of(2, max_concurrency=1))
    assert recorder.names() == [
        events.PARALLEL_GROUP_START,
        events.PARALLEL_AGENT_START,
        events.PARALLEL_AGENT_COMPLETE,
        events.PARALLEL_AGENT_START,
        events.PARALLEL_AGENT_ERROR,
        events.PARALLEL_GROUP_COMPLETE,
    ]
    start, _, complete, _, error, end = (e for e in recorder.seen if e.name != events.PARALLEL_PROGRESS_UPDATE)
    assert start.fields == {"agent_count": 2, "max_concurrency": 1, "fail_fast": False}
    spent = {"input_tokens": 3, "output_tokens": 2, "cost": 0.5}
    assert complete.agent_id == "a0"
    assert complete.fields.items() >= {"success": True, "status": "succeeded", **spent}.items()
    assert error.agent_id == "a1"
    assert error.fields.items() >= {"error": "ValueError: boom", "status": "failed", **spent}.items()
    assert all(ended.fields["duration_seconds"] >= 0 for ended in (complete, error))
    assert (end.fields["succeeded"], end.fields["failed"]) == (1, 1)
    assert [e.at_seconds for e in recorder.seen] == sorted(e.at_seconds for e in recorder.seen)
    assert isinstance(recorder, Observer)


@pytest.mark.proves("V2")
@pytest.mark.parametrize("text", HOSTILE)
async def test_text_from_outside_arrives_as_it_was_and_never_in_a_message(
    text: str, records: list[dict[str, Any]]
) -> None:
    async def agent(task: AgentAssignment) -> None:
        raise ValueError(text)

    lock = InMemoryResourceLock()
    executor = ParallelExecutor(engine=agent, resource_lock=lock, observers=[Recorder()])
    group = ParallelExecutionGroup(
        group_id=text,
        assignments=[
            AgentAssignment(identity=AgentIdentity(id=text), task=Task(id=text), resource_claims=(f"claim {text}",))
        ],
    )
    result = await executor.execute_group(group)
    assert result.outcomes[0].error == f"ValueError: {text}"
    known = {value for name, value in vars(events).items() if name.startswith("PARALLEL_")}
    assert {record["message"] for record in records} <= known
    (error,) = (r["extra"] for r in records if r["message"] == events.PARALLEL_AGENT_ERROR)
    ids = {"group_id": text, "agent_id": text, "task_id": text}
    assert error.items() >= {**ids, "error": f"ValueError: {text}", "error_type": "ValueError"}.items()
    (acquired,) = (r["extra"] for r in records if r["message"] == events.PARALLEL_LOCK_ACQUIRED)
    assert acquired["resource"] == f"claim {text}"
    json.dumps([r["extra"] for r in records])


@pytest.mark.proves("V2")
async def test_what_a_sink_prints_shows_no_variables_and_no_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def agent(task: AgentAssignment) -> None:
        secret = "sk-" + "canary"
        raise ValueError(f"\x1b[31m{len(secret)}\nforged line")

    lines: list[str] = []
    logger.enable("parallel_agents")
    sink = logger.add(lines.append, level=0, diagnose=True, backtrace=True, format="{message} {extra}", colorize=True)
    try:
        await ParallelExecutor(engine=agent).execute_group(group_of(1))
    finally:
        logger.remove(sink)
        logger.disable("parallel_agents")
    printed = "".join(lines)
    assert "canary" not in printed
    assert "\x1b[31m" not in printed
    assert "\nforged" not in printed
    assert capsys.readouterr().out == ""


@pytest.mark.proves("P3", "V2")
async def test_what_an_observer_raises_is_logged(records: list[dict[str, Any]]) -> None:
    class Bad:
        def on_event(self, event: ParallelEvent) -> None:
            raise RuntimeError("{bad}")

    result = await ParallelExecutor(engine=fine, observers=[Bad()]).execute_group(group_of(1))
    assert result.all_succeeded
    errors = {r["extra"]["error"] for r in records if r["message"] == events.PARALLEL_OBSERVER_ERROR}
    assert errors == {"RuntimeError: {bad}"}


@pytest.mark.proves("V1")
async def test_each_constant_is_logged_at_its_level(records: list[dict[str, Any]]) -> None:
    lock = InMemoryResourceLock()

    async def agent(task: AgentAssignment) -> None:
        if task.task_id == "t1":
            raise MemoryError
        if task.task_id == "t2":
            await anyio.sleep(3600)

    assignments = [assignment(n, resource_claims=("r",) if n == 0 else ()) for n in range(3)]
    executor = ParallelExecutor(engine=agent, resource_lock=lock)
    with anyio.fail_after(5), pytest.raises(ParallelExecutionError):
        async with executor.open_group(ParallelExecutionGroup(group_id="g", assignments=assignments)) as run:
            async for outcome in run:
                if outcome.task_id == "t1":
                    run.cancel_task("t2")
    assert await lock.acquire("r", "one")
    assert not await lock.acquire("r", "two")
    await lock.release("r", "two")
    levels = {(r["message"], r["level"].name) for r in records}
    assert levels == {
        (events.PARALLEL_GROUP_START, "INFO"),
        (events.PARALLEL_GROUP_COMPLETE, "INFO"),
        (events.PARALLEL_AGENT_START, "INFO"),
        (events.PARALLEL_AGENT_COMPLETE, "INFO"),
        (events.PARALLEL_AGENT_ERROR, "ERROR"),
        (events.PARALLEL_AGENT_CANCELLED, "WARNING"),
        (events.PARALLEL_LOCK_ACQUIRED, "DEBUG"),
        (events.PARALLEL_LOCK_RELEASED, "DEBUG"),
        (events.PARALLEL_LOCK_CONFLICT, "DEBUG"),
        (events.PARALLEL_LOCK_CONFLICT, "WARNING"),
        (events.PARALLEL_PROGRESS_UPDATE, "DEBUG"),
    }


@pytest.mark.proves("V2")
async def test_nobody_listening_means_no_log_call_per_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(events, "write_log", lambda name, /, **fields: calls.append(name))
    await ParallelExecutor(engine=fine).execute_group(group_of(5))
    assert calls == []


async def test_the_library_is_silent_until_it_is_enabled(capsys: pytest.CaptureFixture[str]) -> None:
    await ParallelExecutor(engine=raising(ValueError)).execute_group(group_of(3))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
