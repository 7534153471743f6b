"""TemporalEngine with a real server and real workers, each a process of its own, on both backends."""

import os
import secrets
from collections.abc import Callable, Iterator

import anyio
import anyio.to_thread
import pytest
from temporal_server import TemporalServer, TemporalWorker, connect

from parallel_agents.engines.temporal import TemporalEngine
from parallel_agents.testing import RemoteEngineContract
from parallel_agents.testing.remote import MakeEngine

AGENT = "parallel_agents.testing.remote_agents:agent"
ADDRESS = "PARALLEL_AGENTS_TEMPORAL_ADDRESS"
QUEUE = "PARALLEL_AGENTS_TASK_QUEUE"
HEARTBEAT_TIMEOUT_SECONDS = 3.0


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


async def make_engine(execution: str, *, cancel_seconds: float = 10.0) -> TemporalEngine:
    """Return an engine, in this process or in another that the tests start."""
    client = await anyio.to_thread.run_sync(connect, os.environ[ADDRESS])
    return TemporalEngine(
        client,
        os.environ[QUEUE],
        execution=execution,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
        progress_seconds=0.1,
        cancel_seconds=cancel_seconds,
    )


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
