"""What engines for clusters share, and the host of Ray, without any cluster."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import anyio
import pytest
from attrs import evolve

from parallel_agents import (
    AgentAssignment,
    AgentIdentity,
    AgentOutcome,
    AgentRunResult,
    FunctionEngine,
    ParallelExecutionGroup,
    ParallelExecutor,
    ResourceClaim,
    RunContext,
    Task,
    TerminationReason,
    Usage,
    current_run,
)
from parallel_agents._health import serve_health
from parallel_agents.engines import _ray_host, _remote
from parallel_agents.engines._ray_host import Host, HostState, News, Parcel
from parallel_agents.engines._remote import (
    Account,
    AgentEvent,
    Ending,
    EndingKind,
    Order,
    RemoteAgentError,
    Report,
    VersionMismatchError,
    WorkerRefusedError,
    pack,
    unconfirmed,
    unpack,
)
from parallel_agents.engines._remote_worker import RunOnWorker, engine_named
from parallel_agents.events import CHAT_REQUEST_RETRY, PARALLEL_AGENT_RETRY
from parallel_agents.serialization import InvalidDataError
from parallel_agents.testing.plugin import EventRecorder
from parallel_agents.testing.remote_agents import Diary, agent, assignment

SECONDS = 30.0
AGENT = "parallel_agents.testing.remote_agents:agent"
T = TypeVar("T")


@pytest.fixture
def diary(tmp_path: Path) -> Diary:
    return Diary(tmp_path / "diary")


def an_order(do: str, diary: Diary, number: int = 1, **fields: Any) -> Order:
    work = assignment(do, diary, number, **fields)
    return Order(id=f"id{number}", engine=AGENT, group_id="g", assignment=work)


async def in_a_run(check: Callable[[RunContext], Awaitable[object]], **options: Any) -> AgentOutcome[Any]:
    """Call a function in an engine call, where it has a run."""

    async def body(_: AgentAssignment) -> None:
        await check(current_run())

    group = ParallelExecutionGroup.map("g", AgentIdentity(id="a"), [Task(id="t")])
    with anyio.fail_after(SECONDS):
        return (await ParallelExecutor(engine=body, **options).execute_group(group)).outcomes[0]


# What travels


def test_an_order_and_a_report_arrive_as_they_were_sent(diary: Diary) -> None:
    order = Order(
        id="i",
        group_id="g",
        assignment=assignment("return", diary, output={"a": [1, None, "\x1b"]}),
        attempt=2,
        upstream=[AgentOutcome(task_id="t0", agent_id="a0", error="failed")],
    )
    assert unpack(Order, pack(order), "driver") == order
    report = Report(
        id="i",
        start="s",
        usage=Usage(cost=1.5),
        events=[AgentEvent(name=CHAT_REQUEST_RETRY, fields={"attempt": 1})],
        ending=Ending.of_error(ValueError("no")),
    )
    assert unpack(Report, pack(report), "worker") == report


@pytest.mark.parametrize("changed", ["version", "protocol"])
def test_another_version_is_told_apart_with_both_in_the_message(changed: str) -> None:
    message = json.loads(pack(Report(id="i", start="s"))) | {changed: 99}
    with pytest.raises(VersionMismatchError) as caught:
        unpack(Report, json.dumps(message), "worker")
    assert str(caught.value).startswith("The worker runs parallel_agents ")
    assert f"this driver {_remote.VERSION} (protocol {_remote.PROTOCOL})" in str(caught.value)
    assert "99" in str(caught.value)


@pytest.mark.parametrize("text", ["[]", "{}", '"a"'])
def test_what_is_no_message_is_refused(text: str) -> None:
    with pytest.raises(InvalidDataError, match="not a message of a driver"):
        unpack(Order, text, "driver")


def test_claims_do_not_travel() -> None:
    claiming = AgentAssignment(
        identity=AgentIdentity(id="a"), task=Task(id="t"), resource_claims=[ResourceClaim(resource="r")]
    )
    order = Order.of(RunContext("g", claiming, bool), "id")
    assert order.assignment.resource_claims == ()
    assert order.assignment.identity == claiming.identity


def test_an_ending_says_what_the_agent_returned_or_raised() -> None:
    result: AgentRunResult[Any] = AgentRunResult(
        task_id="t", agent_id="a", termination_reason=TerminationReason.COMPLETED, output=[1]
    )
    assert Ending.of_value(result).value() == result
    with pytest.raises(RemoteAgentError, match="ValueError: no") as caught:
        Ending.of_error(ValueError("no")).value()
    assert caught.value.error_type == "ValueError"
    with pytest.raises(RemoteAgentError, match="TypeError: The engine returned int instead of an AgentRunResult"):
        Ending.of_value(1).value()
    with pytest.raises(
        RemoteAgentError, match="TypeError: an output of type set cannot travel as it is: return plain JSON"
    ):
        Ending.of_value(evolve(result, output={1})).value()
    with pytest.raises(WorkerRefusedError, match="not here"):
        Ending(kind=EndingKind.REFUSED, error="not here").value()


@pytest.mark.anyio
async def test_what_is_reported_twice_counts_once_and_another_start_is_added(recorded_events: EventRecorder) -> None:
    def events(*errors: str) -> list[AgentEvent]:
        fields = {"attempt": 1, "wait_seconds": 0.0}
        return [AgentEvent(name=PARALLEL_AGENT_RETRY, fields={**fields, "error": error}) for error in errors]

    async def check(run: RunContext) -> None:
        account = Account(run)
        one = Report(id="i", start="1", usage=Usage(requests=2), events=events("a", "b"))
        for report in (
            one,
            one,
            Report(id="i", start="1", usage=Usage(requests=3), first_event=1, events=events("b", "c")),
        ):
            account.take(report)
        assert run.usage == Usage(requests=3)
        account.take(Report(id="i", start="2", usage=Usage(requests=1), events=events("d")))
        assert run.usage == Usage(requests=4)

    outcome = await in_a_run(check, observers=[recorded_events])
    assert outcome.error is None
    told = [event.fields["error"] for event in recorded_events.events if event.name == PARALLEL_AGENT_RETRY]
    assert told == ["a", "b", "c", "d"]


@pytest.mark.anyio
async def test_time_does_not_count_while_a_report_says_that_the_agent_waits() -> None:
    async def check(run: RunContext) -> None:
        account = Account(run)
        for is_waiting in (True, True, False, False, True):
            account.take(Report(id="i", start="1", is_waiting=is_waiting))
            assert run.waits_for_others == is_waiting
        account.take(Report(id="i", start="1", is_waiting=True, ending=Ending(kind=EndingKind.CANCELLED)))
        assert not run.waits_for_others

    assert (await in_a_run(check)).error is None


class NotingEngine:
    """Its agents run elsewhere, and their workers do not answer."""

    async def run(self, assignment: AgentAssignment, /) -> AgentRunResult[Any]:
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class() as cancellation:
            cancellation.add_note(unconfirmed(0.5))
            raise
        raise AssertionError("nobody cancelled it")


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio-virtual", "trio-virtual"], indirect=True)
async def test_that_a_cancellation_is_not_confirmed_is_in_the_outcome() -> None:
    tasks = [Task(id="cancelled"), Task(id="late")]
    group = ParallelExecutionGroup.map("g", AgentIdentity(id="a"), tasks, timeout_seconds=5)
    async with ParallelExecutor(engine=NotingEngine()).open_group(group) as run:
        await anyio.sleep(1)
        run.cancel_task("cancelled")
    note = "The worker did not confirm within 0.5 s that the agent stopped: it may still run, and spend"
    assert [outcome.error for outcome in run.result.outcomes] == [
        f"Cancelled: cancel_task() was called. {note}",
        f"Timed out after 5 s. {note}",
    ]


# An agent on its worker


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("no colon", "must be named as 'module:attribute'"),
        ("no_such_module:a", "cannot be imported: ModuleNotFoundError"),
        ("json:no_such", "cannot be imported: AttributeError"),
        ("json:dumps", "must be an engine or an async function"),
        ("parallel_agents:FunctionEngine", "must be an engine or an async function"),
    ],
)
def test_an_engine_that_cannot_be_had_is_told(name: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        engine_named(name)


def test_an_engine_or_a_function_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(engine_named(AGENT), FunctionEngine)
    engine = FunctionEngine(agent)
    monkeypatch.setattr(_remote, "an_engine", engine, raising=False)
    assert engine_named("parallel_agents.engines._remote:an_engine") is engine


@pytest.mark.anyio
async def test_an_agent_on_a_worker_can_ask_and_tell_as_one_in_the_driver(diary: Diary) -> None:
    heard = 0

    def hear() -> None:
        nonlocal heard
        heard += 1

    async def body(_: AgentAssignment) -> list[Any]:
        now = current_run()
        assert isinstance(now, RunOnWorker)
        run.is_stopping = run.is_budget_spent = True
        with now.not_charged(), now.not_charged():
            assert now.report().is_waiting
        assert not now.waits_for_others
        now.record_usage(Usage(requests=1))
        now.emit(CHAT_REQUEST_RETRY, attempt=1, error="x", things={1})
        return [now.shutdown_requested, now.budget_exhausted, now.attempt, sorted(now.upstream)]

    order = Order(
        id="i",
        group_id="g",
        assignment=assignment("", diary),
        attempt=3,
        upstream=[AgentOutcome(task_id="t0", agent_id="a0", error="failed")],
    )
    run = RunOnWorker(order, hear)
    assert not run.shutdown_requested
    await run.perform(FunctionEngine(body))
    report = run.report(seen_events=0)
    assert report.ending is not None
    assert report.ending.value().output == [True, True, 3, ["t0"]]
    assert (report.usage, len(report.events), run.event_count) == (Usage(requests=1), 1, 1)
    assert report.events[0].fields["things"] == {"$repr": "{1}", "$type": "set"}
    assert run.report(seen_events=1).events == ()
    assert heard >= 4


@pytest.mark.anyio
async def test_an_order_to_end_is_an_agents_own_on_a_worker(diary: Diary) -> None:
    async def body(_: AgentAssignment) -> None:
        raise SystemExit("enough")

    run = RunOnWorker(an_order("", diary), bool)
    await run.perform(FunctionEngine(body))
    assert run.ending == Ending(kind=EndingKind.RAISED, error_type="SystemExit", error="SystemExit: enough")


@pytest.mark.anyio
async def test_an_agent_on_a_worker_is_cancelled_with_a_reason(diary: Diary) -> None:
    run = RunOnWorker(an_order("spend and wait", diary), bool)
    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.perform, engine_named(AGENT))
            await diary.wait_for("started")
            run.cancel(EndingKind.INTERRUPTED)
    assert run.ending == Ending(kind=EndingKind.INTERRUPTED)


@pytest.mark.anyio
async def test_the_task_of_an_agent_can_be_cancelled_from_outside(diary: Diary) -> None:
    run = RunOnWorker(an_order("spend and wait", diary), bool)
    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run.perform, engine_named(AGENT))
            await diary.wait_for("started")
            tasks.cancel_scope.cancel()
    assert run.ending == Ending(kind=EndingKind.CANCELLED)


# The host


def in_ray(check: Callable[[], Awaitable[object]]) -> None:
    """Run a test as Ray runs the methods of an actor: on asyncio."""

    async def bounded() -> None:
        async with asyncio.timeout(SECONDS):
            await check()

    asyncio.run(bounded(), debug=True)


class Driver:
    """A driver, by hand."""

    def __init__(self, host: Host, name: str = "driver") -> None:
        self.host = host
        self.name = name
        self.heard = 0
        self.link = ""
        self.endings: dict[str, Ending] = {}

    async def send(self, *orders: Order, **said: Any) -> News:
        """Call the host, and hear what it answers."""
        parcel = Parcel(orders=orders, heard=self.heard, **said)
        news = unpack(News, await self.host.exchange(self.name, pack(parcel)), "worker")
        assert not news.refusal
        self.heard = max(self.heard if news.link == self.link else 0, news.number)
        self.link = news.link
        self.endings |= {report.id: report.ending for report in news.reports if report.ending is not None}
        return news

    async def ending(self, id_: str) -> Ending:
        """Ask until an agent has ended."""
        while id_ not in self.endings:
            await self.send()
        return self.endings.pop(id_)

    async def state(self) -> HostState:
        return unpack(HostState, await self.host.state(), "worker")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ray_host, "NEWS_SECONDS", 0.01)


def test_an_order_that_is_sent_twice_is_started_once(diary: Diary) -> None:
    async def check() -> None:
        one, other = Driver(host := Host(AGENT), "one"), Driver(host, "other")
        await one.send(an_order("wait until told", diary))
        await one.send(an_order("wait until told", diary))
        await other.send(an_order("wait until told", diary))
        await diary.wait_for("started")
        diary.note("go")
        assert await one.ending("id1") == await other.ending("id1")
        assert len(diary.lines("started")) == 1
        await one.send()
        assert (await one.state()).untold == 1
        await other.send()
        assert (await one.state()).untold == 0

    in_ray(check)


def test_events_are_told_once_and_all_again_to_a_driver_that_sends_the_order_again(diary: Diary) -> None:
    async def check() -> None:
        driver = Driver(Host(AGENT))
        news = await driver.send(an_order("emit", diary))
        assert [len(report.events) for report in news.reports] == [1]
        again = await driver.send(an_order("emit", diary, 2))
        assert [report.id for report in again.reports] == ["id2"]
        unheard = Driver(driver.host, "unheard")
        await unheard.send(an_order("spend and wait", diary, 3))
        unheard.heard = 0
        (report,) = (await unheard.send(an_order("spend and wait", diary, 3))).reports
        assert (report.usage, report.ending) == (Usage(requests=1, cost=0.5), None)
        assert len(diary.lines("started")) == 3

    in_ray(check)


def test_a_call_that_waits_is_relieved_by_the_next(diary: Diary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ray_host, "NEWS_SECONDS", 1000.0)

    async def check() -> None:
        driver = Driver(Host(AGENT))
        first = asyncio.create_task(driver.send())
        await asyncio.sleep(0)
        second = asyncio.create_task(driver.send())
        assert (await first).reports == ()
        third = await driver.send(an_order("return", diary))
        assert [report.id for report in third.reports] == ["id1"]
        assert (await second).reports == ()

    in_ray(check)


def test_a_result_that_was_heard_is_let_go_of_and_the_same_order_starts_anew(diary: Diary) -> None:
    async def check() -> None:
        driver = Driver(Host(AGENT))
        for _ in range(2):
            await driver.send(an_order("return", diary, output=1))
            assert (await driver.ending("id1")).value().output == 1
            await driver.send()
        assert len(diary.lines("started")) == 2

    in_ray(check)


def test_another_driver_of_an_agent_that_was_interrupted_hears_of_its_next_start(diary: Diary) -> None:
    async def check() -> None:
        one, other = Driver(host := Host(AGENT), "one"), Driver(host, "other")
        for driver in (one, other):
            await driver.send(an_order("wait the first time", diary))
        await diary.wait_for("started")
        await host.interrupt()
        assert (await one.ending("id1")).kind is EndingKind.INTERRUPTED
        await one.send(an_order("wait the first time", diary))
        assert (await one.ending("id1")).value().output == "the second time"
        while (ending := await other.ending("id1")).kind is EndingKind.INTERRUPTED:
            await other.send(an_order("wait the first time", diary))
        assert ending.value().output == "the second time"
        assert len(diary.lines("started")) == 2

    in_ray(check)


def test_a_later_attempt_starts_anew_though_the_failure_was_not_heard(diary: Diary) -> None:
    async def check() -> None:
        driver = Driver(Host(AGENT))
        order = an_order("fail", diary)
        await driver.send(order)
        await driver.ending("id1")
        await driver.send(Order(id="id1", group_id="g", assignment=order.assignment, attempt=2))
        await diary.wait_for("started", count=2)

    in_ray(check)


def test_no_more_agents_run_than_the_host_has_places(diary: Diary) -> None:
    async def check() -> None:
        driver = Driver(Host(AGENT, max_agents=1))
        first, second, third = (an_order("spend and wait", diary, n) for n in (1, 2, 3))
        news = await driver.send(first, second, third)
        assert [(report.id, report.is_waiting) for report in news.reports] == [
            ("id1", False),
            ("id2", True),
            ("id3", True),
        ]
        state = await driver.state()
        assert (state.running, state.queued, state.started) == (1, 2, 1)
        await driver.send(cancels=("id2", "no such"))
        assert (await driver.ending("id2")).kind is EndingKind.CANCELLED
        await driver.send(cancels=("id1",))
        await driver.send(cancels=("id1",))
        await diary.wait_for("started", "t3")
        assert diary.lines("started", "t2") == []

    in_ray(check)


@pytest.mark.parametrize(
    ("ours", "problem"), [("no_such:agent", "cannot be imported"), ("json:x", "not parallel_agents")]
)
def test_what_a_host_does_not_run_is_refused(ours: str, problem: str, diary: Diary) -> None:
    async def check() -> None:
        driver = Driver(Host(ours))
        order = an_order("return", diary)
        await driver.send(
            Order(id="id1", engine=ours if "import" in problem else AGENT, group_id="g", assignment=order.assignment)
        )
        with pytest.raises(WorkerRefusedError, match=problem):
            (await driver.ending("id1")).value()

    in_ray(check)


def test_a_host_that_drains_lets_agents_finish_and_takes_no_more(diary: Diary) -> None:
    async def check() -> None:
        driver = Driver(host := Host(AGENT, max_agents=1))
        await driver.send(an_order("tell the context", diary, 1), an_order("return", diary, 2))
        await diary.wait_for("waits")
        await host.drain()
        assert (await driver.ending("id2")).kind is EndingKind.INTERRUPTED
        assert (await driver.ending("id1")).kind is EndingKind.RETURNED
        await driver.send(an_order("return", diary, 3))
        assert (await driver.ending("id3")).kind is EndingKind.INTERRUPTED
        assert (await driver.state()).is_draining

    in_ray(check)


def test_agents_that_a_host_cancels_are_to_run_elsewhere(diary: Diary) -> None:
    async def check() -> None:
        driver = Driver(host := Host(AGENT))
        await driver.send(an_order("spend and wait", diary))
        await diary.wait_for("started")
        await host.interrupt()
        assert (await driver.ending("id1")).kind is EndingKind.INTERRUPTED

    in_ray(check)


def test_agents_hear_of_a_shutdown_and_of_a_spent_budget(diary: Diary) -> None:
    async def check() -> None:
        driver = Driver(Host(AGENT))
        await driver.send(an_order("tell the context", diary))
        await diary.wait_for("waits")
        await driver.send(budget_spent=("id1", "no such"))
        await driver.send(stopping=("id1", "no such"))
        assert (await driver.ending("id1")).kind is EndingKind.RETURNED

    in_ray(check)


def test_drivers_that_are_gone_and_endings_that_nobody_came_for_are_forgotten(
    diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        gone, other = Driver(host := Host(AGENT), "gone"), Driver(host, "other")
        link = (await gone.send(an_order("return", diary, 1))).link
        monkeypatch.setattr(_ray_host, "SILENT_SECONDS", -1.0)
        monkeypatch.setattr(_ray_host, "KEEP_SECONDS", 1000.0)
        await other.send()
        monkeypatch.setattr(_ray_host, "SILENT_SECONDS", 1000.0)
        await other.send(an_order("return", diary, 1))
        assert (await other.ending("id1")).kind is EndingKind.RETURNED
        assert len(diary.lines("started")) == 1, "kept for whoever comes back"
        assert (await gone.send()).link not in ("", link)

        await other.send(an_order("return", diary, 2))
        await diary.wait_for("started", "t2")
        monkeypatch.setattr(_ray_host, "SILENT_SECONDS", -1.0)
        monkeypatch.setattr(_ray_host, "KEEP_SECONDS", -1.0)
        await gone.send()
        monkeypatch.setattr(_ray_host, "SILENT_SECONDS", 1000.0)
        await other.send(an_order("return", diary, 2))
        await diary.wait_for("started", "t2", count=2)

    in_ray(check)


def test_what_a_host_cannot_read_is_told(diary: Diary) -> None:
    async def check() -> None:
        host = Host(AGENT)
        assert "not a message" in unpack(News, await host.exchange("d", "[]"), "worker").refusal
        other = json.dumps({"protocol": 0, "version": "0", "body": {}})
        assert "The driver runs parallel_agents 0" in unpack(News, await host.exchange("d", other), "worker").refusal

    in_ray(check)


# The health of a worker


async def asked(port: int, request: bytes) -> str:
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(request)
        return b"".join([part async for part in stream]).decode()


@pytest.mark.anyio
async def test_a_worker_tells_how_it_is() -> None:
    is_ready = True
    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as tasks:
            address = ("127.0.0.1", 0)
            port = await tasks.start(serve_health, address, lambda: {"running": 3}, lambda: is_ready)
            answer = await asked(port, b"GET / HTTP/1.1\r\n\r\n")
            assert answer.startswith("HTTP/1.1 200 OK\r\n")
            assert json.loads(answer.partition("\r\n\r\n")[2]) == {"status": "running", "running": 3}
            assert (await asked(port, b"GET /metrics HTTP/1.1\r\n\r\n")).endswith(
                "\r\n\r\nparallel_agents_worker_running 3\n"
            )
            is_ready = False
            assert (await asked(port, b"GET / HTTP/1.1\r\n\r\n")).startswith("HTTP/1.1 503 Service Unavailable\r\n")
            async with await anyio.connect_tcp("127.0.0.1", port):
                pass  # whoever connects and asks nothing harms nobody
            assert (await asked(port, b"GET / HTTP/1.1\r\n\r\n")).startswith("HTTP/1.1 503")
            tasks.cancel_scope.cancel()
