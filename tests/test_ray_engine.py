"""RayEngine and its worker on a real cluster of one node; run in the session ``ray`` of noxfile.py, nowhere else."""

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import anyio
import pytest
from ray_cluster import AGENT, HOST, cluster, free_port, make_engine

from parallel_agents import AgentAssignment, AgentOutcome, OutcomeStatus, ParallelExecutionGroup, ParallelExecutor
from parallel_agents.testing import RemoteEngineContract
from parallel_agents.testing.remote import MakeEngine, Watched
from parallel_agents.testing.remote_agents import Diary, assignment

pytestmark = pytest.mark.anyio

SECONDS = 90.0
MakeRayEngine = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder from which the workers of the cluster import."""
    modules = tmp_path_factory.mktemp("modules")
    with cluster(modules):
        yield modules
        import_module("ray").shutdown()


@pytest.fixture
def ray() -> Any:
    return import_module("ray")


class TestRayEngine(RemoteEngineContract):
    @pytest.fixture
    def make_engine(self) -> MakeEngine:
        return make_engine


@pytest.fixture
def diary(tmp_path: Path) -> Diary:
    return Diary(tmp_path / "diary")


@pytest.fixture
def name() -> str:
    return f"test-{secrets.token_hex(4)}"


@pytest.fixture
def ray_engine(name: str, ray: Any) -> Iterator[MakeRayEngine]:
    """Makes engines whose hosts, which are named as no others, are stopped after the test."""
    from parallel_agents.engines.ray import NAMESPACE, RayEngine  # noqa: PLC0415 - Ray reads the token on import

    def make(inner: str = AGENT, **options: Any) -> RayEngine:
        return RayEngine(inner, **{"name": name, "actor_options": {"num_cpus": 0}, **options})

    yield make
    for number in range(2):
        with suppress(ValueError):
            ray.kill(ray.get_actor(f"{name}-{number}", namespace=NAMESPACE))


def group_of(work: list[AgentAssignment], **options: Any) -> ParallelExecutionGroup:
    return ParallelExecutionGroup(group_id="g", assignments=work, **options)


async def outcomes_of(engine: Any, work: list[AgentAssignment], **options: Any) -> tuple[AgentOutcome[Any], ...]:
    with anyio.fail_after(SECONDS):
        return (await ParallelExecutor(engine=engine).execute_group(group_of(work, **options))).outcomes


async def test_an_agent_that_kills_each_worker_is_given_up(ray_engine: MakeRayEngine, diary: Diary) -> None:
    (outcome,) = await outcomes_of(ray_engine(starts=2), [assignment("kill the worker", diary)])
    assert outcome.status is OutcomeStatus.FAILED
    assert outcome.error is not None
    assert outcome.error.startswith("WorkerLostError: its worker was lost 2 times")
    assert len(diary.lines("started")) == 2


async def test_an_agent_of_a_host_that_was_removed_runs_again_on_a_new_one(
    ray_engine: MakeRayEngine, ray: Any, diary: Diary, name: str
) -> None:
    engine = Watched(ray_engine())
    with anyio.fail_after(SECONDS):
        async with ParallelExecutor(engine=engine).open_group(
            group_of([assignment("wait the first time", diary)])
        ) as run:
            await engine.wait_for("t1")
            ray.kill(ray.get_actor(f"{name}-0", namespace="parallel_agents"), no_restart=True)
    assert run.result.outcomes[0].output == "the second time"


async def test_an_engine_that_cannot_be_imported_there_is_told(ray_engine: MakeRayEngine, diary: Diary) -> None:
    (outcome,) = await outcomes_of(ray_engine("no_such_module:agent"), [assignment("return", diary)])
    assert outcome.status is OutcomeStatus.FAILED
    assert outcome.error is not None
    assert outcome.error.startswith("WorkerRefusedError: The worker does not run it: no_such_module:agent cannot be")


async def test_two_engines_with_one_name_are_told_apart(ray_engine: MakeRayEngine, diary: Diary) -> None:
    await outcomes_of(ray_engine(), [assignment("return", diary)])
    (outcome,) = await outcomes_of(ray_engine("other_module:agent"), [assignment("return", diary)])
    assert outcome.error is not None
    assert f"it runs {AGENT}, not other_module:agent; give the other engine another name" in outcome.error


async def test_hosts_that_are_missing_are_waited_for_and_told(ray_engine: MakeRayEngine, diary: Diary) -> None:
    work = [assignment("return", diary, n) for n in range(5)]
    outcomes = await outcomes_of(ray_engine(starts_hosts=False, reach_seconds=0.2), work)
    assert {outcome.status for outcome in outcomes} == {OutcomeStatus.FAILED}
    for outcome in outcomes:
        assert outcome.error is not None
        assert outcome.error.startswith("EngineUnavailableError: ")
        assert "parallel-agents worker --ray" in outcome.error


async def test_a_host_for_which_there_is_no_room_is_told(ray_engine: MakeRayEngine, diary: Diary) -> None:
    engine = ray_engine(reach_seconds=0.5, actor_options={"num_cpus": 100})
    (outcome,) = await outcomes_of(engine, [assignment("return", diary)])
    assert outcome.error is not None
    assert "did not answer within 0.5 s: is there room for it? See: ray status" in outcome.error


async def test_time_in_the_line_for_a_place_does_not_count(ray_engine: MakeRayEngine, diary: Diary) -> None:
    engine = ray_engine(max_agents=1)
    work = [
        assignment("spend and wait", diary, 2, timeout_seconds=1.0),
        assignment("return", diary, 3, output="its turn came", timeout_seconds=1.0),
    ]
    await outcomes_of(engine, [assignment("return", diary, 0)])
    outcomes: list[AgentOutcome[Any]] = []

    async def first() -> None:
        outcomes.extend(await outcomes_of(engine, [assignment("spend and wait", diary, 1, timeout_seconds=2.0)]))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first)
        await diary.wait_for("started", "t1")  # two that start at once may come to the host in any order
        second, third = await outcomes_of(engine, work)
    assert (outcomes[0].status, second.status) == (OutcomeStatus.TIMED_OUT, OutcomeStatus.TIMED_OUT)
    assert third.output == "its turn came"
    assert [words[:2] for words in diary.lines()][1:] == [
        ["started", "t1"], ["cancelled", "t1"], ["started", "t2"], ["cancelled", "t2"], ["started", "t3"],
    ]  # fmt: skip


async def test_an_agent_that_waits_for_a_place_can_be_cancelled(ray_engine: MakeRayEngine, diary: Diary) -> None:
    engine = ray_engine(max_agents=1)
    work = [assignment("wait until told", diary, 1), assignment("return", diary, 2)]
    with anyio.fail_after(SECONDS):
        async with ParallelExecutor(engine=engine).open_group(group_of(work)) as run:
            await diary.wait_for("started", "t1")
            run.cancel_task("t2")
            async for outcome in run:
                assert (outcome.task_id, outcome.error) == ("t2", "Cancelled: cancel_task() was called")
                break
            diary.note("go")
    assert run.result.outcomes[0].status is OutcomeStatus.SUCCEEDED
    assert diary.lines("started", "t2") == []


async def test_another_attempt_is_another_start(ray_engine: MakeRayEngine, diary: Diary) -> None:
    from parallel_agents import RunContext, current_run  # noqa: PLC0415

    engine = ray_engine()

    class TwiceEngine:
        async def run(self, assignment: AgentAssignment, /) -> Any:
            run: RunContext = current_run()
            with pytest.raises(Exception, match="OSError: the first time"):
                await engine.run(assignment)
            run.attempt = 2
            return await engine.run(assignment)

    (outcome,) = await outcomes_of(TwiceEngine(), [assignment("fail the first time", diary)])
    assert (outcome.output, outcome.attempts) == (2, 2)


async def test_an_agent_that_one_engine_runs_twice_at_once_has_one_result(
    ray_engine: MakeRayEngine, diary: Diary
) -> None:
    executor = ParallelExecutor(engine=ray_engine())
    work = group_of([assignment("wait until told", diary)])
    with anyio.fail_after(SECONDS):
        async with executor.open_group(work) as one, executor.open_group(work) as other:
            await diary.wait_for("started", "t1")
            diary.note("go")
    outputs = [run.result.outcomes[0].output for run in (one, other)]
    assert outputs[0] is not None
    assert outputs[0] == outputs[1]


async def test_a_thousand_agents_have_their_own_results(ray_engine: MakeRayEngine, diary: Diary) -> None:
    work = [assignment("return", diary, n, output=n) for n in range(1000)]
    outcomes = await outcomes_of(ray_engine(hosts=2), work, max_concurrency=300)
    assert [outcome.output for outcome in outcomes] == list(range(1000))
    assert len(diary.lines("started")) == 1000


def test_one_engine_serves_several_event_loops(ray_engine: MakeRayEngine, diary: Diary) -> None:
    engine = ray_engine()
    for number, backend in enumerate(["asyncio", "trio", "asyncio"]):
        (outcome,) = anyio.run(
            outcomes_of, engine, [assignment("return", diary, number, output=backend)], backend=backend
        )
        assert outcome.output == backend


@asynccontextmanager
async def worker(name: str, *options: str, engine: str = AGENT) -> AsyncIterator["subprocess.Popen[str]"]:
    """Run the command until it says that its hosts are there, and to the end of the block."""
    program = str(Path(sys.executable).with_name("parallel-agents"))
    command = [program, "worker", "--ray", "--engine", engine, "--name", name, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)  # noqa: ASYNC220 - starting it is quick
    assert process.stderr is not None
    said = [""]
    try:
        while "after SIGTERM agents may finish" not in said[-1]:
            said.append(await anyio.to_thread.run_sync(process.stderr.readline))
            assert said[-1], "".join(said)  # it has ended
        yield process
    finally:
        process.kill()
        process.communicate()


async def ended(process: "subprocess.Popen[str]") -> int:
    return await anyio.to_thread.run_sync(process.wait, SECONDS)


async def asked(port: int, path: str) -> tuple[str, str]:
    async with await anyio.connect_tcp(HOST, port) as stream:
        await stream.send(f"GET {path} HTTP/1.1\r\n\r\n".encode())
        answer = b"".join([part async for part in stream]).decode()
    head, _, body = answer.partition("\r\n\r\n")
    return head.splitlines()[0], body


async def test_a_worker_that_is_told_to_stop_lets_its_agents_finish(
    ray_engine: MakeRayEngine, diary: Diary, name: str
) -> None:
    port = free_port()
    with anyio.fail_after(SECONDS):
        async with worker(name, "--hosts", "2", "--health", f"{HOST}:{port}") as process:
            executor = ParallelExecutor(engine=ray_engine(hosts=2, starts_hosts=False))
            async with executor.open_group(group_of([assignment("wait until told", diary)])) as run:
                await diary.wait_for("started", "t1")
                status, body = await asked(port, "/")
                assert (status, json.loads(body)["hosts"]) == ("HTTP/1.1 200 OK", 2)
                while "parallel_agents_worker_running 1\n" not in (await asked(port, "/metrics"))[1]:  # noqa: ASYNC110
                    await anyio.sleep(0.05)
                process.send_signal(signal.SIGTERM)
                while "503" not in (await asked(port, "/"))[0]:  # noqa: ASYNC110
                    await anyio.sleep(0.05)
                diary.note("go")
            assert run.result.outcomes[0].status is OutcomeStatus.SUCCEEDED
            assert await ended(process) == 0
    assert len(diary.lines("started")) == 1


async def test_agents_that_a_worker_has_to_cancel_run_again_on_the_next(
    ray_engine: MakeRayEngine, diary: Diary, name: str
) -> None:
    with anyio.fail_after(SECONDS):
        executor = ParallelExecutor(engine=ray_engine(starts_hosts=False))
        work = group_of([assignment("wait the first time", diary)])
        async with worker(name) as first, executor.open_group(work) as run:
            await diary.wait_for("started", "t1")
            first.send_signal(signal.SIGTERM)
            first.send_signal(signal.SIGINT)
            assert await ended(first) == 1
            assert len(diary.lines("cancelled", "t1")) == 1
            async with worker(name):
                async for outcome in run:
                    assert outcome.output == "the second time"
    assert len(diary.lines("started")) == 2


async def test_a_worker_that_was_killed_is_followed_by_one_that_goes_on(
    ray_engine: MakeRayEngine, diary: Diary, name: str
) -> None:
    with anyio.fail_after(SECONDS):
        executor = ParallelExecutor(engine=ray_engine(starts_hosts=False))
        work = group_of([assignment("wait until told", diary)])
        async with worker(name) as first, executor.open_group(work) as run:
            await diary.wait_for("started", "t1")
            first.kill()
            async with worker(name):
                diary.note("go")
                async for outcome in run:
                    assert outcome.status is OutcomeStatus.SUCCEEDED
    assert len(diary.lines("started")) == 1


async def test_a_driver_that_its_host_has_forgotten_finds_its_agents_again(
    ray_engine: MakeRayEngine, diary: Diary
) -> None:
    engine = ray_engine()
    with anyio.fail_after(SECONDS):
        async with ParallelExecutor(engine=engine).open_group(group_of([assignment("wait until told", diary)])) as run:
            await diary.wait_for("started", "t1")
            engine._links_of_this_loop.get().known[0]._name = "of whom the host knows nothing"
            diary.note("go")
    assert run.result.outcomes[0].status is OutcomeStatus.SUCCEEDED
    assert len(diary.lines("started")) == 1


async def test_the_page_about_ray_tells_the_truth(modules: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "howto" / "ray.md").read_text("utf-8")
    agents, drive = re.findall(r"^```py\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    (modules / "my_agents.py").write_text(agents, "utf-8")
    (tmp_path / "drive.py").write_text(drive, "utf-8")
    with anyio.fail_after(SECONDS):
        async with worker("parallel-agents", "--hosts", "2", engine="my_agents:review") as process:
            done = await anyio.run_process([sys.executable, str(tmp_path / "drive.py")])
            process.send_signal(signal.SIGTERM)
            assert await ended(process) == 0
    assert f"```text\n{done.stdout.decode()}```" in page


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--hosts", "0"], 2, "hosts must be"),
        (["--health", "nowhere"], 2, "host:port"),
        (["--health", "{taken}"], 1, "the health cannot be told"),
        (["--engine", "other_module:agent"], 1, "choose another --name"),
    ],
)
def test_a_worker_that_cannot_begin_says_why(
    options: list[str], code: int, said: str, ray_engine: MakeRayEngine, diary: Diary, name: str
) -> None:
    anyio.run(outcomes_of, ray_engine(), [assignment("return", diary)])
    program = str(Path(sys.executable).with_name("parallel-agents"))
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        given = [option.replace("{taken}", f"{HOST}:{taken.getsockname()[1]}") for option in options]
        given = given if "--engine" in given else ["--engine", AGENT, *given]
        command = [program, "worker", "--ray", "--name", name, *given]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False, env=os.environ)
    assert done.returncode == code, done.stderr
    assert said in done.stderr


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"inner": object()}, TypeError),
        ({"inner": " "}, ValueError),
        ({"name": ""}, ValueError),
        ({"execution": ""}, ValueError),
        ({"hosts": 0}, ValueError),
        ({"max_agents": 0}, ValueError),
        ({"starts": 0}, ValueError),
        ({"cancel_seconds": -1}, ValueError),
        ({"reach_seconds": float("nan")}, ValueError),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], error: type[Exception]) -> None:
    from parallel_agents.engines.ray import RayEngine  # noqa: PLC0415

    with pytest.raises(error, match="must"):
        RayEngine(**{"inner": AGENT, **options})
    assert repr(RayEngine(AGENT)) == f"RayEngine('{AGENT}', name='parallel-agents', hosts=1)"
