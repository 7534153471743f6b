"""TemporalEngine with a real server and real workers, each a process of its own, on both backends."""

import asyncio
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from temporal_server import (
    ADDRESS,
    HEARTBEAT_TIMEOUT_SECONDS,
    QUEUE,
    TemporalServer,
    TemporalWorker,
    connect,
    free_port,
    make_engine,
)
from temporalio.client import (
    Client,
    Interceptor,
    OutboundInterceptor,
    StartWorkflowInput,
    WorkflowFailureError,
    WorkflowHandle,
)
from temporalio.service import RPCError, RPCStatusCode

from parallel_agents import (
    AgentAssignment,
    AgentEngine,
    AgentIdentity,
    AgentOutcome,
    Budget,
    Observer,
    OutcomeStatus,
    ParallelEvent,
    ParallelExecutionGroup,
    ParallelExecutor,
    Task,
    TerminationReason,
    Usage,
)
from parallel_agents.engines._remote import unconfirmed
from parallel_agents.engines._temporal_call import workflow_id
from parallel_agents.engines.temporal import PayloadTooLargeError, TemporalEngine
from parallel_agents.events import PARALLEL_AGENT_RESUMED
from parallel_agents.testing import RemoteEngineContract
from parallel_agents.testing.remote import SECONDS, MakeEngine, Watched
from parallel_agents.testing.remote_agents import Diary, assignment

AGENT = "parallel_agents.testing.remote_agents:agent"
AGENTS = "temporal_agents:agent"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TemporalServer]:
    with TemporalServer(tmp_path_factory.mktemp("temporal")) as server:
        os.environ[ADDRESS] = server.address
        yield server
        del os.environ[ADDRESS]


@pytest.fixture(scope="session")
def worker(server: TemporalServer) -> Iterator[TemporalWorker]:
    with server.worker(AGENT, f"agents-{secrets.token_hex(4)}") as worker:
        os.environ[QUEUE] = worker.task_queue
        yield worker
        del os.environ[QUEUE]


@pytest.fixture(scope="session")
def temporal_agents(server: TemporalServer) -> Iterator[TemporalWorker]:
    with server.worker(AGENTS, f"agents-{secrets.token_hex(4)}") as worker:
        yield worker


class TestTemporalEngine(RemoteEngineContract):
    @pytest.fixture
    def make_engine(self, worker: TemporalWorker) -> MakeEngine:
        return make_engine

    @pytest.fixture
    def kill_worker(self, worker: TemporalWorker) -> Callable[[int], object]:
        def kill(pid: int) -> None:
            assert pid == worker.pid
            worker.kill()
            worker.start()

        return kill


class Told:
    """An observer that keeps why agents were resumed."""

    event_names = frozenset({PARALLEL_AGENT_RESUMED})

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def on_event(self, event: ParallelEvent, /) -> None:
        self.reasons.append(event.fields["reason"])


@pytest.fixture
def diary(tmp_path: Path) -> Diary:
    return Diary(tmp_path / "diary")


@pytest.fixture
def client(server: TemporalServer) -> Client:
    return connect(server.address)


def terminate(client: Client, workflow_id: str) -> None:
    asyncio.run(client.get_workflow_handle(workflow_id).terminate(reason="enough of it"))


def wait_for_workflow(client: Client, workflow_id: str) -> None:
    async def wait() -> None:
        while True:
            try:
                await client.get_workflow_handle(workflow_id).describe()
            except RPCError as error:
                assert error.status is RPCStatusCode.NOT_FOUND
                await asyncio.sleep(0.02)
            else:
                return

    asyncio.run(wait())


def end_of(client: Client, workflow_id: str) -> str:
    with pytest.raises(WorkflowFailureError) as failed:
        asyncio.run(client.get_workflow_handle(workflow_id).result())
    return str(failed.value.cause)


def engine_for(client: Client, worker: TemporalWorker, execution: str | None = None, **options: Any) -> TemporalEngine:
    chosen = {"heartbeat_timeout_seconds": HEARTBEAT_TIMEOUT_SECONDS, "progress_seconds": 0.1, **options}
    return TemporalEngine(client, worker.task_queue, execution=execution or f"e-{secrets.token_hex(4)}", **chosen)


def work_of(*inputs: dict[str, Any], **fields: Any) -> list[AgentAssignment]:
    return [
        AgentAssignment(identity=AgentIdentity(id=f"a{n}"), task=Task(id=f"t{n}", inputs=given), **fields)
        for n, given in enumerate(inputs, 1)
    ]


def group(work: list[AgentAssignment], **options: Any) -> ParallelExecutionGroup:
    return ParallelExecutionGroup(group_id="g", assignments=work, **options)


async def outcomes_of(
    engine: AgentEngine, work: list[AgentAssignment], *observers: Observer, **options: Any
) -> tuple[AgentOutcome[Any], ...]:
    with anyio.fail_after(SECONDS):
        executor = ParallelExecutor(engine=engine, observers=observers)
        return (await executor.execute_group(group(work, **options))).outcomes


@pytest.mark.anyio
async def test_a_result_is_kept_and_a_failure_runs_again(client: Client, worker: TemporalWorker, diary: Diary) -> None:
    work = [assignment("return", diary, 1, output="kept"), assignment("fail", diary, 2)]
    engine, told = engine_for(client, worker), Told()
    first = await outcomes_of(engine, work)
    second = await outcomes_of(engine, work, told)
    assert [outcome.output for outcome in first] == [outcome.output for outcome in second] == ["kept", None]
    assert first[1].usage == second[1].usage == Usage(requests=3)
    assert told.reasons == ["recorded"]
    assert [len(diary.lines("started", task)) for task in ("t1", "t2")] == [1, 2]


@pytest.mark.anyio
async def test_a_result_that_is_a_failure_comes_back_whole_and_runs_again(
    client: Client, temporal_agents: TemporalWorker
) -> None:
    engine, told = engine_for(client, temporal_agents), Told()
    for _ in range(2):
        (outcome,) = await outcomes_of(engine, work_of({}), told)
        assert outcome.status is OutcomeStatus.FAILED
        assert outcome.result is not None
        assert outcome.result.termination_reason is TerminationReason.MAX_TURNS
        assert outcome.usage == Usage(requests=20)
    assert told.reasons == []


@pytest.mark.anyio
async def test_other_work_of_the_same_name_runs_anew(client: Client, worker: TemporalWorker, diary: Diary) -> None:
    engine, told = engine_for(client, worker), Told()
    outputs = []
    for output in ("old", "new"):
        (outcome,) = await outcomes_of(engine, [assignment("return", diary, output=output)], told)
        outputs.append(outcome.output)
    assert outputs == ["old", "new"]
    assert told.reasons == ["changed"]


@pytest.mark.anyio
async def test_other_work_does_not_run_beside_the_old_one(client: Client, worker: TemporalWorker, diary: Diary) -> None:
    engine = engine_for(client, worker)
    with anyio.fail_after(SECONDS):
        async with ParallelExecutor(engine=engine).open_group(group([assignment("wait until told", diary)])) as run:
            await diary.wait_for("started")
            (refused,) = await outcomes_of(engine, [assignment("return", diary)])
            diary.note("go")
    assert refused.status is OutcomeStatus.FAILED
    assert refused.error is not None
    assert refused.error.startswith("AnotherAgentRunsError: The workflow ")
    assert run.result.all_succeeded


@pytest.mark.anyio
async def test_too_large_an_assignment_is_refused_before_anything_runs(
    client: Client, worker: TemporalWorker, diary: Diary
) -> None:
    work = [assignment("return", diary, 1), assignment("return", diary, 2, output="x" * 1_600_000)]
    with pytest.raises(
        PayloadTooLargeError, match=r"The assignment of task 't2' is 1.60 MB as JSON, more than the 1.5"
    ):
        await outcomes_of(engine_for(client, worker), work)
    assert diary.lines() == []


@pytest.mark.anyio
async def test_too_much_together_with_what_it_depends_on_is_refused_before_it_is_sent(
    client: Client, worker: TemporalWorker, diary: Diary
) -> None:
    work = [
        assignment("return", diary, 1, output="x" * 800_000),
        assignment("return", diary, 2, output="x" * 800_000, depends_on=("t1",)),
    ]
    first, second = await outcomes_of(engine_for(client, worker), work)
    assert first.output == "x" * 800_000
    assert second.error is not None
    assert second.error.startswith("PayloadTooLargeError: The assignment of task 't2' is ")
    assert len(diary.lines("started")) == 1


@pytest.mark.anyio
async def test_what_is_just_small_enough_goes_both_ways(client: Client, worker: TemporalWorker, diary: Diary) -> None:
    output = "x" * 1_498_000
    (outcome,) = await outcomes_of(engine_for(client, worker), [assignment("return", diary, output=output)])
    assert outcome.output == output


@pytest.mark.anyio
async def test_too_large_a_result_is_a_failure_that_says_so(client: Client, temporal_agents: TemporalWorker) -> None:
    (outcome,) = await outcomes_of(engine_for(client, temporal_agents), work_of({"characters": 1_600_000}))
    assert outcome.status is OutcomeStatus.FAILED
    assert outcome.error is not None
    assert "PayloadTooLargeError: What the agent returned is 1.60 MB" in outcome.error


@pytest.mark.anyio
async def test_events_are_left_out_where_the_result_would_not_fit(
    client: Client, temporal_agents: TemporalWorker
) -> None:
    work = work_of({"characters": 1_000_000, "events": 40})
    (outcome,) = await outcomes_of(engine_for(client, temporal_agents), work)
    assert outcome.output == "x" * 1_000_000


@pytest.mark.anyio
async def test_an_agent_that_kills_its_workers_is_given_up(server: TemporalServer, client: Client) -> None:
    with server.worker(AGENTS, f"agents-{secrets.token_hex(4)}") as worker:

        async def start_again() -> None:
            for _ in range(2):
                assert await anyio.to_thread.run_sync(worker.wait) == -signal.SIGKILL
                worker.start()

        engine = engine_for(client, worker, starts=2, heartbeat_timeout_seconds=1.5)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(start_again)
            (outcome,) = await outcomes_of(engine, work_of({"crash": 0.5}))
    assert outcome.status is OutcomeStatus.FAILED
    assert outcome.error is not None
    assert outcome.error.startswith("WorkerLostError: ")
    assert outcome.usage == Usage(requests=2)


@pytest.mark.anyio
async def test_a_spent_budget_is_told_to_agents_that_run(client: Client, temporal_agents: TemporalWorker) -> None:
    work = work_of({"budget": 0.5}, {"budget": 0.75})
    outcomes = await outcomes_of(engine_for(client, temporal_agents), work, budget=Budget(max_cost=1.0))
    assert [outcome.output for outcome in outcomes] == ["enough", "enough"]


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[TemporalServer]:
    with TemporalServer(tmp_path) as server:
        yield server


@pytest.mark.anyio
async def test_an_agent_outlives_a_server_that_is_killed(own_server: TemporalServer, diary: Diary) -> None:
    with own_server.worker(AGENT, "agents") as worker:
        client = await anyio.to_thread.run_sync(connect, own_server.address)
        engine = Watched(engine_for(client, worker, heartbeat_timeout_seconds=60))
        with anyio.fail_after(SECONDS):
            work = group([assignment("wait until told", diary)])
            async with ParallelExecutor(engine=engine).open_group(work) as run:
                await engine.wait_for("t1")
                own_server.kill()
                await anyio.to_thread.run_sync(own_server.start)
                diary.note("go")
        (outcome,) = run.result.outcomes
        assert outcome.is_success, outcome.error
        assert outcome.usage == Usage(requests=1)
        assert len(diary.lines("started")) == 1


class BadConnection(Interceptor):
    """What the server says to starts of workflows does not arrive.

    Args:
        answers: How many answers are lost, after a workflow was started.
        requests: How many requests are lost before that.
    """

    def __init__(self, *, answers: float = 0, requests: float = 0) -> None:
        self.answers = answers
        self.requests = requests
        self.asked = 0

    def intercept_client(self, next: OutboundInterceptor) -> OutboundInterceptor:  # noqa: A002 - Temporal's name
        """Stand before what starts workflows."""
        return BadStarts(next, self)

    async def connect(self, address: str) -> Client:
        return await Client.connect(address, interceptors=[self])


class BadStarts(OutboundInterceptor):
    def __init__(self, next: OutboundInterceptor, connection: BadConnection) -> None:  # noqa: A002 - Temporal's name
        super().__init__(next)
        self._connection = connection

    async def start_workflow(self, input: StartWorkflowInput) -> WorkflowHandle[Any, Any]:  # noqa: A002 - the same
        """Start it, unless the request is lost; and say so, unless the answer is."""
        self._connection.asked += 1
        if self._connection.requests:
            self._connection.requests -= 1
            raise RPCError("tcp connect error", RPCStatusCode.UNAVAILABLE, b"")
        handle = await super().start_workflow(input)
        if self._connection.answers:
            self._connection.answers -= 1
            raise RPCError("Timeout expired", RPCStatusCode.CANCELLED, b"")
        return handle


async def connect_badly(server: TemporalServer, **lost: float) -> Client:
    return await anyio.to_thread.run_sync(asyncio.run, BadConnection(**lost).connect(server.address))


def tasks_of(backend: str) -> set["asyncio.Task[Any]"]:
    """Return asyncio's tasks of this thread; on trio, all of them run in another one, which has ended."""
    return asyncio.all_tasks() if backend == "asyncio" else set()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("do", "error"), [("return", None), ("fail", "RemoteAgentError: ValueError: it does not work")]
)
async def test_one_whose_start_was_not_answered_runs_once(
    server: TemporalServer, worker: TemporalWorker, diary: Diary, do: str, error: str | None
) -> None:
    client = await connect_badly(server, requests=1, answers=1)
    told = Told()
    (outcome,) = await outcomes_of(engine_for(client, worker), [assignment(do, diary)], told)
    assert outcome.error == error
    assert told.reasons == []
    assert len(diary.lines("started")) == 1


@pytest.mark.anyio
async def test_one_that_runs_anew_and_whose_start_was_not_answered_runs_once(
    server: TemporalServer, client: Client, worker: TemporalWorker, diary: Diary
) -> None:
    badly, told, execution = await connect_badly(server, answers=1), Told(), secrets.token_hex(4)
    await outcomes_of(engine_for(client, worker, execution), [assignment("return", diary)])
    work = group([assignment("wait until told", diary)])
    with anyio.fail_after(SECONDS):
        async with ParallelExecutor(engine=engine_for(badly, worker, execution), observers=[told]).open_group(work):
            await diary.wait_for("started", count=2)
            diary.note("go")
    assert told.reasons == ["changed"]
    assert len(diary.lines("started")) == 2


@pytest.mark.anyio
async def test_one_whose_start_nobody_answers_is_cancelled_and_asks_no_more(
    server: TemporalServer, worker: TemporalWorker, diary: Diary, anyio_backend_name: str
) -> None:
    connection = BadConnection(requests=math.inf)
    client = await anyio.to_thread.run_sync(asyncio.run, connection.connect(server.address))
    engine, before = engine_for(client, worker, cancel_seconds=0.3), tasks_of(anyio_backend_name)
    with anyio.fail_after(SECONDS):
        async with ParallelExecutor(engine=engine).open_group(group([assignment("return", diary)])) as run:
            while not connection.asked:  # noqa: ASYNC110 - on trio, another thread asks
                await anyio.sleep(0.01)
            run.cancel()
    assert run.result.outcomes[0].error == f"Cancelled: cancel() was called. {unconfirmed(0.3)}"
    await anyio.lowlevel.checkpoint()
    assert tasks_of(anyio_backend_name) == before


@pytest.mark.anyio
async def test_one_whose_workflow_was_ended_by_somebody_has_failed(
    client: Client, worker: TemporalWorker, diary: Diary
) -> None:
    execution = secrets.token_hex(4)
    engine = engine_for(client, worker, execution)
    with anyio.fail_after(SECONDS):
        async with ParallelExecutor(engine=engine).open_group(group([assignment("spend and wait", diary)])) as run:
            await diary.wait_for("started")
            await anyio.to_thread.run_sync(terminate, client, f"{execution}/t1")
            await diary.wait_for("cancelled", "t1")
    (outcome,) = run.result.outcomes
    assert outcome.status is OutcomeStatus.FAILED
    assert outcome.error == f"WorkerLostError: workflow '{execution}/t1': enough of it"


@pytest.mark.anyio
async def test_one_that_waits_for_a_place_is_cancelled_and_never_starts(
    server: TemporalServer, client: Client, diary: Diary
) -> None:
    queue = f"agents-{secrets.token_hex(4)}"
    with server.worker(AGENT, queue, "--max-concurrency", "1") as worker, anyio.fail_after(SECONDS):
        engine = engine_for(client, worker)
        work = [assignment("wait until told", diary, n, timeout_seconds=30) for n in (1, 2)]
        async with ParallelExecutor(engine=engine).open_group(group(work)) as run:
            ((_, first, _),) = await diary.wait_for("started")
            second = {"t1": "t2", "t2": "t1"}[first]
            run.cancel_task(second)
            async for outcome in run:
                assert (outcome.task_id, outcome.error) == (second, "Cancelled: cancel_task() was called")
                break
            diary.note("go")
    assert len(diary.lines("started")) == 1


@pytest.mark.anyio
async def test_one_that_no_worker_hears_of_is_cancelled_when_one_comes(
    server: TemporalServer, client: Client, diary: Diary
) -> None:
    worker = server.worker(AGENT, f"agents-{secrets.token_hex(4)}")
    execution = secrets.token_hex(4)
    engine = engine_for(client, worker, execution, cancel_seconds=0.3)
    with anyio.fail_after(SECONDS):
        async with ParallelExecutor(engine=engine).open_group(group([assignment("return", diary)])) as run:
            await anyio.to_thread.run_sync(wait_for_workflow, client, f"{execution}/t1")
            run.cancel()
        assert run.result.outcomes[0].error == f"Cancelled: cancel() was called. {unconfirmed(0.3)}"
        with worker:
            assert await anyio.to_thread.run_sync(end_of, client, f"{execution}/t1") == "Workflow cancelled"
    assert diary.lines() == []


@pytest.mark.anyio
async def test_a_stopped_worker_lets_its_agents_finish(server: TemporalServer, client: Client, diary: Diary) -> None:
    with server.worker(AGENT, f"agents-{secrets.token_hex(4)}") as worker, anyio.fail_after(SECONDS):
        engine = engine_for(client, worker)
        async with ParallelExecutor(engine=engine).open_group(group([assignment("wait until told", diary)])) as run:
            await diary.wait_for("started")
            worker.terminate()
            await anyio.to_thread.run_sync(worker.wait_until_it_says, "Stopping")
            diary.note("go")
        assert await anyio.to_thread.run_sync(worker.wait) == 0
    assert run.result.all_succeeded


@pytest.mark.anyio
async def test_what_a_stopped_worker_has_to_cancel_runs_again(
    server: TemporalServer, client: Client, diary: Diary
) -> None:
    queue = f"agents-{secrets.token_hex(4)}"
    with server.worker(AGENT, queue, "--grace", "0.3") as worker, anyio.fail_after(SECONDS):
        engine = Watched(engine_for(client, worker))
        work = group([assignment("wait the first time", diary)])
        async with ParallelExecutor(engine=engine).open_group(work) as run:
            await diary.wait_for("started")
            worker.terminate()
            assert await anyio.to_thread.run_sync(worker.wait) == 1
            worker.start()
    (outcome,) = run.result.outcomes
    assert outcome.output == "the second time"
    assert outcome.usage == Usage(requests=2)
    assert len(diary.lines("cancelled")) == 1


@pytest.mark.anyio
async def test_the_second_signal_cancels_what_runs_at_once(
    server: TemporalServer, client: Client, diary: Diary
) -> None:
    with server.worker(AGENT, f"agents-{secrets.token_hex(4)}") as worker, anyio.fail_after(SECONDS):
        work = group([assignment("wait the first time", diary)])
        async with ParallelExecutor(engine=engine_for(client, worker)).open_group(work) as run:
            await diary.wait_for("started")
            worker.terminate()
            await anyio.to_thread.run_sync(worker.wait_until_it_says, "Stopping")
            worker.terminate()
            assert await anyio.to_thread.run_sync(worker.wait) == 1
            worker.start()
    assert run.result.outcomes[0].output == "the second time"


@pytest.mark.anyio
async def test_one_that_does_not_stop_does_not_keep_its_worker(
    server: TemporalServer, client: Client, diary: Diary
) -> None:
    worker = server.worker(AGENT, f"agents-{secrets.token_hex(4)}", "--grace", "0")
    engine = engine_for(client, worker, cancel_seconds=0.3)
    with worker, anyio.fail_after(SECONDS):
        work = group([assignment("go on when cancelled", diary)])
        async with ParallelExecutor(engine=engine).open_group(work) as run:
            await diary.wait_for("started")
            worker.terminate()
            assert await anyio.to_thread.run_sync(worker.wait) == 1
            run.cancel()
    assert diary.lines("ended") == []


@pytest.mark.anyio
async def test_a_worker_tells_how_it_is(server: TemporalServer, client: Client, diary: Diary) -> None:
    port = free_port()
    queue = f"agents-{secrets.token_hex(4)}"
    with server.worker(AGENT, queue, "--health", f"127.0.0.1:{port}") as worker, anyio.fail_after(SECONDS):
        async with ParallelExecutor(engine=engine_for(client, worker)).open_group(
            group([assignment("wait until told", diary)])
        ) as run:
            await diary.wait_for("started")
            status, body = await asked(port, "/health")
            assert (status, json.loads(body)["running"]) == (200, 1)
            worker.terminate()
            await anyio.to_thread.run_sync(worker.wait_until_it_says, "Stopping")
            assert (await asked(port, "/health"))[0] == 503
            assert "parallel_agents_worker_running 1\n" in (await asked(port, "/metrics"))[1]
            diary.note("go")
        assert await anyio.to_thread.run_sync(worker.wait) == 0
    assert run.result.all_succeeded


async def asked(port: int, path: str) -> tuple[int, str]:
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        await stream.send(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        answer = b"".join([part async for part in stream]).decode()
    head, _, body = answer.partition("\r\n\r\n")
    return int(head.split()[1]), body


@pytest.mark.parametrize(
    ("options", "code", "told"),
    [
        (["--engine", "no_such_module:agent"], 2, "no_such_module:agent cannot be imported"),
        (["--engine", "temporal_agents:a_text"], 2, "must be an engine or an async function"),
        (["--engine", AGENT, "--max-concurrency", "0"], 2, "max_agents must be >= 1"),
        (["--engine", AGENT, "--health", "nowhere"], 2, "--health needs host:port"),
        (["--engine", AGENT, "--ray"], 2, "a worker needs to know of which cluster: --ray or --task-queue NAME"),
        (["--engine", AGENT, "--namespace", "not-there"], 1, "parallel-agents: Temporal"),
        (["--engine", AGENT, "--health", "192.0.2.1:80"], 1, "the health cannot be told at"),
    ],
)
def test_a_worker_that_cannot_begin_says_why(server: TemporalServer, options: list[str], code: int, told: str) -> None:
    command = [sys.executable, "-m", "parallel_agents", "worker", "--task-queue", "q", "--address", server.address]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([*command, *options], env=env, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (run.returncode, told in run.stderr) == (code, True), run.stderr


def test_a_worker_whose_server_is_not_there_says_so() -> None:
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "parallel_agents", "worker", "--task-queue", "q", "--address", address]
    run = subprocess.run([*command, "--engine", AGENT], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("parallel-agents: Temporal cannot be reached: ")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"client": "127.0.0.1:7233"}, "client must be "),
        ({"task_queue": " "}, "task_queue must not be blank"),
        ({"execution": ""}, "execution must not be blank"),
        ({"cancel_seconds": 0}, "cancel_seconds must be > 0"),
        ({"starts": 0}, "starts must be >= 1"),
    ],
)
def test_wrong_settings_are_refused(client: Client, options: dict[str, Any], told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        TemporalEngine(**{"client": client, "task_queue": "q", **options})


def test_names_that_differ_give_workflows_that_differ() -> None:
    names = [("a/b", "c"), ("a", "b/c"), ("a%2Fb", "c"), ("a", "\udc80")]
    ids = [workflow_id(*name) for name in names]
    assert len(set(ids)) == len(names)
    assert all(id_.encode() for id_ in ids)


def test_the_two_programs_of_the_page_do_what_it_says(server: TemporalServer, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "howto" / "temporal.md").read_text("utf-8")
    agents, driver = re.findall(r"^```py\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    (tmp_path / "my_agents.py").write_text(agents, "utf-8")
    (tmp_path / "drive.py").write_text(driver.replace("127.0.0.1:7233", server.address), "utf-8")
    worker = server.worker("my_agents:review", "reviews")
    worker.start(cwd=tmp_path)
    with worker:
        command = [sys.executable, "drive.py"]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert run.stderr == ""
    assert f"```text\n{run.stdout}```" in page
