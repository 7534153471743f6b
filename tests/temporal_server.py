"""Temporal's development server as a program of its own, on loopback, for tests and benchmarks."""

import asyncio
import os
import socket
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import anyio
import anyio.to_thread
from temporalio.client import Client
from temporalio.service import RPCError

from parallel_agents.engines.temporal import TemporalEngine
from parallel_agents.testing.remote import SECONDS

PRAGMAS = ["--sqlite-pragma", "synchronous=OFF"]
"""A step of a workflow takes several commits, each of which waits for the disk, 150 ms in all."""
ADDRESS = "PARALLEL_AGENTS_TEMPORAL_ADDRESS"
"""The environment variable that tells drivers where the server is."""
QUEUE = "PARALLEL_AGENTS_TASK_QUEUE"
"""The environment variable that tells drivers where the agents' workers listen."""
HEARTBEAT_TIMEOUT_SECONDS = 3.0
SECONDS_TO_START = 60.0
SECONDS_TO_END = 60.0
SECONDS_TO_DRAIN = 5.0


class TemporalServer:
    """A server that keeps what it knows in a file, so that it can be killed and started again.

    Args:
        folder: Where its file and its log are.
        is_synced: Whether what it knows outlives a power cut too, not only its own end.
        polls: How many calls of a namespace may wait at the server at once; its own default unless given.
    """

    def __init__(self, folder: Path, *, is_synced: bool = False, polls: int | None = None) -> None:
        self._limits = [] if polls is None else ["--dynamic-config-value", f"frontend.namespaceCount={polls}"]
        self._pragmas = [] if is_synced else PRAGMAS
        self.address = f"127.0.0.1:{free_port()}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        program = Path(sysconfig.get_path("scripts"), "temporal")
        host, _, port = self.address.partition(":")
        options = [
            "--ip",
            host,
            "--port",
            port,
            "--headless",
            "--db-filename",
            str(self._folder / "temporal.db"),
            *self._pragmas,
            *self._limits,
        ]
        with (self._folder / "temporal.log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, "server", "start-dev", *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        asyncio.run(self._until_it_answers())

    def kill(self) -> None:
        """End it at once."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def worker(self, engine: str, task_queue: str, *options: str, heartbeat: float = 0.5) -> "TemporalWorker":
        """Return a worker of this server, to be started."""
        options = ("--engine", engine, "--address", self.address, "--heartbeat", str(heartbeat), *options)
        return TemporalWorker(task_queue, self._folder / f"{task_queue}.log", *options)

    async def _until_it_answers(self) -> None:
        assert self._process is not None
        give_up = time.monotonic() + SECONDS_TO_START
        while True:
            try:
                client = await Client.connect(self.address)
                await client.count_workflows()  # the namespace is made some time after the port is open
            except (RPCError, RuntimeError):
                if self._process.poll() is not None or time.monotonic() > give_up:
                    raise RuntimeError((self._folder / "temporal.log").read_text("utf-8")) from None
                await asyncio.sleep(0.05)
            else:
                return


class TemporalWorker:
    """``parallel-agents worker`` as a process.

    Args:
        task_queue: Where it takes agents from.
        log: What it says goes there.
        options: Of the command.
    """

    def __init__(self, task_queue: str, log: Path, *options: str) -> None:
        self.task_queue = task_queue
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [sys.executable, "-m", "parallel_agents", "worker", "--task-queue", task_queue, *options]

    def __enter__(self) -> Self:
        if self._process is None:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it as a supervisor does: at the second request it cancels what still runs."""
        assert self._process is not None
        for _request in range(2):
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=SECONDS_TO_DRAIN)
                return
        self.kill()

    def start(self, cwd: Path | None = None) -> None:
        """Start it; what it is to run waits for it meanwhile."""
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        """End it as nothing but SIGKILL can."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def wait_until_it_says(self, text: str) -> None:
        """Wait until it has written something."""
        give_up = time.monotonic() + SECONDS_TO_START
        while text not in self._log.read_text("utf-8"):
            assert time.monotonic() < give_up
            time.sleep(0.02)

    def terminate(self) -> None:
        """Ask it to end, as a supervisor does."""
        assert self._process is not None
        self._process.terminate()

    def wait(self) -> int:
        """Wait for its end, and return its exit code."""
        assert self._process is not None
        return self._process.wait(timeout=SECONDS_TO_END)


def connect(address: str) -> Client:
    """Return a client, which is good in every event loop, outside of one."""
    return asyncio.run(Client.connect(address))


async def make_engine(execution: str, *, cancel_seconds: float = SECONDS) -> TemporalEngine:
    """Return an engine, in this process or in another that the tests start."""
    client = await anyio.to_thread.run_sync(connect, os.environ[ADDRESS])
    return TemporalEngine(
        client,
        os.environ[QUEUE],
        execution=execution,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
        progress_seconds=0.5,
        cancel_seconds=cancel_seconds,
    )


def free_port() -> int:
    """Return a port of loopback that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
